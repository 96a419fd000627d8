"""The two-layer network in Triton: two products, five with the backward.

    forward   hidden = relu(x @ w1 + b1)                bias and ReLU in the product's epilogue
              out    = hidden @ w2 + b2
    backward  d       = (grad_out @ w2^T [+ grad_hidden]), 0 where hidden <= 0    in its epilogue
              grad_w1 = x^T @ d          grad_b1 = sum_N d           one product: d is read anyway
              grad_w2 = hidden^T @ g     grad_b2 = sum_N g           g = grad_out
              grad_x  = d @ w1^T

Bytes: each product reads its operands and writes its result once; nothing else moves.
Launch: one kernel per product, see _matmul.py. x (N, I), hidden and d (N, H), out (N, O).
"""

from ._matmul import matmul
from ._registration import expect, expect_floating, raw_op


def check_network(x, w1, w2, b1=None, b2=None):
    """Refuse parameters that do not fit x (N, I) -> (N, H) -> (N, O). Raises RuntimeError."""
    expect_floating("x", x)
    expect("x", x, x.shape[:2], like=x)
    expect("w1", w1, (x.size(1), w1.size(1)), like=x)
    expect("w2", w2, (w1.size(1), w2.size(1)), like=x)
    if b1 is not None:
        expect("b1", b1, (w1.size(1),), like=x)
    if b2 is not None:
        expect("b2", b2, (w2.size(1),), like=x)


def hidden_layer(x, w1, b1=None):
    """relu(x @ w1 + b1), the half that every two-layer op begins with."""
    hidden = x.new_empty((x.size(0), w1.size(1)))
    matmul(x, w1, hidden, bias=b1, relu=True)
    return hidden


def weight_grad(inputs, grad, weight, need_weight, need_bias):
    """(inputs^T @ grad, grad's column sums), (0,)-shaped where not needed.

    The first lies by columns where `weight` does, as an nn.Linear's weight.t(): autograd would copy
    it otherwise. The column sums come with a product by rows, else with that of a row of ones.
    """
    grad_weight = grad.new_empty(0)
    grad_bias = grad.new_empty(grad.size(1) if need_bias else 0)
    sums = grad_bias if need_bias else None
    if need_weight and weight.stride(0) == 1 and weight.stride(1) != 1:
        grad_weight = grad.new_empty((grad.size(1), inputs.size(1))).t()
        if grad_weight.numel():
            matmul(grad.t(), inputs, grad_weight.t())
    elif need_weight:
        grad_weight = grad.new_empty((inputs.size(1), grad.size(1)))
        if grad_weight.numel():
            matmul(inputs.t(), grad, grad_weight, column_sums=sums)
            sums = None
    if sums is not None:
        ones = grad.new_ones(1).expand(1, grad.size(0))
        matmul(ones, grad, sums.unsqueeze(0))
    return grad_weight, grad_bias


@raw_op("(Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2) -> (Tensor, Tensor)")
def two_layer_forward(x, w1, w2, b1, b2):
    check_network(x, w1, w2, b1, b2)
    hidden = hidden_layer(x, w1, b1)
    out = x.new_empty((x.size(0), w2.size(1)))
    matmul(hidden, w2, out, bias=b2)
    return out, hidden


@raw_op(
    "(Tensor grad_out, Tensor? grad_hidden, Tensor x, Tensor w1, Tensor w2, Tensor hidden, "
    "bool need_x, bool need_w1, bool need_w2, bool need_b1, bool need_b2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def two_layer_backward(
    grad_out, grad_hidden, x, w1, w2, hidden, need_x, need_w1, need_w2, need_b1, need_b2
):
    check_network(x, w1, w2)
    expect("hidden", hidden, (x.size(0), w1.size(1)), like=x)
    expect("grad_out", grad_out, (x.size(0), w2.size(1)), like=x)
    if grad_hidden is not None:
        expect("grad_hidden", grad_hidden, hidden.shape, like=x)
    grad_x, grad_w1, grad_b1 = (x.new_empty(0) for _ in range(3))
    if need_x or need_w1 or need_b1:
        d = x.new_empty(hidden.shape)
        matmul(grad_out, w2.t(), d, add=grad_hidden, mask=hidden)
        grad_w1, grad_b1 = weight_grad(x, d, w1, need_w1, need_b1)
        if need_x:
            grad_x = x.new_empty(x.shape)
            matmul(d, w1.t(), grad_x)
    grad_w2, grad_b2 = weight_grad(hidden, grad_out, w2, need_w2, need_b2)
    return grad_x, grad_w1, grad_w2, grad_b1, grad_b2
