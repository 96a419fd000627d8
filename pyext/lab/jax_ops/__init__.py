"""The ops as a JAX user writes them, for the ``jax`` peer: one file per op, with a ``function``.

An op without a file here has no ``jax`` rows, and the report says so.
"""
