"""Tensors that sample inputs are made of: every layout an op must accept, and special values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# Odd sizes around vector widths and tile edges, one element, and nothing at all.
SHAPES = ((), (1,), (0,), (17,), (3, 0, 2), (5, 7), (33, 65), (2, 3, 5, 4))


def normal(shape, device, dtype, seed: int = 0) -> torch.Tensor:
    """Standard normal values, the same for every device and dtype up to rounding.

    Values within 0.05 of zero are moved out: central differences would step over ReLU's kink.
    Integer dtypes get the values times ten, rounded.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    values = torch.where(values.abs() < 0.05, torch.copysign(torch.tensor(0.05), values), values)
    if not dtype.is_floating_point:
        values = (values * 10).round().abs() if dtype == torch.uint8 else (values * 10).round()
    return values.to(dtype).to(device)


def layouts(
    device, dtype, requires_grad=False, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Named leaves of many shapes and, for one shape, of every kind of strides."""
    for shape in SHAPES:
        name = "x".join(map(str, shape)) or "0d"
        yield name, normal(shape, device, dtype, seed).requires_grad_(requires_grad)
    for name, make in STRIDES.items():
        yield name, make((6, 9), device, dtype, seed).requires_grad_(requires_grad)
    inner_channels = channels_last((2, 3, 4, 5), device, dtype, seed)
    yield "channels_last", inner_channels.requires_grad_(requires_grad)


def _contiguous(shape, device, dtype, seed=0):
    return normal(shape, device, dtype, seed)


def _transposed(shape, device, dtype, seed=0):
    return normal(shape[::-1], device, dtype, seed).permute(*reversed(range(len(shape))))


def _sliced(shape, device, dtype, seed=0):
    *outer, rows, columns = shape
    return normal((*outer, 2 * rows, 3 * columns), device, dtype, seed)[..., ::2, 1::3]


def _expanded(shape, device, dtype, seed=0):
    return normal((*shape[:-1], 1), device, dtype, seed).expand(shape)


def _unaligned(shape, device, dtype, seed=0):
    return normal((math.prod(shape) + 1,), device, dtype, seed)[1:].view(shape)


def channels_last(shape, device, dtype, seed=0):
    """A 4-d tensor whose second dimension lies innermost."""
    return normal(shape, device, dtype, seed).to(memory_format=torch.channels_last)


STRIDES = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
    "unaligned": _unaligned,
}
"""Name -> maker of a tensor ``(shape, device, dtype, seed)`` of two or more dimensions with those
strides."""


def special_values(device, dtype, repeat: int = 1) -> torch.Tensor:
    """±0, ±inf, NaN and the smallest normal numbers of either sign, ``repeat`` times."""
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).tiny
    values = [0.0, -0.0, inf, -inf, nan, tiny, -tiny] * repeat
    return torch.tensor(values, dtype=dtype, device=device)
