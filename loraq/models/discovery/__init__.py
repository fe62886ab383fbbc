"""Which layers a diffusion transformer has, what each does, and which read one tensor.

structure.py   the layers of a network: block, role, shape, shared input, why not quantised
roles.py       role of a layer by its name inside the block
skeleton.py    the network without weights, of which a forward costs milliseconds
traced.py      one forward of it: inputs of the layers, what is called, what follows a GELU
"""
