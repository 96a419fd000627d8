"""Which kernels an op's call launches on a GPU, found without one."""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab.compile_report.cuda_rows import split_signature
from pyext.lab.roofline import dtype_name

_LARGEST_COST = 2**28  # bytes that a call may touch; its operands are allocated on the CPU


@dataclass(frozen=True)
class Call:
    """One call of an op at a benchmark shape, forward and backward, or a step."""

    op: str
    direction: str
    shape: list[int]
    dtype: str
    language: str
    kernels: dict[str, int]
    """Name -> number of launches."""

    @classmethod
    def of(
        cls,
        op: registry.Op,
        shape: Sequence[int],
        dtype: torch.dtype,
        language: str,
        kernels: Sequence[str],
    ) -> Call:
        """A call that launched ``kernels``, in that order."""
        direction, launches = op.directions[-1], dict(Counter(kernels))
        return cls(op.name, direction, list(shape), dtype_name(dtype), language, launches)

    def to_json(self) -> dict[str, Any]:
        """The call as one process tells another."""
        return asdict(self)


def gpu_shapes(op: registry.Op) -> list[tuple[int, ...]]:
    """The GPU's benchmark shapes that fit this machine: with the op's real tiles and splits."""
    direction = op.directions[-1]
    full = op.benchmark_shapes["cuda"]["full"]
    return [shape for shape in full if op.cost(direction, shape, 1).bytes <= _LARGEST_COST]


def run(op: registry.Op, args: tuple, kwargs: dict[str, Any], backend: str) -> None:
    """Calls an op, and backward after it where there is one."""
    result = op.function(*args, **kwargs, backend=backend)
    if result is not None and result.requires_grad:  # some steps return nothing
        result.backward(torch.ones_like(result))


def why_no_cuda_calls() -> str | None:
    """Why :func:`cuda_calls` cannot be asked, in a sentence; None if it can."""
    return BACKENDS["extension-emulated"].unavailable("cpu")


@contextlib.contextmanager
def dry_run(multiprocessors: int) -> Iterator[list[str]]:
    """Within it the emulator runs no kernel; afterwards the list names those that it was given.

    Args:
        multiprocessors: of the GPU whose launches are wanted.
    """
    emulator = ctypes.CDLL(str(BACKENDS["extension-emulated"].library))
    emulator.pyext_emulator_launches.restype = ctypes.c_char_p
    launches: list[str] = []
    emulator.pyext_emulator_dry_run(multiprocessors)
    try:
        yield launches
        signatures = emulator.pyext_emulator_launches().decode().splitlines()
        launches.extend(split_signature(each)[0] for each in signatures)
    finally:
        emulator.pyext_emulator_dry_run(0)


def cuda_calls(dtypes: Sequence[str], multiprocessors: int) -> Iterator[Call]:
    """Every op at its GPU benchmark shapes, by a dry run of the emulator, which runs no kernel.

    Args:
        dtypes: of the ops' tensors.
        multiprocessors: of the GPU whose launches are wanted.

    Raises:
        BuildError: the emulator does not compile.
    """
    for op in registry.ops().values():
        for shape in gpu_shapes(op):
            for name in dtypes:
                dtype = getattr(torch, name)
                args = op.benchmark_inputs(shape, dtype, "cpu", torch.Generator().manual_seed(0))
                with dry_run(multiprocessors) as launches:
                    run(op, args, {}, "extension-emulated")
                yield Call.of(op, shape, dtype, "cuda", launches)
