"""What the element-wise kernels share: flat addressing of dense tensors, widening and rounding.

A dense tensor is one run of memory whatever the order of its dimensions, so a kernel walks it with
one index, and each thread moves 16 bytes at a time. Anything else is first copied into such a run.
"""

import torch
import triton
import triton.language as tl

from ._limits import BYTES_IN_FLIGHT, Limits, registers_for
from ._registration import INTERPRETED

# One program moves 8 KiB per tensor: 4 warps x 32 threads x 4 accesses of 16 bytes in flight, which
# with 8 or more programs on a multiprocessor covers the latency of HBM.
BYTES_PER_PROGRAM = 8192
WARPS = 4

_INTERPRETED = tl.constexpr(INTERPRETED)
_WARPS = tl.constexpr(WARPS)


def block_size(n, itemsize):
    """Elements per program for n elements: see BYTES_PER_PROGRAM. The interpreter, which runs the
    programs one after the other in NumPy, takes as many as it can at once."""
    if INTERPRETED:
        return min(triton.next_power_of_2(n), 1 << 16)
    return BYTES_PER_PROGRAM // itemsize


def elementwise_limits(specialised, inputs, out, spill_bytes=0):
    """Limits of a kernel that reads the dense tensors ``inputs`` and writes ``out``, each program
    BYTES_PER_PROGRAM of each: 16-byte accesses where all are aligned (and n is not 1, a constant
    that leaves only the masked tail), and as many programs as keep the memory busy."""
    programs = -(-BYTES_IN_FLIGHT // (BYTES_PER_PROGRAM * len(inputs)))
    aligned = specialised.aligned(*inputs, out) and "n" not in specialised.constants
    return Limits(
        registers=registers_for(programs, specialised.threads),
        load_bytes=16 if aligned else specialised.itemsize(inputs[0]),
        store_bytes=16 if aligned else specialised.itemsize(out),
        spill_bytes=spill_bytes,
    )


@triton.jit
def part_of(BLOCK: tl.constexpr):
    """How many elements at once a program takes of a tile that the tensor ends in. Its accesses are
    split into single elements where 16 does not divide n, and each holds a register: of a whole
    tile of 16 bits, Triton 3.8 gave relu 110 registers rather than 32 and adadelta_step 255 and a
    spill, in every program for the sake of the last one. Four of each thread keep dropout's blocks
    of four whole. In the interpreter, where a step costs the same whatever its size, two parts.
    """
    if _INTERPRETED:
        return BLOCK // 2 if BLOCK >= 32 else BLOCK
    else:
        return min(BLOCK, 4 * 32 * _WARPS)


def laid_out_like(reference, tensor):
    """``tensor`` if it has the strides of ``reference``, else a copy that has them.

    Both have one shape; ``reference`` is dense, for example fresh from ``torch.empty_like``.
    """
    same = all(
        size <= 1 or stride == wanted
        for size, stride, wanted in zip(
            tensor.shape, tensor.stride(), reference.stride(), strict=True
        )
    )
    return tensor if same else torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)


# bfloat16 is the upper half of float32. Triton's interpreter (3.6 to 3.9) truncates where it should
# round and mangles subnormals, so there the two functions below convert the bits themselves.


@triton.jit
def widen(value):
    """bfloat16 and float16 as float32, in which all arithmetic is done; other types as they are."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        return (bits << 16).to(tl.float32, bitcast=True)
    elif value.dtype == tl.bfloat16 or value.dtype == tl.float16:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value != value, (bits >> 16) | 0x40, nearest)  # a NaN stays a NaN
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def float_from_bits(bits, dtype: tl.constexpr):
    """The argument that ``_registration.float_bits`` made of a Python float, in ``dtype``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
