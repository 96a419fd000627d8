"""Dropout in Triton.

    out = bits >= threshold ? x * scale : 0     reads x, writes out: 2 n itemsize bytes

The bits are Philox 4x32-10, ``tl.philox``: element i has word i % 4 of the block whose counter is
i // 4. Launch: one program per 8 KiB, flat over dense memory. The seed is read on the device, so
that nothing waits for it.
"""

import struct

import torch
import triton
import triton.language as tl

from ._elementwise import (
    WARPS,
    block_size,
    elementwise_limits,
    laid_out_like,
    part_of,
    rounded,
    widen,
)
from ._limits import limits, registers_for
from ._registration import loop_bound, raw_op, wrap_triton


@triton.jit
def _scaled(value, kept, scale_bits):
    """A float argument would be rounded to float32: scale travels as the bits of a float64."""
    wide = widen(value)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(wide.dtype)
    return rounded(tl.where(kept, wide * scale, 0), value.dtype)


def _dropout_limits(specialised):
    """16 bytes of float64 are half a block: the other half's bits pass through shared memory. 16
    bytes of 16 bits are two blocks, which take up to 80 registers on sm_80 (six programs, 48 KiB in
    flight, where 2 TB/s over 108 multiprocessors need 19 KB).
    """
    limits = elementwise_limits(specialised, ["x"], "out")
    itemsize = specialised.itemsize("x")
    if itemsize == 8:
        return limits._replace(shared_bytes=2 * specialised.constants["BLOCK"])
    if itemsize == 2:
        return limits._replace(registers=registers_for(6, specialised.threads))
    return limits


@triton.jit
def _dropout(x, seed, threshold, scale_bits, out, start, n, BLOCK: tl.constexpr):
    """Elements ``start`` to ``start + BLOCK``, up to ``n`` where that is not None."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    b0, b1, b2, b3 = tl.philox(seed, low, high, zero, zero)
    bits = tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
    kept = bits.to(tl.int64) >= threshold  # which may be 2^32, above all bits
    offsets = start + tl.arange(0, BLOCK)
    inside = None if n is None else offsets < n
    value = tl.load(x + offsets, mask=inside)
    tl.store(out + offsets, _scaled(value, kept, scale_bits), mask=inside)


@limits(_dropout_limits)
@triton.jit(do_not_specialize=["threshold", "scale_bits"])
def _dropout_kernel(x, seed, threshold, scale_bits, out, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    key = tl.load(seed)
    # A mask that ends inside a 16-byte access would split them all: only the last tile has one.
    if start + BLOCK <= n:
        _dropout(x, key, threshold, scale_bits, out, start, None, BLOCK)
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            _dropout(x, key, threshold, scale_bits, out, start + first, n, PART)


@raw_op("(Tensor input, Tensor seed, int threshold, float scale) -> Tensor")
def dropout_seeded(input, seed, threshold, scale):
    torch._check(
        seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == input.device,
        lambda: "dropout_seeded: seed must be one int64 on the input's device",
    )
    out = input.new_empty(input.shape)
    x = laid_out_like(out, input)
    n = out.numel()
    if n:
        block = max(block_size(n, out.element_size()), 4)
        (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
        wrap_triton(_dropout_kernel)[(triton.cdiv(n, block),)](
            x, seed, threshold, scale_bits, out, n, BLOCK=block, num_warps=WARPS
        )
    return out
