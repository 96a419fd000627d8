"""Hashes of a backend's outputs: ``python -m pyext.lab.mutants.outputs BACKEND FILE``.

Two libraries whose hashes agree do the same bit by bit, on every raw op's sample inputs in every
dtype and on larger random ones (Triton's interpreted kernels: in many small programs, too). That is
how an automatic mutant which changes nothing is told from one that no test has noticed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import check, small_tiles
from pyext.lab.mutants import witness

CPU = torch.device("cpu")
# Several tiles, blocks and threads: odd numbers around them.
LARGE = {
    "n": ((70_003,), (200_003,)),
    "out": ((203, 700, 301, 37), (64, 1000, 100, 10), (3, 5, 2100, 3), (700, 33, 20, 130)),
    "kernel": ((3, 8, 63, 61, 2), (2, 8, 40, 64, 2), (2, 4, 40, 37, 3)),
    "steps": ((64, 1000, 100, 10, 2),),
}
LARGE_INTERPRETED = {
    "n": ((70_003,), (200_003,)),
    "out": ((70, 300, 65, 37),),
    "kernel": ((2, 8, 40, 64, 2),),
    "steps": ((20, 70, 36, 18, 2),),
}


def main(backend: str, file: str) -> int:
    """Writes case -> hash, and what was loaded, as JSON. A case that raises has its exception."""
    # As in every run of the tests: what is loaded is the evidence.
    BACKENDS["extension"].unavailable("cpu")
    found = {}
    for name, compute in cases(backend):
        try:
            found[name] = _digest(compute())
        except Exception as error:  # noqa: BLE001 -- that it raises is what it does
            found[name] = f"{type(error).__name__}: {error}"
        Path(file).write_text(json.dumps({"hashes": found}))  # shows that it does not hang
    Path(file).write_text(json.dumps({"hashes": found, "loaded": witness.loaded()}))
    return 0


def cases(backend: str) -> Iterator[tuple[str, Any]]:
    """(name, function without arguments) for everything that is compared."""
    for op in registry.ops().values():
        for raw_op in op.raw_ops:
            call = getattr(BACKENDS[backend].raw, raw_op.name)
            for dtype in registry.FLOATING_DTYPES:
                for number, args in enumerate(raw_op.samples(CPU, dtype)):
                    yield (
                        f"{raw_op.name} {dtype} {number}",
                        lambda args=args, call=call: (
                            call(*args),
                            args,
                        ),
                    )
        interpreted = BACKENDS[backend].interpreted
        for shape in (LARGE_INTERPRETED if interpreted else LARGE)[op.shape_names[-1]]:
            for dtype in op.dtypes:
                yield (
                    f"{op.name} {dtype} {shape}",
                    lambda op=op, shape=shape, dtype=dtype: _random(op, shape, dtype, backend),
                )
        for dtype in op.dtypes if backend == "triton" else ():
            shape = small_tiles.SHAPES[op.shape_names[-1]]
            yield (
                f"{op.name} {dtype} {shape} in small tiles",
                lambda op=op, shape=shape, dtype=dtype: _in_small_tiles(op, shape, dtype, backend),
            )


def _in_small_tiles(op: registry.Op, shape: tuple[int, ...], dtype: torch.dtype, backend: str):
    with small_tiles.small_tiles():
        return _random(op, shape, dtype, backend)


def _random(op: registry.Op, shape: tuple[int, ...], dtype: torch.dtype, backend: str):
    args = op.benchmark_inputs(shape, dtype, CPU, torch.Generator().manual_seed(0))

    def function(*args, **kwargs):
        return op.function(*args, **kwargs, backend=backend)

    return check.call(op, function, args)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, torch.Tensor):
            digest.update(f"{each.dtype} {tuple(each.shape)} {each.stride()}".encode())
            digest.update(each.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(each, dict):
            add(tuple(each.items()))
        elif isinstance(each, (tuple, list)):
            for item in each:
                add(item)
        else:
            digest.update(repr(each).encode())

    add(value)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
