"""two_layer_mse_loss (sum) in JAX."""

import jax.numpy as jnp

from pyext.lab.jax_ops import two_layer


def function(x, y, w1, w2, b1=None, b2=None):
    """sum((two_layer(x, w1, w2, b1, b2) - y)^2)."""
    return jnp.sum(jnp.square(two_layer.function(x, w1, w2, b1, b2) - y))
