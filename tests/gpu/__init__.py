"""The check of a machine with a GPU: `make test-gpu`, at most ten minutes, one record.

__main__.py    time limits, the record, what is printed
setting.py     models, shapes and device: a GPU's, or tiny ones for a dry run on a CPU
right.py       kernels and quantisers against the definition; the same bits on a second run
speed.py       a block, a whole run of 20 steps, quantising
together.py    two processes on two GPUs
"""
