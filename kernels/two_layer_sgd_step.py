"""One training step of the two-layer network in Triton: five products, updates in their epilogues.

    hidden = relu(x @ w1)
    diff   = hidden @ w2 - y               loss = sum(diff^2), before the update
    d      = diff @ w2^T, 0 where hidden <= 0
    w1    -= 2 lr x^T @ d
    w2    -= 2 lr hidden^T @ diff          after d has read w2

The gradients are twice d and diff; the 2 is exact, so it joins lr.
Bytes: each product's operands and result once; the weights' gradients are never stored.
Launch: one kernel per product, one more for the loss if it has more than one tile. See _matmul.py.
"""

from ._matmul import matmul
from ._registration import expect, raw_op
from .two_layer import check_network, hidden_layer


def sgd_step(x, y, w1, w2, lr):
    """One step's launches; the loss before it."""
    check_network(x, w1, w2)
    expect("y", y, (x.size(0), w2.size(1)), like=x)
    hidden = hidden_layer(x, w1)
    diff = x.new_empty(y.shape)
    loss = x.new_empty(()) if y.numel() else x.new_zeros(())
    matmul(hidden, w2, diff, subtract=y, loss=loss)
    d = x.new_empty(hidden.shape)
    matmul(diff, w2.t(), d, mask=hidden)
    matmul(x.t(), d, w1, lr=2 * lr)
    matmul(hidden.t(), diff, w2, lr=2 * lr)
    return loss


# Below what it calls: while an op is registered, PyTorch looks for its kernels.
@raw_op("(Tensor x, Tensor y, Tensor(a!) w1, Tensor(b!) w2, float lr) -> Tensor")
def two_layer_sgd_step(x, y, w1, w2, lr):
    return sgd_step(x, y, w1, w2, lr)
