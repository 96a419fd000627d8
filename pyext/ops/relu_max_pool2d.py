"""relu_max_pool2d(x) = max(x, 0), and of that the maximum over windows, in one pass each way.

Instead of ReLU's output, one byte for each window goes to backward: where in it the maximum was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from pyext.backends import select
from pyext.ops import _checks, _samples
from pyext.ops._autograd import differentiable
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput

_NAME = "relu_max_pool2d"
MOST_ELEMENTS = 255
"""Of a window: a position in it and "nowhere" (255, the maximum is not above 0) share a byte."""


def relu_max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``max_pool2d(relu(input))`` of :mod:`torch.nn.functional`, in one pass over memory.

    The gradient goes to each window's first maximum if that is above 0, and to nobody at 0. NaN
    wins over every number, the last one in a window over the others. Autocast changes nothing.

    Args:
        input: (N, C, H, W), where N may be 0, or (C, H, W); any strides; float64, float32, bfloat16
            or float16.
        kernel_size: the window's height and width, or one number for both; at most 255 elements.
        stride: from one window to the next, likewise; None: the window's size.
        padding: on both sides, likewise; at most half of the window. What it adds is never a
            maximum.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    Returns:
        (N, C, H', W') or (C, H', W') in ``input``'s dtype, contiguous whatever ``input``'s strides
        are, with H' = ⌊(H + 2 padding - kernel) / stride⌋ + 1 and likewise W'.

    Raises:
        TypeError: ``input`` is not a tensor, or a size neither an integer nor a pair of them.
        NotImplementedError: a dtype or layout that is not accepted.
        RuntimeError: another shape than these, a window, stride or padding out of range, windows
            that do not fit into the input; or ``backend`` is not available here.
        ValueError: ``backend`` is unknown.

    Deviations from the namesakes: no ``dilation``, ``ceil_mode``, ``return_indices`` or
    ``inplace``; integer dtypes and windows of more than 255 elements are refused; the result of a
    channels-last input is contiguous instead of channels-last.
    """
    _checks.tensor(_NAME, "input", input)
    _checks.floating_dtype(_NAME, "input", input.dtype)
    kernel, stride, padding = _geometry(kernel_size, stride, padding)
    _check_geometry(input, kernel, stride, padding)
    chosen = select(backend, input.device, _NAME)
    if chosen.namespace is None:
        return eager(input, kernel, stride, padding).contiguous()
    sizes = (*kernel, *stride, *padding, *input.shape[-2:])
    return _relu_max_pool2d(chosen.raw, input, *sizes)[0]


def eager(input: torch.Tensor, kernel_size, stride=None, padding=0) -> torch.Tensor:
    """The reference."""
    return F.max_pool2d(F.relu(input), kernel_size, stride, padding)


def _pair(name: str, value: object) -> tuple[int, int]:
    """(height, width) from one integer or two."""
    each = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for number in each:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(
                f"{_NAME}(): argument {name!r} must be an int or a pair of them, "
                f"not {type(number).__name__}"
            )
    if len(each) not in (1, 2):
        raise RuntimeError(
            f"{_NAME}(): argument {name!r} must be one int or two, but has {len(each)}"
        )
    # int: kernels are compiled for the sizes, so torch.compile takes them for constants.
    return int(each[0]), int(each[-1])


def _geometry(kernel_size, stride=None, padding=0) -> tuple[tuple[int, int], ...]:
    """kernel, stride and padding as pairs."""
    kernel = _pair("kernel_size", kernel_size)
    stride = kernel if stride is None else _pair("stride", stride)
    return kernel, stride, _pair("padding", padding)


def _check_geometry(input, kernel, stride, padding) -> None:
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(
            f"{_NAME}(): argument 'input' must have shape (N, C, H, W) or (C, H, W), of which only "
            f"N may be 0, but has {tuple(input.shape)}"
        )
    if min(kernel) < 1 or kernel[0] * kernel[1] > MOST_ELEMENTS:
        raise RuntimeError(
            f"{_NAME}(): argument 'kernel_size' must be at least 1 each way and have at most "
            f"{MOST_ELEMENTS} elements, but is {kernel}"
        )
    if min(stride) < 1:
        raise RuntimeError(f"{_NAME}(): argument 'stride' must be at least 1, but is {stride}")
    if min(padding) < 0 or 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise RuntimeError(
            f"{_NAME}(): argument 'padding' must be from 0 to half of kernel_size {kernel}, "
            f"but is {padding}"
        )
    height, width = input.shape[-2:]
    if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
        raise RuntimeError(
            f"{_NAME}(): a window of {kernel} does not fit into an input of "
            f"{(int(height), int(width))} with padding {padding}: the output would be too small"
        )


