"""mse_loss(input, target) = (input - target)², its mean or its sum, with gradients for both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from pyext.backends import select, select_at_once
from pyext.ops import _checks, _samples
from pyext.ops._autograd import add, differentiable
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput

_NONE, _MEAN = _checks.REDUCTIONS["none"], _checks.REDUCTIONS["mean"]

_WIDE = (torch.float32, torch.float64)
"""Not of 16 bits: autocast leaves them as they are, and unscaled gradients do not underflow."""

_WITH_DATA = (Tensor, Parameter)
"""Not what stands for tensors while a program is exported, which may never run a backward."""


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Squared error, as :func:`torch.nn.functional.mse_loss`.

    Args:
        input: any shape and strides.
        target: a shape that broadcasts with ``input``'s; another shape than ``input``'s warns.
            The dtypes may differ, integers included, as long as they promote to float64, float32,
            bfloat16 or float16. Under autocast the half precisions are taken in float32.
        reduction: ``"none"`` (a tensor of the broadcast shape), ``"mean"`` or ``"sum"`` (0-d).
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    Returns:
        The loss, in the promoted dtype.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: the shapes do not broadcast, the devices differ, or ``backend`` is not
            available here.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError: an unknown ``reduction`` or ``backend``.

    Deviations from the namesake: no ``weight``, ``size_average`` or ``reduce``; a 0-d tensor on
    the CPU does not mix with CUDA tensors.
    """
    if (
        isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and (dtype := input.dtype) is target.dtype
        and dtype in _WIDE
        and not is_dynamo_compiling()
    ):
        # Nothing is to be promoted or cast; the raw ops refuse what else is wrong, other shapes
        # included, and a small call is spared what it would be asked twice.
        chosen = select_at_once(backend, input.device, "mse_loss")
        if chosen.namespace is not None:
            try:
                number = _checks.REDUCTIONS[reduction]
                return _at_once(chosen.raw, input, target, number)
            except Exception as refused:
                _checks.say_better(_check, input, target, reduction)
                if input.shape == target.shape or not isinstance(refused, RuntimeError):
                    raise
    number = _check(input, target, reduction)
    device, dtype = input.device, input.dtype
    if target.dtype != dtype:
        dtype = torch.promote_types(dtype, target.dtype)
    if dtype in (torch.bfloat16, torch.float16) and _checks.autocasts(device):
        dtype = torch.float32
    _checks.floating_dtype("mse_loss", "input", dtype)
    if input.shape != target.shape:
        _checks.broadcastable("mse_loss", input=input, target=target)
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    chosen = select(backend, device, "mse_loss")
    if input.dtype != dtype:  # a cast that changes nothing would cost a small call 2 %
        input = input.to(dtype)
    if target.dtype != dtype:
        target = target.to(dtype)
    if chosen.namespace is None:
        return eager(input, target, reduction)
    if dtype in _WIDE and not is_dynamo_compiling():
        return _at_once(chosen.raw, input, target, number)
    return _mse_loss(chosen.raw, input, target, number)


def _at_once(raw, input: torch.Tensor, target: torch.Tensor, number: int) -> torch.Tensor:
    """The loss in a dtype of ``_WIDE``, where ``torch.compile`` does not trace."""
    if (
        input.requires_grad
        and not target.requires_grad
        and number != _NONE
        and input.is_cpu
        and type(input) in _WITH_DATA
    ):  # one pass over memory instead of two
        everyday = _mse_loss.everyday(raw)
        if everyday is not None:
            return everyday(input, target, number)
    return _mse_loss.at_once(raw, input, target, number)


def _check(input: torch.Tensor, target: torch.Tensor, reduction: str) -> int:
    """Refuses what neither promotion nor broadcasting can help; the reduction's number."""
    _checks.tensor("mse_loss", "input", input)
    _checks.tensor("mse_loss", "target", target)
    number = _checks.reduction(reduction)
    _checks.same_device("mse_loss", input=input, target=target)
    return number


