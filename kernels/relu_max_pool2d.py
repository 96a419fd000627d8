"""ReLU and max-pooling in Triton.

    forward   out = max of (x < 0 ? 0 : x) over each window; index = where in it, 255 if not above 0
    backward  grad_x = sum of grad over the windows whose maximum it is
    gather    out = x at each window's maximum, the transpose of backward

With windows of 2 x 2: forward reads n items, writes n / 4 and as many bytes; backward the reverse.
Launch: one program for BLOCK neighbouring results, which its threads read and write side by side.
A NaN wins (``tl.maximum`` would need ``propagate_nan``), the last one in a window over the others.
"""

import torch
import triton
import triton.language as tl

from ._elementwise import WARPS, rounded, widen
from ._limits import Limits, limits, registers_for
from ._registration import INTERPRETED, expect, expect_floating, raw_op, wrap_triton

NOWHERE = 255
MOST_UNROLLED = 16  # elements of a window, or windows over an element

_NOWHERE = tl.constexpr(NOWHERE)
_MOST_UNROLLED = tl.constexpr(MOST_UNROLLED)


def block_size(n):
    """Results per program: four for each thread. The interpreter, which runs the programs one after
    the other in NumPy, takes as many as it can at once."""
    return min(triton.next_power_of_2(n), 1 << 16) if INTERPRETED else 4 * 32 * WARPS


def _pooling_limits(specialised, loaded, out, spill_bytes=0):
    """Element by element: neighbouring threads, not one thread, take what lies side by side.

    A thread stores its four results at once where the last program has no odd end. shared_bytes:
    float64 results change threads on their way to that. registers: 44 to 72 with windows of 2 x 2;
    16 elements in flight for each of four results take more. spill_bytes, of forward and gather:
    dividing 64-bit numbers is a subroutine, and around its eight calls sm_80 saves an address of
    some windows (in the machine code, one STL before the first CALL and one LDL after the last).
    """
    itemsize = specialised.itemsize(out)
    whole = specialised.aligned(out, "n")
    return Limits(
        registers=registers_for(4, specialised.threads),
        load_bytes=specialised.itemsize(loaded),
        store_bytes=min(4 * itemsize, 16) if whole else itemsize,
        shared_bytes=specialised.constants["BLOCK"] * itemsize,
        spill_bytes=spill_bytes,
    )


@triton.jit
def _offer(
    best, winner, position, plane, top, left, height, width, inside, KERNEL_WIDTH: tl.constexpr
):
    """The winner among the elements so far and the one at ``position`` of each window."""
    y = top + position // KERNEL_WIDTH
    x = left + position % KERNEL_WIDTH
    there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    value = widen(tl.load(plane + y * width + x, mask=there, other=-1))
    value = tl.where(value < 0, 0, value)
    wins = there & ((value > best) | (value != value))
    return tl.where(wins, value, best), tl.where(wins, position, winner)


