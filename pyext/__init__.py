"""A performance lab for PyTorch extensions: each op written three ways, checked and measured."""

from pyext.backends import backends, use_backend

__all__ = ["backends", "use_backend"]
