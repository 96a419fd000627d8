"""Theoretical occupancy: how many of a multiprocessor's warps a kernel's resources leave room for.

The limits of each architecture are those of the table "Technical Specifications per Compute
Capability" in NVIDIA's CUDA C++ Programming Guide; the allocation granularities are those of the
occupancy calculator that the CUDA toolkit ships (``cuda_occupancy.h``), with which the arithmetic
here is compared by ``tests/test_compile_report.py``. The columns of tensor memory are those of the
PTX ISA's chapter on ``tcgen05``.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS_PER_SM = 65536
SUBPARTITIONS = 4  # of a multiprocessor; a warp's registers lie in one of them
REGISTER_GRANULARITY = 256  # per warp
SHARED_GRANULARITY = 128
RESERVED_SHARED_BYTES = 1024  # of each block, for the system
TENSOR_MEMORY_COLUMNS = 512  # per multiprocessor


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of an architecture holds."""

    warps: int
    blocks: int
    shared_bytes: int


_LARGE_8_0 = Multiprocessor(warps=64, blocks=32, shared_bytes=164 << 10)
_LARGE_9_0 = Multiprocessor(warps=64, blocks=32, shared_bytes=228 << 10)
_SMALL_8_9 = Multiprocessor(warps=48, blocks=24, shared_bytes=100 << 10)
MULTIPROCESSORS = {
    80: _LARGE_8_0,
    86: Multiprocessor(warps=48, blocks=16, shared_bytes=100 << 10),
    87: Multiprocessor(warps=48, blocks=16, shared_bytes=164 << 10),
    89: _SMALL_8_9,
    90: _LARGE_9_0,
    100: _LARGE_9_0,
    103: _LARGE_9_0,
    120: _SMALL_8_9,
    121: _SMALL_8_9,
}
"""Compute capability, 10 * major + minor, to the multiprocessor's limits."""


@dataclass(frozen=True)
class Occupancy:
    """blocks: that are resident on a multiprocessor; occupancy: their warps as a part of all that
    it can hold; limited_by: what leaves no room for one more block."""

    blocks: int
    occupancy: float
    limited_by: str


def occupancy(
    capability: int,
    threads: int,
    registers: int,
    shared_bytes: int,
    tensor_memory_columns: int = 0,
) -> Occupancy | None:
    """The theoretical occupancy of a kernel, or None for an architecture that is not known here.

    Args:
        capability: 10 * major + minor, such as 90.
        threads: per block.
        registers: per thread.
        shared_bytes: static and dynamic, per block.
        tensor_memory_columns: per block (``tcgen05``); 0 for none.
    """
    limits = MULTIPROCESSORS.get(capability)
    if limits is None:
        return None
    warps = -(-threads // WARP)
    registers_per_warp = _round_up(max(registers, 1) * WARP, REGISTER_GRANULARITY)
    resident_warps = REGISTERS_PER_SM // SUBPARTITIONS // registers_per_warp * SUBPARTITIONS
    # A launch is refused as if a block took registers in all subpartitions alike.
    fits = registers_per_warp * _round_up(warps, SUBPARTITIONS) <= REGISTERS_PER_SM
    shared = _round_up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_GRANULARITY)
    rooms = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": resident_warps // warps if fits else 0,
        "shared memory": limits.shared_bytes // shared,
    }
    if tensor_memory_columns:
        rooms["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory_columns
    limited_by = min(rooms, key=rooms.__getitem__)
    blocks = rooms[limited_by]
    return Occupancy(blocks, blocks * warps / limits.warps, limited_by)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
