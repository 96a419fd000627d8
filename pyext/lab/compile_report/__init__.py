"""What the compilers made of every CUDA and Triton kernel, read from the machine code with no GPU.

``python -m pyext.lab compile-report`` shows it; ``docs/compile-report.md`` explains it.
"""
