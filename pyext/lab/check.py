"""Whether a result is right: the reference is ``eager`` in float64, the tolerance is derived.

A sum of L terms kept in an accumulation type of precision eps_acc has an error that grows as the
random walk eps_acc √L relative to the result's scale; each tensor that is stored on the way rounds
once by eps of the dtype. Hence, relative to the largest reference value,

    tolerance = 4 eps(dtype) + 2 √L eps(accumulation type)

where four covers the longest chain of stored intermediates in an op and its gradient (hidden, the
output, the loss's gradient, the result). For float32 and L = 1000 that is 8e-6. A result that is
all zeros, or noise of the output's own size, is off by 1.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyext.registry import Op

Named = dict[str, torch.Tensor]
_PART = 1 << 18  # elements that are compared at once; 2 MiB for each intermediate


@dataclass(frozen=True)
class CheckResult:
    """The verdict on one call."""

    ok: bool
    rel_err: float
    """Largest ‖actual - reference‖ / ‖reference‖ (2-norms, finite elements) of any result; NaN
    where a result has the wrong shape or dtype."""
    detail: str
    """The first result that is off, and by how much; empty if none is."""

    def __bool__(self) -> bool:
        return self.ok


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Allowed error relative to the largest reference value; see the module's docstring.

    Args:
        dtype: of the result.
        terms: the number of terms in the longest sum (``Op.reduction_length``).
    """
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = 4 * torch.finfo(dtype).eps + 2 * math.sqrt(max(terms, 1)) * accumulated
    if bound > 0.1:
        raise ValueError(f"a tolerance of {bound:.2g} would accept anything ({terms} terms)")
    return bound


def compare(actual: Named, expected: Named, terms: int, before: Named | None = None) -> CheckResult:
    """Compares named results with float64 references of the same names.

    NaN and infinities must be in the same places; a reference beyond the dtype's range counts as
    infinite. Finite elements may differ by ``tolerance`` times the largest finite reference value.
    A result that is None stands for an absent gradient and must be None in both.

    Args:
        actual: what was computed.
        expected: the references.
        terms: the number of terms in the longest sum (``Op.reduction_length``).
        before: for those results that are tensors updated in place, their values before. Then the
            *update* is compared, so that a step which does nothing is off by 1.
    """
    if actual.keys() != expected.keys():
        return CheckResult(False, math.nan, f"results are {list(actual)}, not {list(expected)}")
    worst = 0.0
    for name, reference in expected.items():
        value = actual[name]
        if value is None or reference is None:
            if value is not reference:
                return CheckResult(False, math.nan, f"{name}: only one of both is None")
            continue
        if value.shape != reference.shape:
            detail = f"{name}: shape {tuple(value.shape)}, not {tuple(reference.shape)}"
            return CheckResult(False, math.nan, detail)
        rel_err, detail = _compare_one(value, reference, terms, (before or {}).get(name))
        worst = max(worst, rel_err)
        if detail:
            return CheckResult(False, worst, f"{name}: {detail}")
    return CheckResult(True, worst, "")


def _compare_one(
    value: torch.Tensor, reference: torch.Tensor, terms: int, before: torch.Tensor | None
) -> tuple[float, str]:
    """(relative error, what is wrong or "")."""
    if not value.dtype.is_floating_point:
        wrong = int((value != reference.to(value.dtype)).sum())
        return float(wrong > 0), f"{wrong} of {value.numel()} integers differ" if wrong else ""
    found = _Distance(value.dtype)
    for part in _parts(value, reference.to(value.device), before):
        found.add(*part)
    if found.misplaced:
        return math.inf, f"{found.misplaced} elements are wrongly NaN, infinite or finite"
    rel_err = math.sqrt(found.error_squares / found.squares) if found.squares else 0.0
    info, scale = torch.finfo(value.dtype), found.scale
    # Near the bottom of the range a result rounds to a multiple of the smallest subnormal.
    allowed = tolerance(value.dtype, terms) * scale + info.smallest_normal * info.eps
    if before is not None:
        stored = info.eps * found.stored
        if scale and stored > 0.1 * scale:
            return rel_err, (
                f"the update ({scale:.3g}) is too small beside what storing the result rounds away "
                f"({stored:.3g}) to be checked; take a larger step"
            )
        allowed += stored
    if found.worst <= allowed:
        return rel_err, ""
    return rel_err or math.inf, (
        f"off by {found.worst:.3g} where {allowed:.3g} is allowed (values up to {scale:.3g}, "
        f"{value.dtype}, {terms} terms)"
    )


