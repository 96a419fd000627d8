"""A performance lab for PyTorch extensions: the same op written three ways, checked and measured."""

from pyext.backends import backends, use_backend

__all__ = ["backends", "use_backend"]
