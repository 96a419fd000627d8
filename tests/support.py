"""Parametrization over the registry: op × backend × device × dtype × sample input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab.check import with_visible_step  # noqa: F401 -- the tests take it from here


def configurations(include_eager: bool = False) -> list:
    """(backend, device) pairs; those that cannot run here are skipped with the reason."""
    found = []
    for name, backend in BACKENDS.items():
        if name == "eager" and not include_eager:
            continue
        for device in backend.devices:
            reason = backend.unavailable(device)
            marks = [pytest.mark.skip(reason=f"{name} on {device}: {reason}")] if reason else []
            found.append(pytest.param(name, device, id=f"{name}-{device}", marks=marks))
    return found


def samples(
    keep: Callable[[registry.Op, registry.SampleInput], bool] = lambda op, sample: True,
    tier: Callable[[registry.Op, registry.SampleInput], str | None] = lambda op, sample: None,
) -> list:
    """(op, index of a sample input), named after both.

    Args:
        keep: which samples.
        tier: the marker of those that the plain tier leaves out, ``slow`` or ``exhaustive``.
    """
    found = []
    for op in registry.ops().values():
        for index, sample in enumerate(op.sample_inputs("cpu", torch.float64)):
            if keep(op, sample):
                marks = [getattr(pytest.mark, name)] if (name := tier(op, sample)) else []
                found.append(pytest.param(op, index, id=f"{op.name}-{sample.name}", marks=marks))
    return found


def sample(op: registry.Op, index: int, device: str, dtype: torch.dtype, requires_grad: bool):
    """The sample input that ``samples`` named, made anew."""
    made = list(op.sample_inputs(torch.device(device), dtype, requires_grad=requires_grad))
    return made[index]


def raw_ops() -> list:
    """(op, raw op) for every raw op of the registry."""
    return [
        pytest.param(op, raw_op, id=raw_op.name)
        for op in registry.ops().values()
        for raw_op in op.raw_ops
    ]


def through(op: registry.Op, backend: str) -> Callable:
    """The op's public function on one backend."""

    def function(*args, **kwargs):
        return op.function(*args, **kwargs, backend=backend)

    return function


def dtype_id(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
