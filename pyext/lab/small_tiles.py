"""Triton's kernels in many small programs, with K split: what else only large operands would reach,
in an interpreter that takes as few programs as it can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from pyext.backends import BACKENDS

# Several tiles each way, odd edges, and a K that splits unevenly. By the last of a shape's names.
SHAPES = {
    "n": (1001,),
    "out": (20, 70, 36, 18),
    "kernel": (2, 3, 13, 17, 3),
    "steps": (20, 70, 36, 18, 2),
}


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """While it lasts, every launch has tiles of 16 x 16 or 64 elements, and sums have parts."""
    BACKENDS["triton"].raw  # noqa: B018  imports the kernels
    from pyext.kernels import (
        _reduction,
        _tiling,
        _tuned,
        adadelta_step,
        dropout,
        mse_loss,
        relu,
        relu_max_pool2d,
    )

    def tiling_of(product: _tiling.Product, device: torch.device) -> _tiling.Tiling:
        return _tiling.Tiling(16, 16, 16, splits=3 if product.k > 32 else 1, warps=1, stages=1)

    with contextlib.ExitStack() as patches:

        def replace(module: object, name: str, value: object) -> None:
            patches.enter_context(mock.patch.object(module, name, value))

        replace(_tuned, "tiling_of", tiling_of)
        replace(mse_loss, "MAX_PROGRAMS", 5)
        replace(_reduction, "PARTIALS_PER_STEP", 2)
        for module in (adadelta_step, dropout, mse_loss, relu):
            replace(module, "block_size", lambda n, itemsize: 64)
        replace(relu_max_pool2d, "block_size", lambda n: 64)
        yield
