"""Quantise a transformer: group its layers, solve each group, keep the packed result.

`quantizer.py` is the way through; `grouping`, `solve` and `assemble` are its steps, `allocation/`
gives out ranks and bits, `calibration.py` captures activations. Imported by the public API, results
and the runner; imports models, layers, branches, rounding and below.
"""
