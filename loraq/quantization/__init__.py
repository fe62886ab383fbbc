"""Quantise a transformer: group its layers, solve each group, store the packed layers.

`quantizer.py` is the entry point. For each group of `grouping.py` it calls `solve.py` (by
`group_work.py`, which knows the finished groups): input transform (`transform_search.py`), branch
(`branch_solution.py`), packed tensors (`assemble.py`).
`allocation/` assigns ranks and bits, `calibration.py` captures activations, `model.py` is the
result, `diffusers_*.py` load and save it.

Imported by the public API, results and the runner; imports models, layers, branches, rounding and
the packages below them.
"""
