"""A performance lab for PyTorch extensions: each op written three ways, checked and measured."""

from pyext.backends import backends, empty_buffer_pool, use_backend

__all__ = ["backends", "empty_buffer_pool", "use_backend"]
