"""ReLU in Triton.

    forward   out  = x < 0 ? 0 : x              reads x, writes out: 2 n itemsize bytes
    backward  grad = out <= 0 ? 0 : grad        reads grad and out, writes: 3 n itemsize bytes
    with a mask, one bit for each element (not out <= 0): 2 n itemsize + n / 8 bytes each way

Launch: one program per 8 KiB, flat over dense memory, each thread 4 x 16 bytes per tensor.
Both comparisons are false for NaN, so it passes, as in PyTorch (``tl.maximum`` would need
``propagate_nan``, and would lose -0.0).
"""

import torch
import triton
import triton.language as tl

from ._elementwise import WARPS, block_size, elementwise_limits, laid_out_like, part_of, widen
from ._limits import limits
from ._registration import expect, expect_floating, loop_bound, raw_op, wrap_triton


@triton.jit
def _relu_forward(x, out, offsets, inside):
    value = tl.load(x + offsets, mask=inside)
    tl.store(out + offsets, tl.where(widen(value) < 0, 0, value), mask=inside)


@limits(lambda specialised: elementwise_limits(specialised, ["x"], "out"))
@triton.jit
def _relu_forward_kernel(x, out, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # A mask that ends inside a 16-byte access would split them all: only the last tile has one.
    if start + BLOCK <= n:
        _relu_forward(x, out, start + tl.arange(0, BLOCK), None)
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            offsets = start + first + tl.arange(0, PART)
            _relu_forward(x, out, offsets, offsets < n)


@triton.jit
def _relu_backward(grad, out, grad_input, offsets, inside):
    value = tl.load(out + offsets, mask=inside)
    kept = tl.where(widen(value) <= 0, 0, tl.load(grad + offsets, mask=inside))
    tl.store(grad_input + offsets, kept, mask=inside)


@limits(lambda specialised: elementwise_limits(specialised, ["grad", "out"], "grad_input"))
@triton.jit
def _relu_backward_kernel(grad, out, grad_input, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        _relu_backward(grad, out, grad_input, start + tl.arange(0, BLOCK), None)
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            offsets = start + first + tl.arange(0, PART)
            _relu_backward(grad, out, grad_input, offsets, offsets < n)


# With a mask: bit i % 8 of mask[i // 8] belongs to element i; those behind the last element are 0.


def _masked_limits(specialised, read, written):
    """The thread that holds an element and the one that holds its byte differ: they meet in shared
    memory, a byte for each byte of the mask (float64, backward: four)."""
    return elementwise_limits(specialised, [read], written)._replace(shared_bytes=512)


@triton.jit
def _elements(BLOCK: tl.constexpr):
    """Where a program's elements are, eight in a row: those of one byte of the mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    return start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@limits(lambda specialised: _masked_limits(specialised, "x", "out"))
@triton.jit
def _relu_forward_with_mask_kernel(x, out, mask, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = _elements(BLOCK)
    bits = tl.arange(0, 8)[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    if start + BLOCK <= n:
        value = tl.load(x + offsets)
        tl.store(out + offsets, tl.where(widen(value) < 0, 0, value))
        passes = tl.where(widen(value) <= 0, 0, 1) << bits
        tl.store(mask + byte, tl.sum(passes, axis=1).to(tl.uint8))
    else:
        inside = offsets < n
        value = tl.load(x + offsets, mask=inside, other=0)
        tl.store(out + offsets, tl.where(widen(value) < 0, 0, value), mask=inside)
        passes = tl.where(widen(value) <= 0, 0, 1) << bits
        tl.store(mask + byte, tl.sum(passes, axis=1).to(tl.uint8), mask=byte * 8 < n)


@limits(lambda specialised: _masked_limits(specialised, "grad", "grad_input"))
@triton.jit
def _relu_backward_with_mask_kernel(grad, mask, grad_input, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = _elements(BLOCK)
    bits = tl.arange(0, 8)[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    if start + BLOCK <= n:
        passes = (tl.load(mask + byte)[:, None].to(tl.int32) >> bits) & 1
        tl.store(grad_input + offsets, tl.where(passes != 0, tl.load(grad + offsets), 0))
    else:
        inside = offsets < n
        passes = (tl.load(mask + byte, mask=byte * 8 < n)[:, None].to(tl.int32) >> bits) & 1
        kept = tl.where(passes != 0, tl.load(grad + offsets, mask=inside), 0)
        tl.store(grad_input + offsets, kept, mask=inside)


@raw_op("(Tensor x) -> Tensor")
def relu_forward(x):
    out = torch.empty_like(x)
    x = laid_out_like(out, x)
    n = out.numel()
    if n:
        block = block_size(n, out.element_size())
        wrap_triton(_relu_forward_kernel)[(triton.cdiv(n, block),)](
            x, out, n, BLOCK=block, num_warps=WARPS
        )
    return out


@raw_op("(Tensor grad, Tensor out) -> Tensor")
def relu_backward(grad, out):
    expect_floating("relu_backward: out", out)
    expect("relu_backward: grad", grad, out.shape, like=out)
    grad_input = torch.empty_like(out)
    grad, out = laid_out_like(grad_input, grad), laid_out_like(grad_input, out)
    n = grad_input.numel()
    if n:
        block = block_size(n, grad_input.element_size())
        wrap_triton(_relu_backward_kernel)[(triton.cdiv(n, block),)](
            grad, out, grad_input, n, BLOCK=block, num_warps=WARPS
        )
    return grad_input


@raw_op("(Tensor x) -> (Tensor, Tensor)")
def relu_forward_with_mask(x):
    expect_floating("relu_forward_with_mask: x", x)
    out = x.new_empty(x.shape)
    n = out.numel()
    mask = x.new_empty(((n + 7) // 8,), dtype=torch.uint8)
    if n:
        block = max(8, block_size(n, out.element_size()))
        wrap_triton(_relu_forward_with_mask_kernel)[(triton.cdiv(n, block),)](
            x.contiguous(), out, mask, n, BLOCK=block, num_warps=WARPS
        )
    return out, mask


@raw_op("(Tensor grad, Tensor mask) -> Tensor")
def relu_backward_with_mask(grad, mask):
    op = "relu_backward_with_mask"
    expect_floating(f"{op}: grad", grad)
    n = grad.numel()
    torch._check(
        mask.dtype == torch.uint8 and mask.numel() == (n + 7) // 8 and mask.device == grad.device,
        lambda: f"{op}: mask must hold one bit for each element of grad, as uint8",
    )
    grad_input = grad.new_empty(grad.shape)
    if n:
        block = max(8, block_size(n, grad.element_size()))
        wrap_triton(_relu_backward_with_mask_kernel)[(triton.cdiv(n, block),)](
            grad.contiguous(), mask.contiguous(), grad_input, n, BLOCK=block, num_warps=WARPS
        )
    return grad_input
