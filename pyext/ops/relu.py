"""relu(x) = max(x, 0), elementwise: the smallest op, and the pattern that the others follow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from pyext.backends import select, select_at_once
from pyext.ops import _checks, _samples
from pyext.ops._autograd import differentiable
from pyext.registry import FLOATING_DTYPES, Cost, ErrorInput, Op, RawOp, SampleInput

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = FLOATING_DTYPES + INTEGER_DTYPES

MASKED_BYTES = 2**24
"""From this size on, one bit for each element goes to backward instead of the output: on a CPU that
has left the caches by then. (On a GPU with a larger L2 the least size is not measured.)"""


def relu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``max(x, 0)`` for each element, as :func:`torch.nn.functional.relu`.

    NaN stays NaN, ``-0.0`` stays ``-0.0``; the derivative is 1 above 0 and 0 at 0 and below.
    Autocast changes nothing.

    Args:
        x: any shape and strides; float64, float32, bfloat16, float16 or uint8, int8 … int64.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    Returns:
        A new tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not a tensor.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError, RuntimeError: ``backend`` is unknown, or not available here.

    Deviations from the namesake: no ``inplace``; sparse layouts and the dtypes uint16, uint32 and
    uint64 are refused. A contiguous result of 16 MiB or more may be changed in place before
    backward, which does not need it.
    """
    compiling = is_compiling()
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES or compiling:
        _check(x)
    chosen = (select if compiling else select_at_once)(backend, x.device, "relu")
    if chosen.namespace is None:
        _check(x)
        return eager(x)
    try:
        if (
            not compiling  # which would hold on to the answer about a size
            and x.nbytes >= MASKED_BYTES
            and x.requires_grad
            and x.is_contiguous()
            and torch.is_grad_enabled()
        ):
            return _relu_with_mask(chosen.raw, x)[0]
        return _relu(chosen.raw, x)
    except Exception:  # another layout, say: asked for before, 1 of a small call's 35 µs
        _checks.say_better(_check, x)
        raise


def _check(x: torch.Tensor) -> None:
    _checks.tensor("relu", "x", x)
    if x.dtype not in _DTYPES:
        accepted = ", ".join(map(str, _DTYPES))
        raise NotImplementedError(f"relu(): not implemented for {x.dtype}; accepted are {accepted}")


def eager(x: torch.Tensor) -> torch.Tensor:
    """The reference."""
    return F.relu(x)


@differentiable
class _relu:
    """d relu(x) = dx where relu(x) > 0, else 0: the output is all that the derivative needs."""

    raw_op = "relu_forward"

    @staticmethod
    def save(inputs, outputs):
        return outputs, ()

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return (_relu_backward(raw, grad, *tensors),)

    @staticmethod
    def jvp(raw, tensors, constants, tangent):
        return _relu_backward(raw, tangent, *tensors)


@differentiable
class _relu_backward:
    """Linear in ``grad`` and constant in ``out``, so that it is its own derivative."""

    raw_op = "relu_backward"

    @staticmethod
    def save(inputs, outputs):
        return inputs[1:], ()

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return (_relu_backward(raw, grad, *tensors) if needs[0] else None), None

    @staticmethod
    def jvp(raw, tensors, constants, tangent_grad, tangent_out):
        if tangent_grad is None:
            return torch.zeros_like(tensors[0])
        return _relu_backward(raw, tangent_grad, *tensors)


@differentiable
class _relu_with_mask:
    """The same, but what the derivative needs is a mask: 2 n items and n / 8 bytes to move each
    way, where ``_relu`` moves 2 n and 3 n."""

    raw_op = "relu_forward_with_mask"

    @staticmethod
    def save(inputs, outputs):
        return outputs[1:], ()

    @staticmethod
    def backward(raw, tensors, constants, needs, grad, _):
        return (_relu_backward_with_mask(raw, grad, *tensors),)

    @staticmethod
    def jvp(raw, tensors, constants, tangent):
        return _relu_backward_with_mask(raw, tangent, *tensors), None


