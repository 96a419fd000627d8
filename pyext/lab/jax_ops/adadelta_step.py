"""adadelta_step in JAX."""

import jax.numpy as jnp

DONATED = (0, 2, 3)
"""The parameter and its averages give their memory to the updated ones."""


def function(param, grad, square_avg, acc_delta, lr, rho=0.9, eps=1e-6):
    """One step of Adadelta without weight decay; no loss, then what is updated."""
    square_avg = rho * square_avg + (1 - rho) * jnp.square(grad)
    delta = jnp.sqrt(acc_delta + eps) / jnp.sqrt(square_avg + eps) * grad
    acc_delta = rho * acc_delta + (1 - rho) * jnp.square(delta)
    return None, param - lr * delta, square_avg, acc_delta