@limits(lambda specialised: _pooling_limits(specialised, "input", "out", spill_bytes=8))
@triton.jit
def _relu_max_pool2d_forward_kernel(
    input,
    out,
    index,
    n,
    height,
    width,
    out_height,
    out_width,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = window < n
    row = window // out_width
    top = row % out_height * STRIDE_HEIGHT - PADDING_HEIGHT
    left = window % out_width * STRIDE_WIDTH - PADDING_WIDTH
    plane = input + row // out_height * height * width
    ELEMENTS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    # (Triton 3.8's interpreter has no bfloat16 constant but 0.)
    best = widen(tl.zeros((BLOCK,), input.dtype.element_ty)) - 1
    winner = tl.zeros((BLOCK,), tl.int32)
    if ELEMENTS <= _MOST_UNROLLED:
        for position in tl.static_range(ELEMENTS):
            best, winner = _offer(
                best, winner, position, plane, top, left, height, width, inside, KERNEL_WIDTH
            )
    else:
        for position in range(ELEMENTS):
            best, winner = _offer(
                best, winner, position, plane, top, left, height, width, inside, KERNEL_WIDTH
            )
    tl.store(out + window, rounded(best, out.dtype.element_ty), mask=inside)
    tl.store(index + window, tl.where(best <= 0, _NOWHERE, winner).to(tl.uint8), mask=inside)


@triton.jit
def _gradient_of_window(
    grad, index, plane, row, y, column, x, out_height, out_width, inside,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of one window each, 0 where the element (y, x) of it is not its maximum."""
    there = (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
    there = inside & there & (y < KERNEL_HEIGHT) & (x < KERNEL_WIDTH)
    window = plane + row * out_width + column
    position = tl.load(index + window, mask=there, other=_NOWHERE)
    chosen = there & (position == y * KERNEL_WIDTH + x)
    return tl.where(chosen, widen(tl.load(grad + window, mask=there, other=0)), 0)


@limits(lambda specialised: _pooling_limits(specialised, "grad", "grad_input"))
@triton.jit
def _relu_max_pool2d_backward_kernel(
    grad,
    index,
    grad_input,
    n,
    height,
    width,
    out_height,
    out_width,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n
    line = element // width
    y = line % height + PADDING_HEIGHT
    x = element % width + PADDING_WIDTH
    plane = line // height * out_height * out_width
    # Of the windows that may contain an element, the last one is known; ROWS x COLUMNS may.
    ROWS: tl.constexpr = (KERNEL_HEIGHT + STRIDE_HEIGHT - 1) // STRIDE_HEIGHT
    COLUMNS: tl.constexpr = (KERNEL_WIDTH + STRIDE_WIDTH - 1) // STRIDE_WIDTH
    WINDOWS: tl.constexpr = ROWS * COLUMNS
    last_row = y // STRIDE_HEIGHT
    last_column = x // STRIDE_WIDTH
    total = widen(tl.zeros((BLOCK,), grad.dtype.element_ty))
    if WINDOWS <= _MOST_UNROLLED:
        for each in tl.static_range(WINDOWS):
            row = last_row - (ROWS - 1 - each // COLUMNS)
            column = last_column - (COLUMNS - 1 - each % COLUMNS)
            total += _gradient_of_window(
                grad, index, plane, row, y - row * STRIDE_HEIGHT, column,
                x - column * STRIDE_WIDTH, out_height, out_width, inside,
                KERNEL_HEIGHT, KERNEL_WIDTH,
            )  # fmt: skip
    else:
        for each in range(WINDOWS):
            row = last_row - (ROWS - 1 - each // COLUMNS)
            column = last_column - (COLUMNS - 1 - each % COLUMNS)
            total += _gradient_of_window(
                grad, index, plane, row, y - row * STRIDE_HEIGHT, column,
                x - column * STRIDE_WIDTH, out_height, out_width, inside,
                KERNEL_HEIGHT, KERNEL_WIDTH,
            )  # fmt: skip
    tl.store(grad_input + element, rounded(total, grad_input.dtype.element_ty), mask=inside)


@limits(lambda specialised: _pooling_limits(specialised, "input", "out", spill_bytes=8))
@triton.jit
def _relu_max_pool2d_gather_kernel(
    input,
    index,
    out,
    n,
    height,
    width,
    out_height,
    out_width,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = window < n
    position = tl.load(index + window, mask=inside, other=_NOWHERE).to(tl.int32)
    row = window // out_width
    y = row % out_height * STRIDE_HEIGHT - PADDING_HEIGHT + position // KERNEL_WIDTH
    x = window % out_width * STRIDE_WIDTH - PADDING_WIDTH + position % KERNEL_WIDTH
    there = inside & (position != _NOWHERE) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    source = input + (row // out_height * height + y) * width + x
    tl.store(out + window, tl.load(source, mask=there, other=0), mask=inside)


def _output_shape(op, shape, kernel_size, stride, padding):
    """The shape of the windows' maxima. Refuses sizes with which a kernel would misread memory."""
    pairs = len(kernel_size) == len(stride) == len(padding) == 2 and len(shape) >= 2
    torch._check(pairs, lambda: f"{op}: kernel_size, stride and padding must be pairs")
    possible = (
        0 < min(kernel_size)
        and kernel_size[0] * kernel_size[1] <= NOWHERE
        and 0 < min(stride)
        and 0 <= min(padding)
        and all(2 * pad <= size for pad, size in zip(padding, kernel_size, strict=True))
    )
    torch._check(possible, lambda: f"{op}: kernel_size, stride or padding is out of range")
    last = [
        n + 2 * pad - size for n, size, pad in zip(shape[-2:], kernel_size, padding, strict=True)
    ]
    for each in last:
        torch._check(each >= 0, lambda: f"{op}: a window does not fit into the input")
    return *shape[:-2], *(each // step + 1 for each, step in zip(last, stride, strict=True))


def _expect_index(op, index, shape):
    torch._check(
        index.dtype == torch.uint8 and tuple(index.shape) == tuple(shape),
        lambda: (
            f"{op}: index: expected uint8 of shape {tuple(shape)}, "
            f"got {index.dtype} of {tuple(index.shape)}"
        ),
    )


_SIZES = "int[2] kernel_size, int[2] stride, int[2] padding"


@raw_op(f"(Tensor input, {_SIZES}) -> (Tensor, Tensor)")
def relu_max_pool2d_forward(input, kernel_size, stride, padding):
    op = "relu_max_pool2d_forward"
    expect_floating(f"{op}: input", input)
    out = input.new_empty(_output_shape(op, input.shape, kernel_size, stride, padding))
    index = out.new_empty(out.shape, dtype=torch.uint8)
    n = out.numel()
    if n:
        block = block_size(n)
        wrap_triton(_relu_max_pool2d_forward_kernel)[(triton.cdiv(n, block),)](
            input.contiguous(),
            out,
            index,
            n,
            *input.shape[-2:],
            *out.shape[-2:],
            *kernel_size,
            *stride,
            *padding,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out, index


@raw_op(f"(Tensor grad, Tensor index, {_SIZES}, SymInt height, SymInt width) -> Tensor")
def relu_max_pool2d_backward(grad, index, kernel_size, stride, padding, height, width):
    op = "relu_max_pool2d_backward"
    expect_floating(f"{op}: grad", grad)
    shape = (*grad.shape[:-2], height, width)
    windows = _output_shape(op, shape, kernel_size, stride, padding)
    expect(f"{op}: grad", grad, windows, like=grad)
    _expect_index(op, index, windows)
    grad_input = grad.new_empty(shape)
    n = grad_input.numel()
    if n:
        block = block_size(n)
        wrap_triton(_relu_max_pool2d_backward_kernel)[(triton.cdiv(n, block),)](
            grad.contiguous(),
            index.contiguous(),
            grad_input,
            n,
            height,
            width,
            *grad.shape[-2:],
            *kernel_size,
            *stride,
            *padding,
            BLOCK=block,
            num_warps=WARPS,
        )
    return grad_input


@raw_op(f"(Tensor input, Tensor index, {_SIZES}) -> Tensor")
def relu_max_pool2d_gather(input, index, kernel_size, stride, padding):
    op = "relu_max_pool2d_gather"
    expect_floating(f"{op}: input", input)
    _expect_index(op, index, _output_shape(op, input.shape, kernel_size, stride, padding))
    out = input.new_empty(index.shape)
    n = out.numel()
    if n:
        block = block_size(n)
        wrap_triton(_relu_max_pool2d_gather_kernel)[(triton.cdiv(n, block),)](
            input.contiguous(),
            index.contiguous(),
            out,
            n,
            *input.shape[-2:],
            *out.shape[-2:],
            kernel_size[1],
            *stride,
            *padding,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out
