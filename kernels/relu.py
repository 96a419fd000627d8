"""ReLU in Triton.

    forward   out  = x < 0 ? 0 : x              reads x, writes out: 2 n itemsize bytes
    backward  grad = out <= 0 ? 0 : grad        reads grad and out, writes: 3 n itemsize bytes

Launch: one program per 8 KiB, flat over dense memory, each thread 4 x 16 bytes per tensor.
Both comparisons are false for NaN, so it passes, as in PyTorch (``tl.maximum`` would need
``propagate_nan``, and would lose -0.0).
"""

import torch
import triton
import triton.language as tl

from ._elementwise import WARPS, block_size, elementwise_limits, laid_out_like, widen
from ._limits import limits
from ._registration import expect, expect_floating, raw_op, wrap_triton


@limits(lambda specialised: elementwise_limits(specialised, ["x"], "out"))
@triton.jit
def _relu_forward_kernel(x, out, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # A mask that ends inside a 16-byte access would split them all: only the last tile has one.
    if start + BLOCK <= n:
        value = tl.load(x + offsets)
        tl.store(out + offsets, tl.where(widen(value) < 0, 0, value))
    else:
        inside = offsets < n
        value = tl.load(x + offsets, mask=inside)
        tl.store(out + offsets, tl.where(widen(value) < 0, 0, value), mask=inside)


@limits(lambda specialised: elementwise_limits(specialised, ["grad", "out"], "grad_input"))
@triton.jit
def _relu_backward_kernel(grad, out, grad_input, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        kept = tl.where(widen(tl.load(out + offsets)) <= 0, 0, tl.load(grad + offsets))
        tl.store(grad_input + offsets, kept)
    else:
        inside = offsets < n
        value = tl.load(out + offsets, mask=inside)
        kept = tl.where(widen(value) <= 0, 0, tl.load(grad + offsets, mask=inside))
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
