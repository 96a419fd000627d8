"""mse_loss (mean) in JAX."""

import jax.numpy as jnp


def function(input, target):
    """mean((input - target)^2)."""
    return jnp.mean(jnp.square(input - target))