def _output_shape(shape, kernel, stride, padding) -> tuple:
    """The pooled shape of an input of ``shape``."""
    extents = zip(shape[-2:], kernel, stride, padding, strict=True)
    return *shape[:-2], *((n + 2 * pad - size) // step + 1 for n, size, step, pad in extents)


# vmap over a jvp wants the arguments of a Function to be tensors and numbers, not pairs: the three
# below take the kernel's, stride's and padding's heights and widths, then the input's.


def _pairs(sizes) -> tuple[tuple[int, int], ...]:
    """kernel, stride and padding."""
    return sizes[0:2], sizes[2:4], sizes[4:6]


@differentiable
class _relu_max_pool2d:
    """d out = d input at each window's maximum if that is above 0, else 0."""

    @staticmethod
    def forward(raw, input, *sizes):
        return raw.relu_max_pool2d_forward(input, *_pairs(sizes))

    @staticmethod
    def save(inputs, outputs):
        return outputs[1:], inputs[1:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad, _):
        return _relu_max_pool2d_backward(raw, grad, *tensors, *constants), *(None,) * 8

    @staticmethod
    def jvp(raw, tensors, constants, tangent, *_):
        return _relu_max_pool2d_gather(raw, tangent, *tensors, *constants), None


@differentiable
class _relu_max_pool2d_backward:
    """Scatters each window's gradient to its maximum: linear in ``grad``, constant in ``index``."""

    @staticmethod
    def forward(raw, grad, index, *sizes):
        return raw.relu_max_pool2d_backward(grad, index, *_pairs(sizes), *sizes[6:])

    @staticmethod
    def save(inputs, outputs):
        return inputs[1:2], inputs[2:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return _relu_max_pool2d_gather(raw, grad, *tensors, *constants), *(None,) * 9

    @staticmethod
    def jvp(raw, tensors, constants, tangent, *_):
        return _relu_max_pool2d_backward(raw, tangent, *tensors, *constants)


@differentiable
class _relu_max_pool2d_gather:
    """Gathers the element at each window's maximum: the transpose of ``backward``."""

    @staticmethod
    def forward(raw, input, index, *sizes):
        return raw.relu_max_pool2d_gather(input, index, *_pairs(sizes))

    @staticmethod
    def save(inputs, outputs):
        return inputs[1:2], inputs[2:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return _relu_max_pool2d_backward(raw, grad, *tensors, *constants), *(None,) * 9

    @staticmethod
    def jvp(raw, tensors, constants, tangent, *_):
        return _relu_max_pool2d_gather(raw, tangent, *tensors, *constants)


def _fake_forward(input, kernel_size, stride, padding):
    out = input.new_empty(_output_shape(input.shape, kernel_size, stride, padding))
    return out, out.new_empty(out.shape, dtype=torch.uint8)


def _raw_forward_samples(device, dtype) -> Iterator[tuple]:
    for sample in sample_inputs(device, dtype):
        yield sample.args[0].detach(), *_geometry(*sample.args[1:])


def _random_index(shape, elements: int, device) -> torch.Tensor:
    """Positions in windows, one of which is nowhere."""
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(elements + 1, shape, generator=generator)
    return torch.where(index == elements, MOST_ELEMENTS, index).to(device, torch.uint8)


def _raw_backward_samples(device, dtype) -> Iterator[tuple]:
    for input, kernel, stride, padding in _raw_forward_samples(device, dtype):
        shape = _output_shape(input.shape, kernel, stride, padding)
        grad = _samples.normal(shape, device, dtype, seed=1)
        index = _random_index(shape, math.prod(kernel), device)
        yield grad, index, kernel, stride, padding, *input.shape[-2:]


def _raw_gather_samples(device, dtype) -> Iterator[tuple]:
    for input, kernel, stride, padding in _raw_forward_samples(device, dtype):
        shape = _output_shape(input.shape, kernel, stride, padding)
        yield input, _random_index(shape, math.prod(kernel), device), kernel, stride, padding


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Windows that tile the input, leave gaps, overlap and hang over its edge; every layout."""

    def made(name, shape, *sizes, make=_samples.normal, **kwargs) -> SampleInput:
        input = make(shape, device, dtype, len(shape)).requires_grad_(requires_grad)
        return SampleInput((input, *sizes), name=name, **kwargs)

    yield made("small", (1, 1, 4, 4), 2)
    yield made("overlapping", (1, 5, 7), 3, 2, 1)
    yield made("rectangular", (2, 1, 4, 5), (1, 3), (2, 1), (0, 1))
    yield made("gaps", (1, 1, 7, 5), 2, 3)
    yield made("one", (1, 1, 1), 1)
    yield made("empty_batch", (0, 3, 4, 4), 2)
    layouts = {**_samples.STRIDES, "channels_last": _samples.channels_last}
    for name, make in layouts.items():
        yield made(name, (2, 2, 4, 6), 2, make=make)
    # Every lane of a vector, and edges that no window reaches.
    many = {"gradcheckable": False}
    yield made("odd", (3, 5, 35, 41), 2, **many)
    yield made("vectors", (2, 3, 11, 80), (2, 2), (2, 2), **many)
    yield made("dense", (2, 9, 12), 5, 1, 2, **many)
    yield made("special", (2, 21, 14), 2, make=_special, **many)
    yield made("special_overlapping", (2, 21, 14), (3, 2), (2, 1), 1, make=_special, **many)


def _special(shape, device, dtype, seed=0) -> torch.Tensor:
    """Special values and ties of either sign, mixed."""
    special = _samples.special_values(device, dtype)
    ties = torch.tensor([-1, 1, 2], dtype=dtype, device=device)
    values = torch.cat([special, ties, ties])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), shape, generator=generator).to(device)]


def error_inputs(device) -> Iterator[ErrorInput]:
    """What the namesakes refuse, and the deviations."""
    x = torch.ones(1, 2, 6, 6, device=device)

    def case(name, error_type, error_regex, *args) -> ErrorInput:
        return ErrorInput(args, error_type, error_regex, name=name)

    yield case("list", TypeError, "'input' must be Tensor", [1.0], 2)
    yield case("int", NotImplementedError, "not implemented for", x.long(), 2)
    yield case("sparse", NotImplementedError, "layout", x.to_sparse(), 2)
    yield case("2d", RuntimeError, "'input' must have shape", x[0, 0], 2)
    yield case("no_channels", RuntimeError, "'input' must have shape", x[:, :0], 2)
    yield case("float", TypeError, "'kernel_size' must be an int", x, 2.0)
    yield case("triple", RuntimeError, "'stride' must be one int or two", x, 2, (1, 1, 1))
    yield case("kernel_0", RuntimeError, "'kernel_size' must be at least 1", x, (2, 0))
    yield case("kernel_256", RuntimeError, "at most 255 elements", x, 16, 1, 8)
    yield case("stride_0", RuntimeError, "'stride' must be at least 1", x, 2, 0)
    yield case("padding", RuntimeError, "'padding' must be from 0", x, (4, 2), 1, (1, 2))
    yield case("negative", RuntimeError, "'padding' must be from 0", x, 2, 2, -1)
    yield case("too_small", RuntimeError, "the output would be too small", x, (3, 7))


def reduction_length(input, kernel_size, stride=None, padding=0) -> int:
    """How many windows an element may be the maximum of."""
    kernel, stride, _ = _geometry(kernel_size, stride, padding)
    return math.prod(-(-size // step) for size, step in zip(kernel, stride, strict=True))


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Forward reads the input and writes a value per window; backward reads a value and where the
    maximum was (as few bits as tell that) and writes a gradient."""
    *planes, height, width, kernel = shape
    n = math.prod(shape[:-1])
    windows = math.prod(planes) * (height // kernel) * (width // kernel)
    index = (windows * (kernel**2).bit_length() + 7) // 8
    each_way = (n + windows) * itemsize
    moved = {"forward": each_way, "backward": each_way + index, "both": 2 * (each_way + index)}
    comparisons = {"forward": 1, "backward": 1, "both": 2}[direction]
    return Cost(bytes=moved[direction], flops=comparisons * n, unit="elementwise")


def benchmark_inputs(shape, dtype, device, generator) -> tuple[torch.Tensor, int]:
    """Random normal (n, c, h, w) that requires grad, and the window's size."""
    *extents, kernel = shape
    x = torch.randn(extents, dtype=dtype, device=device, generator=generator)
    return x.requires_grad_(), kernel


def by_hand(input, kernel_size, grad) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward without autograd."""
    aten = torch.ops.aten
    hidden = torch.relu(input)
    kernel = _pair("kernel_size", kernel_size)
    out, index = aten.max_pool2d_with_indices(hidden, kernel)
    grad_hidden = aten.max_pool2d_with_indices_backward(
        grad, hidden, kernel, kernel, (0, 0), (1, 1), False, index
    )
    return out, aten.threshold_backward(grad_hidden, hidden, 0)


OP = Op(
    name=_NAME,
    function=relu_max_pool2d,
    eager=eager,
    raw_ops=(
        RawOp("relu_max_pool2d_forward", _fake_forward, _raw_forward_samples),
        RawOp(
            "relu_max_pool2d_backward",
            lambda grad, index, kernel_size, stride, padding, height, width: grad.new_empty(
                (*grad.shape[:-2], height, width)
            ),
            _raw_backward_samples,
        ),
        RawOp(
            "relu_max_pool2d_gather",
            lambda input, index, kernel_size, stride, padding: input.new_empty(index.shape),
            _raw_gather_samples,
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=reduction_length,
    shape_names=("n", "c", "h", "w", "kernel"),
    benchmark_shapes={
        device: {
            "quick": ((64, 64, 24, 24, 2),),
            "full": ((64, 64, 24, 24, 2), (64, 64, 56, 56, 2)),
        }
        for device in ("cpu", "cuda")
    },
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    by_hand=by_hand,
)
