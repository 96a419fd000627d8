"""two_layer_mse_loss(x, y, …): the two-layer network and its squared error as one op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyext.backends import select, select_at_once
from pyext.ops import _checks, _two_layer, mse_loss
from pyext.ops import two_layer as _network
from pyext.ops._autograd import add, differentiable
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput


def two_layer_mse_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    reduction: str = "sum",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``mse_loss(two_layer(x, w1, w2, b1, b2), y, reduction)`` without storing the prediction.

    Args:
        x: (..., in).
        y: (..., out), the target; the shape is exact, nothing is broadcast.
        w1, w2, b1, b2: as for :func:`pyext.functional.two_layer`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    Dtypes as for :func:`pyext.functional.two_layer`. Under autocast the network runs in autocast's
    dtype and the loss in float32 (all in float64 where all is float64): it is then the two ops one
    after the other, since a sum of squares in float16 overflows beyond 65504, and so does a scaled
    gradient.

    Returns:
        The loss: 0-d, or (..., out) for ``"none"``. Gradients flow to all tensors, ``y`` included.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as :func:`pyext.functional.two_layer`.
        ValueError: an unknown ``reduction`` or ``backend``.
    """
    number = _checks.reduction(reduction)
    given = x, w1, w2, b1, b2
    if _two_layer.is_usual(x):
        try:
            chosen = select_at_once(backend, x.device, "two_layer_mse_loss")
            if chosen.namespace is not None:
                return _two_layer_mse_loss.at_once(chosen.raw, x, y, w1, w2, b1, b2, number)[0]
        except Exception:
            _checks.say_better(_prepare, *given, y)
            raise
    prepared = _prepare(*given, y)
    shape = y.shape
    if prepared[0].dtype != torch.float64 and _checks.autocasts(y.device):
        prediction = _network.two_layer(*given, backend=backend)
        return mse_loss.mse_loss(prediction, y, reduction, backend=backend)
    x, w1, w2, b1, b2, y = prepared
    chosen = select(backend, x.device, "two_layer_mse_loss")
    if chosen.namespace is None:
        loss = eager(x, y, w1, w2, b1, b2, reduction)
    else:
        loss, _, _ = _two_layer_mse_loss(chosen.raw, x, y, w1, w2, b1, b2, number)
    return loss.reshape(shape) if reduction == "none" and len(shape) != 2 else loss


def _prepare(x, w1, w2, b1, b2, y) -> tuple:
    _checks.tensor("two_layer_mse_loss", "y", y)
    return _two_layer.prepare("two_layer_mse_loss", x, w1, w2, b1, b2, y)


def eager(x, y, w1, w2, b1=None, b2=None, reduction="sum") -> torch.Tensor:
    """The reference."""
    return F.mse_loss(_network.eager(x, w1, w2, b1, b2), y, reduction=reduction)


@differentiable
class _two_layer_mse_loss:
    """Returns hidden and error = prediction - y beside the loss, as ``two_layer`` does hidden."""

    raw_op = "two_layer_mse_loss_forward"

    @staticmethod
    def save(inputs, outputs):
        x, _, w1, w2, *_ = inputs
        return (x, w1, w2, *outputs[1:]), inputs[-1:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad_loss, grad_hidden, grad_error):
        x, w1, w2, hidden, error = tensors
        (reduction,) = constants
        from_loss = None if grad_loss is None else mse_loss.twice(error, reduction) * grad_loss
        grad_out = add(from_loss, grad_error)
        if grad_out is None:
            grad_out = torch.zeros_like(error)
        need_x, need_y, *need_weights_and_biases, _ = needs
        grad_x, *grads = _two_layer.gradients(
            raw, grad_out, grad_hidden, x, w1, w2, hidden, (need_x, *need_weights_and_biases)
        )
        return grad_x, -grad_out if need_y else None, *grads, None

    @staticmethod
    def jvp(raw, tensors, constants, t_x, t_y, t_w1, t_w2, t_b1, t_b2, _):
        x, w1, w2, hidden, error = tensors
        (reduction,) = constants
        t_out, t_hidden = _two_layer.tangents(x, w1, w2, hidden, t_x, t_w1, t_w2, t_b1, t_b2)
        t_error = add(t_out, None if t_y is None else -t_y)
        t_loss = mse_loss.reduce(mse_loss.twice(error, reduction) * t_error, reduction)
        return t_loss, t_hidden, t_error


