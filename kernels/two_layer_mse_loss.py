"""The two-layer network and its squared-error loss in Triton: two products, no pass of their own.

    hidden = relu(x @ w1 + b1)
    diff   = hidden @ w2 + b2 - y          the loss's gradient up to 2 / n
    loss   = sum(diff^2) [/ n], or diff^2 for none

Bytes: the two products' operands and results, plus y; the network's output is never stored.
Launch: one kernel per product; y, diff and each tile's partial loss are in the second one's
epilogue. More than one tile: a last kernel adds the partial losses up. See _matmul.py.
"""

from ._matmul import matmul
from ._reduction import NONE, divisor, empty_loss
from ._registration import expect, raw_op
from .two_layer import check_network, hidden_layer


@raw_op(
    "(Tensor x, Tensor y, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, int reduction) "
    "-> (Tensor, Tensor, Tensor)"
)
def two_layer_mse_loss_forward(x, y, w1, w2, b1, b2, reduction):
    check_network(x, w1, w2, b1, b2)
    expect("y", y, (x.size(0), w2.size(1)), like=x)
    count = divisor(reduction, y.numel())
    hidden = hidden_layer(x, w1, b1)
    diff = x.new_empty(y.shape)
    if reduction == NONE:
        loss = x.new_empty(y.shape)
        matmul(hidden, w2, diff, bias=b2, subtract=y, squared=loss)
    elif y.numel():
        loss = x.new_empty(())
        matmul(hidden, w2, diff, bias=b2, subtract=y, loss=loss, count=count)
    else:
        loss = empty_loss(x, reduction)
    return loss, hidden, diff
