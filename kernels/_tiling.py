"""How a product is cut into tiles: the rule, and what a tuner may try instead."""

from typing import NamedTuple

import torch
import triton

from ._registration import INTERPRETED

# What a GPU needs to be busy: about one program for each of its 108 (sm_80) to 148 (sm_100)
# multiprocessors. A constant, so that a result does not depend on the device's size.
PROGRAMS_WANTED = 128
SHORTEST_PART = 256  # of K
MOST_SPLITS = 32

# The bounds of what is tried. Operands of all stages: the shared memory of a program on sm_90 and
# sm_100 (what a smaller GPU refuses is left out). A thread's sums: half its 255 registers. A
# thread's multiply-adds in a step over K where no tensor core does them: they are unrolled, and
# compiling takes 0.5 to 3.2 s for sm_90 as it is.
_SHARED_BYTES = 227 * 1024
_SUM_REGISTERS = 128
_UNROLLED = 2048
_SHORTEST_PART_TRIED = 64


class Tiling(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    splits: int  # parts of K, added up by a second kernel
    warps: int
    stages: int  # of the software pipeline over K

    def __str__(self):
        text = f"{self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps"
        text += f", {self.stages} stages"
        return text if self.splits == 1 else f"{text}, {self.splits} parts of K"


class Product(NamedTuple):
    """What a tiling is chosen for."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    layout: str  # of A and B, as BLAS names them: nn, nt, tn, tt
    epilogue: str  # what it does after the product, such as "bias relu"

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{dtype} {self.m}x{self.n}x{self.k} {self.layout}"
        return f"{text} {self.epilogue}" if self.epilogue else text


def choose_tiling(m, n, k, itemsize):
    """The rule: tile sizes for a product, by its shape alone.

    Large tiles reuse operands most: an output element costs block_m + block_n loads per block_m *
    block_n products. They are cut to the matrix, then halved, the longer side first, while there
    are too few of them to occupy the GPU. If tiles of 32 x 32 are still few and K is long (a weight
    gradient over a large batch), K is split, in parts long enough to pay for the second kernel.
    No tensor core multiplies float32 exactly, so its operands pass through registers, which bounds
    block_k while the tile is large. None of these spills registers on sm_80, sm_90 or sm_100.
    """
    if INTERPRETED:  # programs run one after the other in NumPy: as few as possible
        sides = (min(max(16, triton.next_power_of_2(size)), 256) for size in (m, n, k))
        return Tiling(*sides, splits=1, warps=1, stages=1)
    block_m, block_n, block_k = {2: (128, 128, 64), 4: (128, 128, 16), 8: (64, 64, 16)}[itemsize]
    block_m = min(block_m, _longest_side(m))
    block_n = min(block_n, _longest_side(n))

    def tiles():
        return triton.cdiv(m, block_m) * triton.cdiv(n, block_n)

    while tiles() < PROGRAMS_WANTED and max(block_m, block_n) > 32:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    small = block_m * block_n <= 64 * 64
    if small:
        block_k = max(block_k, 32)
    block_k = min(block_k, _longest_side(k))
    splits = min(PROGRAMS_WANTED // tiles(), k // SHORTEST_PART, MOST_SPLITS)
    return Tiling(block_m, block_n, block_k, max(splits, 1), warps=4 if small else 8, stages=3)


def _longest_side(size):
    """Of a tile: tl.dot takes 16 at least, and more than the matrix would be padding."""
    return max(16, triton.next_power_of_2(size))


def neighbours(tiling, product):
    """The tilings that a tuner may try next: one size doubled or halved, a side traded for the
    other, a stage more or less. Only such as a GPU has room for."""

    def scaled(**powers):
        sizes = {}
        for name, power in powers.items():
            size = getattr(tiling, name)
            sizes[name] = size << power if power > 0 else size >> -power
        return tiling._replace(**sizes)

    each = [scaled(**{name: power}) for name in Tiling._fields[:5] for power in (1, -1)]
    each += [scaled(block_m=1, block_n=-1), scaled(block_m=-1, block_n=1)]
    each += [tiling._replace(stages=tiling.stages + more) for more in (1, -1)]
    return [other for other in each if fits(other, product)]


def fits(tiling, product):
    """Whether a tiling is one that a tuner may take for a product."""
    itemsize, sides = product.dtype.itemsize, tiling[:3]
    threads = 32 * tiling.warps
    area = tiling.block_m * tiling.block_n
    operands = (tiling.block_m + tiling.block_n) * tiling.block_k * itemsize
    return (
        all(
            16 <= side <= min(_longest_side(size), 256) and side & (side - 1) == 0
            for side, size in zip(sides, (product.m, product.n, product.k), strict=True)
        )
        and 1 <= tiling.splits <= MOST_SPLITS
        and (tiling.splits == 1 or product.k // tiling.splits >= _SHORTEST_PART_TRIED)
        and tiling.warps in (1, 2, 4, 8)
        and 1 <= tiling.stages <= 5
        and operands * tiling.stages <= _SHARED_BYTES
        and area * max(itemsize // 4, 1) <= _SUM_REGISTERS * threads
        and (itemsize == 2 or area * tiling.block_k <= _UNROLLED * threads)
    )
