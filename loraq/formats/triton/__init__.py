"""The formats in Triton: rounding, codes and scales on a GPU, bit for bit as in `loraq.formats`.

Imported at first use by `loraq.formats.operator`, and by the kernels of `loraq.layers.triton`,
because the package triton is not available everywhere; imports the modules of `formats`.
"""
