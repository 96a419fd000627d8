"""Mean squared error in Triton.

    forward   none: loss = (input - target)^2            3 n itemsize bytes
              sum, mean: sum((input - target)^2) [/ n]   2 n itemsize bytes, one 0-d result
    backward  grad_input = grad * 2 (input - target) [/ n]
              3 n itemsize bytes, 4 n for none

Launch: element-wise ones as in relu.py. The sum takes two stages: at most 1024 programs (eight
on each of some 130 multiprocessors) walk the tiles in turn and leave one partial sum each, then one
program adds those up. The number of programs depends on n alone and no atomics are used, so the
result is the same bits every time. Up to four tiles, one program does it all.
"""

import torch
import triton
import triton.language as tl

from ._elementwise import WARPS, block_size, elementwise_limits, part_of, rounded, widen
from ._limits import limits
from ._reduction import NONE, accumulator, divisor, empty_loss, finish
from ._registration import expect, expect_floating, loop_bound, raw_op, wrap_triton

MAX_PROGRAMS = 1024
MAX_TILES_OF_ONE_PROGRAM = 4


@triton.jit
def _squared_error(input, target, loss, offsets, inside):
    value = widen(tl.load(input + offsets, mask=inside))
    difference = value - widen(tl.load(target + offsets, mask=inside))
    squared = rounded(difference * difference, loss.dtype.element_ty)
    tl.store(loss + offsets, squared, mask=inside)


@limits(lambda specialised: elementwise_limits(specialised, ["input", "target"], "loss"))
@triton.jit
def _squared_error_kernel(input, target, loss, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        _squared_error(input, target, loss, start + tl.arange(0, BLOCK), None)
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            offsets = start + first + tl.arange(0, PART)
            _squared_error(input, target, loss, offsets, offsets < n)


def _masked_spill_bytes(specialised):
    """A size that 16 does not divide splits the masked accesses into single elements. Each then
    takes a register, 32 of an operand for 16-bit types, and ptxas may rather keep some of them in
    local memory than run fewer programs at a time. In the machine code, only the masked step
    stores and loads them, once per program: 64 bytes a thread, against 8 KiB of each operand.
    """
    split = not specialised.aligned("n")
    return 64 if split and specialised.itemsize("input") == 2 else 0


def _partial_sums_limits(specialised):
    elementwise = elementwise_limits(
        specialised, ["input", "target"], "partials", _masked_spill_bytes(specialised)
    )
    return elementwise._replace(
        store_bytes=specialised.itemsize("partials"),
        shared_bytes=WARPS * max(specialised.itemsize("input"), 4),  # in the type of the sums
    )


@limits(_partial_sums_limits)
@triton.jit
def _partial_sums_kernel(input, target, partials, n, count, full_steps, BLOCK: tl.constexpr):
    # In a full step every program has a full tile, unmasked; one masked step takes the rest. It
    # comes first: zeros to add onto have a layout of their own in Triton 3.6, which converts the
    # sums to another through shared memory.
    program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    rest = offsets + full_steps * stride
    inside = rest < n
    value = widen(tl.load(input + rest, mask=inside, other=0))
    difference = value - widen(tl.load(target + rest, mask=inside, other=0))
    total = difference * difference
    for _ in range(loop_bound(full_steps)):
        difference = widen(tl.load(input + offsets)) - widen(tl.load(target + offsets))
        total += difference * difference
        offsets += stride
    result = tl.sum(total, 0) / count
    tl.store(partials + program, rounded(result, partials.dtype.element_ty))


def _mse_backward_limits(specialised):
    inputs = ["input", "target"]
    if not specialised.constants["GRAD_IS_SCALAR"]:
        inputs.append("grad")
    return elementwise_limits(specialised, inputs, "grad_input")


@triton.jit
def _mse_backward(
    grad, input, target, grad_input, count, offsets, inside, GRAD_IS_SCALAR: tl.constexpr
):
    scale = widen(tl.load(grad) if GRAD_IS_SCALAR else tl.load(grad + offsets, mask=inside))
    value = widen(tl.load(input + offsets, mask=inside))
    difference = value - widen(tl.load(target + offsets, mask=inside))
    result = rounded(scale * 2 / count * difference, grad_input.dtype.element_ty)
    tl.store(grad_input + offsets, result, mask=inside)


@limits(_mse_backward_limits)
@triton.jit
def _mse_backward_kernel(
    grad, input, target, grad_input, n, count, GRAD_IS_SCALAR: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        offsets = start + tl.arange(0, BLOCK)
        _mse_backward(grad, input, target, grad_input, count, offsets, None, GRAD_IS_SCALAR)
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            offsets = start + first + tl.arange(0, PART)
            inside = offsets < n
            _mse_backward(grad, input, target, grad_input, count, offsets, inside, GRAD_IS_SCALAR)


@raw_op("(Tensor input, Tensor target, int reduction) -> Tensor")
def mse_loss_forward(input, target, reduction):
    expect_floating("mse_loss_forward: input", input)
    expect("mse_loss_forward: target", target, input.shape, like=input)
    n = input.numel()
    count = divisor(reduction, n)
    input, target = input.contiguous(), target.contiguous()
    if reduction == NONE:
        loss = torch.empty_like(input)
        if n:
            block = block_size(n, input.element_size())
            wrap_triton(_squared_error_kernel)[(triton.cdiv(n, block),)](
                input, target, loss, n, BLOCK=block, num_warps=WARPS
            )
        return loss
    if not n:
        return empty_loss(input, reduction)
    loss = input.new_empty(())
    block = block_size(n, input.element_size())
    tiles = triton.cdiv(n, block)
    programs = 1 if tiles <= MAX_TILES_OF_ONE_PROGRAM else min(tiles, MAX_PROGRAMS)
    if programs == 1:
        partials, first_count = loss, count
    else:
        partials, first_count = input.new_empty(programs, dtype=accumulator(input.dtype)), 1
    wrap_triton(_partial_sums_kernel)[(programs,)](
        input,
        target,
        partials,
        n,
        first_count,
        n // (programs * block),
        BLOCK=block,
        num_warps=WARPS,
    )
    if programs > 1:
        finish(partials, loss, count)
    return loss


@raw_op("(Tensor grad, Tensor input, Tensor target, int reduction) -> Tensor")
def mse_loss_backward(grad, input, target, reduction):
    expect_floating("mse_loss_backward: input", input)
    expect("mse_loss_backward: target", target, input.shape, like=input)
    expect("mse_loss_backward: grad", grad, input.shape if reduction == NONE else (), like=input)
    n = input.numel()
    count = divisor(reduction, n)
    grad, input, target = grad.contiguous(), input.contiguous(), target.contiguous()
    grad_input = torch.empty_like(input)
    if n:
        block = block_size(n, input.element_size())
        wrap_triton(_mse_backward_kernel)[(triton.cdiv(n, block),)](
            grad,
            input,
            target,
            grad_input,
            n,
            count,
            GRAD_IS_SCALAR=reduction != NONE,
            BLOCK=block,
            num_warps=WARPS,
        )
    return grad_input