def _fake_forward(x, y, w1, w2, b1, b2, reduction):
    _two_layer.check("two_layer_mse_loss_forward", x, w1, w2, b1, b2, y)
    _two_layer.one_floating_dtype("two_layer_mse_loss_forward", x, w1, w2, b1, b2, y)
    error = x.new_empty(y.shape)
    hidden = x.new_empty((x.shape[0], w1.shape[1]))
    return x.new_empty(y.shape if reduction == 0 else ()), hidden, error


def _raw_forward_samples(device, dtype) -> Iterator[tuple]:
    for number in _checks.REDUCTIONS.values():
        for _, operands, _ in _two_layer.sample_operands(device, dtype):
            yield *(operands[name] for name in ("x", "y", "w1", "w2", "b1", "b2")), number


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """As ``two_layer``, with each reduction; leading dimensions of x and y."""
    names = ("x", "y", "w1", "w2", "b1", "b2")
    for reduction in _checks.REDUCTIONS:
        kwargs = {"reduction": reduction}
        for name, operands, smooth in _two_layer.sample_operands(device, dtype, requires_grad):
            args = tuple(operands[each] for each in names)
            # The mean of nothing is NaN, and so are its finite differences.
            smooth = smooth and (operands["y"].numel() > 0 or reduction != "mean")
            yield SampleInput(args, kwargs, f"{name}_{reduction}", gradcheckable=smooth)
        _, operands, _ = next(_two_layer.sample_operands(device, dtype))
        batched = tuple(
            value.reshape(1, 5, -1) if name in "xy" else value for name, value in operands.items()
        )
        args = tuple(each.detach().requires_grad_(requires_grad) for each in batched)
        yield SampleInput(args, kwargs, f"batched_{reduction}")


def error_inputs(device) -> Iterator[ErrorInput]:
    """What does not agree in shape, dtype or device, and an unknown reduction."""
    order = ("x", "y", "w1", "w2", "b1", "b2")
    yield from _two_layer.common_error_inputs(device, order)
    args = tuple(torch.ones(each, device=device) for each in ((5, 4), (5, 2), (4, 3), (3, 2)))
    yield ErrorInput(args, ValueError, "not a valid value", {"reduction": 1}, name="reduction")


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """As ``two_layer``, with the target read beside."""
    return _two_layer.cost(direction, shape, itemsize, y=True)


def benchmark_inputs(shape, dtype, device, generator) -> tuple:
    """x, y, w1, w2; the weights require grad."""
    operands = _two_layer.benchmark_operands(shape, dtype, device, generator)
    return tuple(operands[name] for name in ("x", "y", "w1", "w2"))


def by_hand(x, y, w1, w2) -> tuple:
    """Loss (the sum) and gradients of the weights without autograd."""
    hidden = x.mm(w1).relu_()
    error = hidden.mm(w2).sub_(y)
    loss = error.square().sum()
    return loss, *_two_layer.by_hand_gradients(x, w1, w2, hidden, error.mul_(2))


OP = Op(
    name="two_layer_mse_loss",
    function=two_layer_mse_loss,
    eager=eager,
    raw_ops=(RawOp("two_layer_mse_loss_forward", _fake_forward, _raw_forward_samples),),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda x, y, w1, w2, *_, **__: (
        _two_layer.reduction_length(x, w1, w2) + y.numel()
    ),
    shape_names=_two_layer.NAMES,
    benchmark_shapes=_two_layer.BENCHMARK_SHAPES,
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    by_hand=by_hand,
)