@differentiable
class _relu_backward_with_mask:
    """Linear in ``grad``, so that it is its own derivative."""

    raw_op = "relu_backward_with_mask"

    @staticmethod
    def save(inputs, outputs):
        return inputs[1:], ()

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return _relu_backward_with_mask(raw, grad, *tensors), None

    @staticmethod
    def jvp(raw, tensors, constants, tangent, _):
        return _relu_backward_with_mask(raw, tangent, *tensors)


def _raw_forward_samples(device, dtype) -> Iterator[tuple]:
    for sample in sample_inputs(device, dtype):
        yield (sample.args[0].detach(),)


def _raw_backward_samples(device, dtype) -> Iterator[tuple]:
    for (out,) in _raw_forward_samples(device, dtype):
        yield _samples.normal(out.shape, device, dtype, seed=1), out


def _raw_masked_backward_samples(device, dtype) -> Iterator[tuple]:
    for (out,) in _raw_forward_samples(device, dtype):
        yield _samples.normal(out.shape, device, dtype, seed=1), mask_of(out)


def mask_of(x: torch.Tensor) -> torch.Tensor:
    """Bit i % 8 of byte i // 8: whether a gradient passes element i of ``x`` (not ``x <= 0``)."""
    bits = F.pad(~(x <= 0).flatten(), (0, -x.numel() % 8)).view(-1, 8)
    return (bits * 2 ** torch.arange(8, device=x.device)).sum(1).to(torch.uint8)


def _masked_like(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Every layout, with values on both sides of the kink; then the kink itself, NaN and ±inf."""
    for name, x in _samples.layouts(device, dtype, requires_grad):
        yield SampleInput((x,), name=name)
    if dtype.is_floating_point:
        for repeat in (1, 9):  # nine times seven values also reach every lane of a vector
            x = _samples.special_values(device, dtype, repeat).requires_grad_(requires_grad)
            yield SampleInput((x,), name=f"special_values_{repeat}", gradcheckable=False)
    else:
        x = torch.arange(-5, 6, device=device).to(dtype)
        yield SampleInput((x,), name="integers", gradcheckable=False)


def error_inputs(device) -> Iterator[ErrorInput]:
    """What ``torch.relu`` refuses, and the deviations."""
    yield ErrorInput(([1.0],), TypeError, "must be Tensor, not list", name="list")
    for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn):
        x = torch.zeros(3, device=device).to(dtype)
        yield ErrorInput((x,), NotImplementedError, "not implemented for", name=str(dtype))
    sparse = torch.zeros(3, 3, device=device).to_sparse()
    yield ErrorInput((sparse,), NotImplementedError, "layout", name="sparse")


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Forward reads x and writes out; backward reads grad and which elements were above 0 (one bit
    each is enough), and writes a gradient."""
    (n,) = shape
    bitmask = (n + 7) // 8
    forward, backward = 2 * n * itemsize, 2 * n * itemsize + bitmask
    moved = {"forward": forward, "backward": backward, "both": forward + backward + bitmask}
    comparisons = {"forward": 1, "backward": 1, "both": 2}[direction]
    return Cost(bytes=moved[direction], flops=comparisons * n, unit="elementwise")


def benchmark_inputs(shape, dtype, device, generator) -> tuple[torch.Tensor]:
    """Random normal ``x`` of ``shape`` that requires grad."""
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return (x.requires_grad_(),)


def by_hand(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward without autograd."""
    out = torch.relu(x)
    return out, torch.ops.aten.threshold_backward(grad, out, 0)


OP = Op(
    name="relu",
    function=relu,
    eager=eager,
    raw_ops=(
        RawOp("relu_forward", lambda x: torch.empty_like(x), _raw_forward_samples),
        RawOp("relu_backward", lambda grad, out: torch.empty_like(out), _raw_backward_samples),
        RawOp("relu_forward_with_mask", _masked_like, _raw_forward_samples),
        RawOp(
            "relu_backward_with_mask",
            lambda grad, mask: grad.new_empty(grad.shape),
            _raw_masked_backward_samples,
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda x: 1,
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
