"""The Triton half of the lab: one file per op, imported as ``pyext.kernels``.

Importing this package imports neither Triton nor any op. ``pyext.kernels.OP`` registers OP's raw
ops in the dispatcher namespace ``pyext_triton`` when it is imported; the registry does that by file
name. Files with a leading underscore hold what several ops share.
"""
