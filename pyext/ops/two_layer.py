"""two_layer(x, w1, w2, b1, b2) = relu(x @ w1 + b1) @ w2 + b2: a network with one hidden layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyext.backends import select, select_at_once
from pyext.ops import _checks, _samples, _two_layer
from pyext.ops._autograd import differentiable
from pyext.registry import ErrorInput, Op, RawOp, SampleInput


def two_layer(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``relu(x @ w1 + b1) @ w2 + b2``, any strides, e.g. an ``nn.Linear``'s ``weight.t()``.

    Args:
        x: (..., in).
        w1: (in, hidden).
        w2: (hidden, out).
        b1: (hidden,) or None.
        b2: (out,) or None.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    All are of one dtype, float64, float32, bfloat16 or float16; sums are kept in at least float32
    and TF32 is never used by ``extension`` and ``triton``. Under autocast all but float64 are cast
    to autocast's dtype, as PyTorch does for ``linear``.

    Returns:
        (..., out), in the operands' dtype.

    Raises:
        TypeError: an operand is not a tensor.
        RuntimeError: shapes, devices or dtypes do not agree, or ``backend`` is not available here.
        NotImplementedError: a dtype (integers, for example) or layout that is not accepted.
        ValueError: an unknown ``backend``.
    """
    if _two_layer.is_usual(x):
        try:
            chosen = select_at_once(backend, x.device, "two_layer")
            if chosen.namespace is not None:
                if (
                    b1 is None
                    and b2 is None
                    and (w1.requires_grad or w2.requires_grad or x.requires_grad)
                    and (everyday := _two_layer_forward.everyday(chosen.raw)) is not None
                ):
                    return everyday(x, w1, w2)
                return _two_layer_forward.at_once(chosen.raw, x, w1, w2, b1, b2)[0]
        except Exception:
            _checks.say_better(_two_layer.prepare, "two_layer", x, w1, w2, b1, b2)
            raise
    rows, w1, w2, b1, b2, _ = _two_layer.prepare("two_layer", x, w1, w2, b1, b2)
    chosen = select(backend, rows.device, "two_layer")
    if chosen.namespace is None:
        out = eager(rows, w1, w2, b1, b2)
    else:
        out, _ = _two_layer_forward(chosen.raw, rows, w1, w2, b1, b2)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], w2.shape[1])


def eager(x, w1, w2, b1=None, b2=None) -> torch.Tensor:
    """The reference."""
    hidden = x @ w1 if b1 is None else x @ w1 + b1
    hidden = torch.relu(hidden)
    return hidden @ w2 if b2 is None else hidden @ w2 + b2


_OF_WEIGHTS = "two_layer_backward_weights"


@differentiable
class _two_layer_forward:
    """Returns hidden beside out, so that the second derivative can flow through what was saved.

    The everyday way, without biases, returns out alone, and a second derivative computes hidden
    again. One output and two inputs fewer, and a raw op of five operands and two results for a
    backward that needs no more, are 12 of 199 µs, forward and backward, at 64 x 1000 x 100 x 10.
    """

    raw_op = "two_layer_forward"
    everyday_op = raw_op

    @staticmethod
    def everyday_forward(ctx, raw, x, w1, w2):
        out, hidden = raw.two_layer_forward(x, w1, w2, None, None)
        ctx.to_save = x, w1, w2, hidden
        return out

    @staticmethod
    def everyday_backward(ctx, raw, grad_out):
        x, w1, w2, hidden = ctx.saved_tensors
        need_x, need_w1, need_w2 = ctx.needs_input_grad
        # The extension has that raw op for CPU tensors alone, and the others have none.
        if need_w1 and need_w2 and not need_x and x.is_cpu and hasattr(raw, _OF_WEIGHTS):
            return None, *raw.two_layer_backward_weights(grad_out, x, w1, w2, hidden)
        needs = need_x, need_w1, need_w2, False, False
        return _two_layer.gradients(raw, grad_out, None, x, w1, w2, hidden, needs)[:3]

    @staticmethod
    def everyday_formulas(raw, tensors, constants, needs, grad_out):
        x, w1, w2, hidden = tensors
        need_x, need_w1, need_w2 = needs
        if need_w2 and (need_x or need_w1) and torch.is_grad_enabled():
            # The gradient of w2 is a function of hidden, and the saved one has no graph.
            # It gets one to what needed a gradient in the forward pass.
            x_then, w1_then = x if need_x else x.detach(), w1 if need_w1 else w1.detach()
            _, hidden = _two_layer_forward(raw, x_then, w1_then, w2.detach(), None, None)
        needs = need_x, need_w1, need_w2, False, False
        return _two_layer.gradients(raw, grad_out, None, x, w1, w2, hidden, needs)[:3]

    @staticmethod
    def save(inputs, outputs):
        return (*inputs[:3], outputs[1]), ()

    @staticmethod
    def backward(raw, tensors, constants, needs, grad_out, grad_hidden):
        x, w1, w2, hidden = tensors
        if grad_out is None:
            grad_out = hidden.new_zeros((x.shape[0], w2.shape[1]))
        return _two_layer.gradients(raw, grad_out, grad_hidden, x, w1, w2, hidden, needs)

    @staticmethod
    def jvp(raw, tensors, constants, *tangents):
        x, w1, w2, hidden = tensors
        return _two_layer.tangents(x, w1, w2, hidden, *tangents)


