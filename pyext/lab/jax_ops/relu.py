"""relu in JAX."""

import jax


def function(x):
    """max(x, 0); ``jax.nn.relu``'s derivative at 0 is 0, as PyTorch's."""
    return jax.nn.relu(x)