def _parts(*tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Tensors of one shape, cut into equal pieces.

    A comparison makes a dozen float64 intermediates. At 2^24 elements on a CPU they are fresh
    memory and take 0.80 s; in pieces that stay in the caches, 0.18 s.
    """
    flat = [each if each is None else each.detach().reshape(-1) for each in tensors]
    for start in range(0, flat[0].numel(), _PART):
        yield tuple(each if each is None else each[start : start + _PART] for each in flat)


class _Distance:
    """What a comparison of floating-point results sums up over their parts."""

    def __init__(self, dtype: torch.dtype):
        info = torch.finfo(dtype)
        # What rounds to infinity: from the largest number plus half its last place on.
        self._limit = info.max * (1 + info.eps / 4)
        self.misplaced = 0  # NaN, infinite or finite where the reference is not
        self.squares = self.error_squares = 0.0
        self.scale = self.worst = self.stored = 0.0

    def add(
        self, value: torch.Tensor, reference: torch.Tensor, before: torch.Tensor | None
    ) -> None:
        actual = value.double()
        infinite = torch.full_like(reference, math.inf).copysign(reference)
        reference = torch.where(reference.abs() >= self._limit, infinite, reference)
        finite = reference.isfinite()
        misplaced = torch.where(reference.isnan(), ~actual.isnan(), ~finite & (actual != reference))
        self.misplaced += int((misplaced | finite & ~actual.isfinite()).sum())
        error = torch.where(finite, actual - reference, 0)
        self.worst = max(self.worst, error.abs().max().item())
        self.error_squares += error.square().sum().item()
        if before is not None:
            before = torch.where(finite, before.double().to(value.device), 0)
            reference = reference - before
            stored = torch.maximum(before.abs(), torch.where(finite, actual, 0).abs())
            self.stored = max(self.stored, stored.max().item())
        reference = torch.where(finite, reference, 0)
        self.scale = max(self.scale, reference.abs().max().item())
        self.squares += reference.square().sum().item()


def call(
    op: Op,
    function: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    backward: bool = True,
) -> Named:
    """Runs ``function(*args, **kwargs)`` and names what it computed.

    Args:
        op: the op that ``function`` computes, with the same random numbers at every call.
        function: ``op.function``, ``op.eager`` or a peer.
        args: its arguments. A step op's tensors are cloned first; others are detached, and those
            that require grad get their gradients reported.
        kwargs: its keyword arguments.
        backward: whether to run backward, for a fixed random gradient of the output.

    Returns:
        ``out`` and ``grad_0`` … (by position) for an op; ``loss``, if it returns one, and all
        arguments that are tensors (``arg_2`` …) for a step op.
    """
    with same_random_numbers():
        return _call(op, function, args, kwargs or {}, backward)


def _call(op: Op, function: Callable[..., Any], args: tuple, kwargs, backward: bool) -> Named:
    copies = [_copy(each, op.is_step) for each in args]
    if op.is_step:
        loss = function(*copies, **kwargs)
        results = {} if loss is None else {"loss": loss}
        names = [f"arg_{i}" for i, each in enumerate(args) if isinstance(each, torch.Tensor)]
        tensors = [each for each in copies if isinstance(each, torch.Tensor)]
        return results | dict(zip(names, tensors, strict=True))
    out = function(*copies, **kwargs)
    results = {"out": out.detach()}
    if backward and out.requires_grad:
        out.backward(grad_output(out))
        results |= {
            f"grad_{i}": each.grad
            for i, each in enumerate(copies)
            if isinstance(each, torch.Tensor) and each.requires_grad
        }
    return results


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """PyTorch's default generators are at the same place at every start, and go on afterwards as
    if nothing had happened."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(20)
        yield


def grad_output(out: torch.Tensor) -> torch.Tensor:
    """The gradient that checks feed to backward: random normal, the same for every dtype."""
    generator = torch.Generator().manual_seed(20)
    values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    # Rounded to the coarsest dtype, so that float64 references see the very same numbers.
    return values.to(torch.bfloat16).to(out.device, out.dtype)


def reference(
    op: Op, args: tuple, kwargs: Mapping[str, Any] | None = None, backward: bool = True
) -> Named:
    """What ``call`` would return if computed exactly: ``op.eager`` in float64, same values."""
    return call(op, op.eager, tuple(map(_double, args)), kwargs, backward)


def verify(
    op: Op,
    function: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any] | None = None,
    backward: bool = True,
    expected: Named | None = None,
) -> CheckResult:
    """Runs ``function`` and compares outputs, gradients and in-place updates with the reference.

    Args:
        op, function, args, kwargs, backward: as for ``call``.
        expected: what ``reference`` returned for the same arguments, if that is at hand.
    """
    if expected is None:
        expected = reference(op, args, kwargs, backward)
    actual = call(op, function, args, kwargs, backward)
    terms = op.reduction_length(*args, **(kwargs or {}))
    return compare(actual, expected, terms, before_step(op, args))


def before_step(op: Op, args: tuple) -> Named | None:
    """What a step op will update, named as ``call`` names it; None for any other op."""
    if not op.is_step:
        return None
    named = {f"arg_{i}": each for i, each in enumerate(args) if torch.is_tensor(each)}
    return {name: each for name, each in named.items() if name in _mutated(op)}


def with_visible_step(op: Op, args: tuple) -> tuple:
    """Benchmark arguments; a step op's learning rate such that a small bfloat16 weight moves.

    Of an op that takes several steps: one, where the dtype is that narrow; else as they are.
    """
    names = list(inspect.signature(op.eager).parameters)
    if not op.is_step or ("steps" in names and torch.finfo(args[0].dtype).bits > 16):
        return args
    position = names.index("lr")
    args = (*args[:position], max(args[position], 2.0**-6), *args[position + 1 :])
    return tuple(1 if name == "steps" else each for name, each in zip(names, args, strict=False))


def _mutated(op: Op) -> set[str]:
    """A step op's arguments that it updates, as ``call`` names them."""
    (raw_op,) = op.raw_ops
    names = list(inspect.signature(op.eager).parameters)
    return {f"arg_{names.index(name)}" for name in raw_op.mutates}


def _copy(value: Any, clone: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # clone() keeps the strides of a dense tensor; an expanded or sliced one stays as it is.
    detached = value.detach()
    if clone:
        detached = _clone_strided(detached)
    return detached.requires_grad_(value.requires_grad)


def _clone_strided(value: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides and the same offset to a 16-byte boundary."""
    if not value.numel():
        return value.clone()
    span = sum(s * (n - 1) for s, n in zip(value.stride(), value.shape, strict=True)) + 1
    offset = value.data_ptr() % 16 // value.element_size()
    memory = value.new_empty(span + offset)
    copy = memory.as_strided(value.shape, value.stride(), offset)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
    copy[once].copy_(value[once])  # an expanded dimension cannot be written as a whole
    return copy


def _double(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
