"""The table of all ops: what an op is, and where the ops are found.

The registry is the only list of ops and it is made from the files of ``pyext/ops/``: tests,
benchmarks, the doctor and the report iterate over it, so a new op is one new file per way.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
"""As the command lines take them: ``float64`` …"""


@dataclass(frozen=True)
class SampleInput:
    """One valid call, ``op.function(*args, **kwargs)``, in the sense of PyTorch's OpInfo."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    gradcheckable: bool = True
    """False where finite differences are meaningless (NaN and infinity, or exactly on the kink) or
    take too many evaluations."""


@dataclass(frozen=True)
class ErrorInput:
    """One call that an op must refuse, with the exception that says so."""

    args: tuple[Any, ...]
    error_type: type[Exception]
    error_regex: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class RawOp:
    """One launchable piece without autograd, registered with the dispatcher in every namespace."""

    name: str
    fake: Callable[..., Any]
    """Shape, dtype and stride propagation: what the op returns for meta tensors."""
    samples: Callable[[torch.device, torch.dtype], Iterator[tuple[Any, ...]]]
    """Valid arguments, for ``torch.library.opcheck``."""
    mutates: tuple[str, ...] = ()
    """Names of the arguments that the op updates in place (step ops)."""


@dataclass(frozen=True)
class Cost:
    """What a call must at least move and do; a floor follows from the machine's ceilings."""

    bytes: int
    """Bytes read plus bytes written, every operand touched once."""
    flops: int
    """Floating-point operations; a fused multiply-add counts as two."""
    unit: str
    """Whose rate bounds ``flops``: ``"elementwise"`` (FMA units) or ``"matmul"``."""


@dataclass(frozen=True)
class TimedEager:
    """What a user of PyTorch runs, where ``Op.eager`` is a formula that nobody would for speed.

    It may draw random numbers of its own, so that it is not compared with ``Op.eager``.
    """

    function: Callable[..., Any]
    """The same positional signature as ``Op.eager``."""
    expected: Callable[..., tuple[dict[str, torch.Tensor], str]]
    """``(results, benchmark args, gradient of the output)``: what the named results (``out``,
    ``grad_0``) should have been in float64, given the random numbers that they show, and what is
    improbable about those ("" if nothing)."""


@dataclass(frozen=True)
class Op:
    """Everything the lab knows of one op; built at the end of its file in ``pyext/ops/``."""

    name: str
    function: Callable[..., Any]
    """The public function, with the keyword ``backend``."""
    eager: Callable[..., Any]
    """The reference: the same positional signature in pure PyTorch ops."""
    raw_ops: tuple[RawOp, ...]
    sample_inputs: Callable[..., Iterator[SampleInput]]
    """``(device, dtype, requires_grad=False)``: what the op must accept."""
    error_inputs: Callable[[torch.device], Iterator[ErrorInput]]
    """``(device)``: what the op must refuse, leaving every tensor as it was."""
    reduction_length: Callable[..., int]
    """``(*args, **kwargs)``: how many terms the longest sum of the op (or its gradient) has."""
    benchmark_shapes: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]]
    """Device type -> profile -> shapes; what the numbers of a shape mean is ``shape_names``."""
    shape_names: tuple[str, ...]
    benchmark_inputs: Callable[..., tuple[Any, ...]]
    """``(shape, dtype, device, generator)``: random normal arguments for ``function``. What feeds
    a kink lies on a grid on which sums are exact, so that no rounding flips a ReLU."""
    cost: Callable[[str, tuple[int, ...], int], Cost]
    """``(direction, shape, itemsize)``."""
    directions: tuple[str, ...] = ("forward", "backward", "both")
    is_step: bool = False
    """Updates its arguments in place and has no derivative."""
    dtypes: tuple[torch.dtype, ...] = FLOATING_DTYPES
    """Floating dtypes; others that a forward accepts are among ``sample_inputs``."""
    cpu_raw_ops: tuple[RawOp, ...] = ()
    """Those that only ``extension`` has, for CPU tensors: fusions of ``raw_ops`` that pay there."""
    by_hand: Callable[..., Any] | None = None
    """The ``eager-inplace`` peer: the same work written by hand without autograd. The same
    arguments, then the gradient of an output that is not a 0-d loss; returns the loss or output and
    the gradients that autograd would have left."""
    timed_eager: TimedEager | None = None
    """What is timed as ``eager``, compiled and captured, where that is not ``eager`` itself."""

    @property
    def baseline(self) -> Callable[..., Any]:
        """What a user of PyTorch runs: ``eager``, unless ``timed_eager`` says otherwise."""
        return self.timed_eager.function if self.timed_eager else self.eager


@functools.cache
def ops() -> dict[str, Op]:
    """Name -> op for every file of ``pyext/ops/`` that holds one, sorted by name."""
    package = importlib.import_module("pyext.ops")
    names = sorted(
        info.name for info in pkgutil.iter_modules(package.__path__) if info.name[0] != "_"
    )
    return {name: importlib.import_module(f"pyext.ops.{name}").OP for name in names}


def get(name: str) -> Op:
    """The op called ``name``; ``ValueError`` names those there are."""
    try:
        return ops()[name]
    except KeyError:
        known = ", ".join(ops())
        raise ValueError(f"unknown op {name!r}; the ops are {known}") from None