def _raw_forward_samples(device, dtype) -> Iterator[tuple]:
    for _, operands, _ in _two_layer.sample_operands(device, dtype):
        yield tuple(operands[name] for name in ("x", "w1", "w2", "b1", "b2"))


def _raw_backward_samples(device, dtype) -> Iterator[tuple]:
    for name, operands, _ in _two_layer.sample_operands(device, dtype):
        x, w1, w2 = (operands[each] for each in ("x", "w1", "w2"))
        hidden = torch.relu(_samples.normal((x.shape[0], w1.shape[1]), device, dtype, 7))
        grad_out = _samples.normal((x.shape[0], w2.shape[1]), device, dtype, 8)
        grad_hidden = None if name == "small" else _samples.normal(hidden.shape, device, dtype, 9)
        needs = (name != "no_bias", True, True, name != "no_bias", name != "no_bias")
        yield grad_out, grad_hidden, x, w1, w2, hidden, *needs


def _raw_backward_weights_samples(device, dtype) -> Iterator[tuple]:
    for grad_out, _, x, w1, w2, hidden, *_ in _raw_backward_samples(device, dtype):
        yield grad_out, x, w1, w2, hidden


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Every extent odd, one and empty; every kind of strides; with and without biases."""
    names = ("x", "w1", "w2", "b1", "b2")
    for name, operands, smooth in _two_layer.sample_operands(device, dtype, requires_grad):
        args = tuple(operands[each] for each in names)
        yield SampleInput(args, name=name, gradcheckable=smooth)
    _, operands, _ = next(_two_layer.sample_operands(device, dtype, requires_grad))
    _, w1, w2, b1, b2 = (operands[name] for name in names)
    for name, shape in {"vector": (4,), "batched": (2, 3, 4)}.items():
        x = _samples.normal(shape, device, dtype, 1).requires_grad_(requires_grad)
        yield SampleInput((x, w1, w2, b1, b2), name=name)


def error_inputs(device) -> Iterator[ErrorInput]:
    """What does not agree in shape, dtype or device."""
    yield from _two_layer.common_error_inputs(device, ("x", "w1", "w2", "b1", "b2"))


def benchmark_inputs(shape, dtype, device, generator) -> tuple:
    """x, w1, w2; the weights require grad."""
    operands = _two_layer.benchmark_operands(shape, dtype, device, generator)
    return tuple(operands[name] for name in ("x", "w1", "w2"))


def by_hand(x, w1, w2, grad) -> tuple:
    """Forward and backward without autograd."""
    hidden = x.mm(w1).relu_()
    out = hidden.mm(w2)
    return out, *_two_layer.by_hand_gradients(x, w1, w2, hidden, grad)


OP = Op(
    name="two_layer",
    function=two_layer,
    eager=eager,
    raw_ops=(
        RawOp("two_layer_forward", _two_layer.fake_two_layer_forward, _raw_forward_samples),
        RawOp("two_layer_backward", _two_layer.fake_two_layer_backward, _raw_backward_samples),
    ),
    cpu_raw_ops=(
        RawOp(
            _OF_WEIGHTS, _two_layer.fake_two_layer_backward_weights, _raw_backward_weights_samples
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda x, w1, w2, *_: _two_layer.reduction_length(x, w1, w2),
    shape_names=_two_layer.NAMES,
    benchmark_shapes=_two_layer.BENCHMARK_SHAPES,
    benchmark_inputs=benchmark_inputs,
    cost=_two_layer.cost,
    by_hand=by_hand,
)