def eager(input: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """The reference. (``F.mse_loss`` of PyTorch 2.11 has no gradient for what it promotes.)"""
    if input.dtype != target.dtype:
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    return F.mse_loss(input, target, reduction=reduction)


def twice(error: torch.Tensor, reduction: int) -> torch.Tensor:
    """d loss / d error for a unit gradient: ``2 error``, divided by the count for the mean."""
    return error * (2 / max(error.numel(), 1) if reduction == _MEAN else 2)


def reduce(values: torch.Tensor, reduction: int) -> torch.Tensor:
    """``values``, or their sum where a reduction has made one number of them."""
    return values if reduction == _NONE else values.sum()


@differentiable
class _mse_loss:
    """d loss = Σ 2 (input - target) (d input - d target) [/ n]."""

    raw_op = "mse_loss_forward"
    everyday_op = "mse_loss_forward_backward"

    @staticmethod
    def everyday_forward(ctx, raw, input, target, reduction):
        """The gradient of ``input`` for an upstream gradient of 1 as well."""
        loss, ctx.gradient = raw.mse_loss_forward_backward(input, target, reduction)
        ctx.to_save, ctx.constants = (input, target), (reduction,)
        return loss

    @staticmethod
    def everyday_backward(ctx, raw, grad):
        """The gradient that is there; a second one of these (after ``retain_graph``) finds none."""
        gradient = vars(ctx).pop("gradient", None)  # at once: two threads may not both take it
        if gradient is None:
            return None
        ctx.saved_tensors  # noqa: B018 -- raises where the graph was freed or an input was changed
        # A fake tensor has no value; and a float is compared with an int by a slower way, 0.5 µs.
        is_one = type(grad) is Tensor and grad.item() == 1.0
        return gradient if is_one else gradient.mul_(grad), None, None

    @staticmethod
    def save(inputs, outputs):
        return inputs[:2], inputs[2:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        grad_input = _mse_loss_backward(raw, grad, *tensors, *constants)
        return grad_input if needs[0] else None, -grad_input if needs[1] else None, None

    everyday_formulas = backward

    @staticmethod
    def jvp(raw, tensors, constants, tangent_input, tangent_target, _):
        input, target = tensors
        (reduction,) = constants
        tangent = add(tangent_input, None if tangent_target is None else -tangent_target)
        return reduce(twice(input - target, reduction) * tangent, reduction)


@differentiable
class _mse_loss_backward:
    """grad_input = 2 (input - target) grad [/ n], itself a function of all three tensors."""

    raw_op = "mse_loss_backward"

    @staticmethod
    def save(inputs, outputs):
        return inputs[:3], inputs[3:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        upstream, input, target = tensors
        (reduction,) = constants
        grad_upstream = grad_input = None
        if needs[0]:
            grad_upstream = reduce(twice(input - target, reduction) * grad, reduction)
        if needs[1] or needs[2]:
            grad_input = twice(grad, reduction) * upstream
        return (
            grad_upstream,
            grad_input if needs[1] else None,
            -grad_input if needs[2] else None,
            None,
        )

    @staticmethod
    def jvp(raw, tensors, constants, tangent_grad, tangent_input, tangent_target, _):
        grad, input, target = tensors
        (reduction,) = constants
        tangent_error = add(tangent_input, None if tangent_target is None else -tangent_target)
        return add(
            None if tangent_grad is None else twice(input - target, reduction) * tangent_grad,
            None if tangent_error is None else twice(tangent_error, reduction) * grad,
        )


def _fake_forward(input, target, reduction):
    """The loss without data; other shapes and devices are refused as by a kernel."""
    _fit("mse_loss_forward", input, target)
    return input.new_empty(input.shape if reduction == _NONE else ())


def _fake_backward(grad, input, target, reduction):
    """The gradient without data."""
    _fit("mse_loss_backward", input, target)
    return input.new_empty(input.shape)


def _fake_forward_backward(input, target, reduction):
    """The loss and the gradient without data."""
    _fit("mse_loss_forward_backward", input, target)
    return input.new_empty(()), input.new_empty(input.shape)


def _fit(op: str, input: torch.Tensor, target: torch.Tensor) -> None:
    _checks.same_device(op, input=input, target=target)
    _checks.shape(op, "target", target, input.shape, "as 'input' has")


def _raw_forward_samples(device, dtype) -> Iterator[tuple]:
    for sample in sample_inputs(device, dtype):
        input, target = sample.args
        if input.dtype == target.dtype and input.shape == target.shape:
            yield input, target, _checks.REDUCTIONS[sample.kwargs["reduction"]]


def _raw_forward_backward_samples(device, dtype) -> Iterator[tuple]:
    for args in _raw_forward_samples(device, dtype):
        if args[2] != _NONE:
            yield args


def _raw_backward_samples(device, dtype) -> Iterator[tuple]:
    for input, target, reduction in _raw_forward_samples(device, dtype):
        shape = input.shape if reduction == _NONE else ()
        yield _samples.normal(shape, device, dtype, seed=2), input, target, reduction


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Every layout and reduction; broadcasting, promotion and special values."""
    for reduction in _checks.REDUCTIONS:
        kwargs = {"reduction": reduction}
        pairs = zip(
            _samples.layouts(device, dtype, requires_grad),
            _samples.layouts(device, dtype, requires_grad, seed=1),
            strict=True,
        )
        for (name, input), (_, target) in pairs:
            yield SampleInput((input, target), kwargs, f"{name}_{reduction}")
        matrix = _samples.normal((5, 7), device, dtype).requires_grad_(requires_grad)
        transposed = _samples.STRIDES["transposed"]((5, 7), device, dtype, 1)
        yield SampleInput(
            (matrix, transposed.requires_grad_(requires_grad)), kwargs, f"mixed_strides_{reduction}"
        )
        row = _samples.normal((7,), device, dtype, seed=1).requires_grad_(requires_grad)
        yield SampleInput((matrix, row), kwargs, f"broadcast_{reduction}")
        yield SampleInput((row, matrix), kwargs, f"broadcast_input_{reduction}")
        double = _samples.normal((5, 7), device, torch.float64, 1).requires_grad_(requires_grad)
        yield SampleInput((matrix, double), kwargs, f"promoted_{reduction}")
        integers = _samples.normal((5, 7), device, torch.int64, seed=1)
        yield SampleInput((matrix, integers), kwargs, f"integer_target_{reduction}")
        special = _samples.special_values(device, dtype, 3).requires_grad_(requires_grad)
        yield SampleInput(
            (special, special.detach().flip(0)), kwargs, f"special_{reduction}", gradcheckable=False
        )


def error_inputs(device) -> Iterator[ErrorInput]:
    """What the namesake refuses, and the deviations."""
    x = torch.ones(3, device=device)
    yield ErrorInput((x, 3.0), TypeError, "'target' must be Tensor", name="number")
    yield ErrorInput(([1.0], x), TypeError, "'input' must be Tensor", name="list")
    yield ErrorInput((x, torch.ones(4, device=device)), RuntimeError, "broadcast", name="shapes")
    yield ErrorInput(
        (x, x), ValueError, "not a valid value", {"reduction": "max"}, name="reduction"
    )
    yield ErrorInput(
        (x, x), ValueError, "not a valid value", {"reduction": ["mean"]}, name="reduction_list"
    )
    yield ErrorInput((x.long(), x.long()), NotImplementedError, "not implemented for", name="int")
    yield ErrorInput((x.cfloat(), x), NotImplementedError, "not implemented for", name="complex")
    yield ErrorInput((x, x.to("meta")), RuntimeError, "same device", name="devices")
    yield ErrorInput((x.to_sparse(), x), NotImplementedError, "layout", name="sparse")


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """With a reduction: forward reads both operands, backward reads them and writes a gradient."""
    (n,) = shape
    items = {"forward": 2, "backward": 3, "both": 3}[direction] * n
    flops = {"forward": 3, "backward": 2, "both": 4}[direction] * n
    return Cost(bytes=items * itemsize, flops=flops, unit="elementwise")


def benchmark_inputs(shape, dtype, device, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random normal input, which requires grad, and target, which does not."""
    input, target = (
        torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(2)
    )
    return input.requires_grad_(), target


def by_hand(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of the mean without autograd, in one buffer."""
    error = input - target
    loss = error.square().mean()
    return loss, error.mul_(2 / error.numel())


OP = Op(
    name="mse_loss",
    function=mse_loss,
    eager=eager,
    raw_ops=(
        RawOp(
            "mse_loss_forward",
            _fake_forward,
            _raw_forward_samples,
        ),
        RawOp(
            "mse_loss_backward",
            _fake_backward,
            _raw_backward_samples,
        ),
    ),
    cpu_raw_ops=(
        RawOp(
            "mse_loss_forward_backward",
            _fake_forward_backward,
            _raw_forward_backward_samples,
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda input, target, reduction="mean": max(
        torch.broadcast_shapes(input.shape, target.shape).numel(), 1
    ),
    shape_names=("n",),
    benchmark_shapes={
        "cpu": {
            "quick": ((2**12,), (2**24,)),
            "full": ((2**12,), (2**16,), (2**20,), (2**24,)),
        },
        "cuda": {
            "quick": ((2**12,), (2**24,)),
            "full": ((2**12,), (2**16,), (2**20,), (2**24,), (2**28,)),
        },
    },
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    by_hand=by_hand,
)
