"""two_layer_sgd_step in JAX."""

import jax

from pyext.lab.jax_ops import two_layer_mse_loss

DONATED = (2, 3)
"""w1 and w2 give their memory to the updated weights."""


def function(x, y, w1, w2, lr):
    """One step of gradient descent; returns the loss before it and the updated weights."""

    def loss(w1, w2):
        return two_layer_mse_loss.function(x, y, w1, w2)

    value, (grad_w1, grad_w2) = jax.value_and_grad(loss, argnums=(0, 1))(w1, w2)
    return value, w1 - lr * grad_w1, w2 - lr * grad_w2
