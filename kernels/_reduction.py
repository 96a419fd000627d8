"""The second stage of every loss: adding up the partial sums of the first, in a fixed order."""

import torch
import triton
import triton.language as tl

from ._elementwise import rounded
from ._limits import Limits, limits, registers_for
from ._registration import loop_bound, wrap_triton

NONE, MEAN, SUM = 0, 1, 2  # ATen's numbers for reduction

PARTIALS_PER_STEP = 1024  # most losses have no more partial sums


def accumulator(dtype):
    """The dtype that sums of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divisor(reduction, n):
    """What the sum of n elements is divided by: an integer, so that no rounded 1/n is passed."""
    torch._check(reduction in (NONE, MEAN, SUM), lambda: f"unknown reduction {reduction}")
    return n if reduction == MEAN else 1


def empty_loss(like, reduction):
    """The 0-d loss over no elements: nan as a mean, 0 as a sum."""
    return like.new_full((), float("nan") if reduction == MEAN else 0.0)


def _finish_limits(specialised):
    """One program, which reads a few thousand values."""
    return Limits(
        registers=registers_for(1, specialised.threads),
        load_bytes=specialised.itemsize("partials"),
        store_bytes=specialised.itemsize("loss"),
        shared_bytes=specialised.threads // 32 * specialised.itemsize("partials"),
    )


@limits(_finish_limits)
@triton.jit
def _finish_kernel(partials, loss, n, count, steps, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    offsets = tl.arange(0, BLOCK)
    for _ in range(loop_bound(steps)):
        total += tl.load(partials + offsets, mask=offsets < n, other=0)
        offsets += BLOCK
    tl.store(loss, rounded(tl.sum(total, 0) / count, loss.dtype.element_ty))


def finish(partials, loss, count):
    """loss = sum(partials) / count, by one program: at most a few thousand partial sums."""
    n = partials.numel()
    wrap_triton(_finish_kernel)[(1,)](
        partials,
        loss,
        n,
        count,
        triton.cdiv(n, PARTIALS_PER_STEP),
        BLOCK=PARTIALS_PER_STEP,
        num_warps=4,
    )
