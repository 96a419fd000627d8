"""two_layer in JAX."""

import jax


def function(x, w1, w2, b1=None, b2=None):
    """relu(x @ w1 + b1) @ w2 + b2."""
    before = x @ w1 if b1 is None else x @ w1 + b1
    out = jax.nn.relu(before) @ w2
    return out if b2 is None else out + b2
