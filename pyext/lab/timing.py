"""One case with all its variants: verified, timed by every clock, and verified again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyext.lab import measure
from pyext.lab.cases import Case, Inputs, Variant, backend_variant
from pyext.lab.measure import Effort, Samples
from pyext.lab.peers import Peers, Unavailable, kind_of

QUICK = Effort(warmup_s=0.03, measure_s=0.12, patience_s=0.2)
FULL = Effort(warmup_s=0.2, measure_s=0.6, blocks=20, patience_s=4.0)


@dataclass
class Outcome:
    """What became of one variant of a case."""

    name: str
    kind: str
    status: str = "ok"
    reason: str | None = None
    rel_err: float | None = None
    times: dict[str, Samples | str] = field(default_factory=dict)
    """Clock -> samples, or why that clock cannot time the variant. Empty unless ``ok``."""

    def to_json(self) -> dict[str, Any]:
        """For another process; :meth:`from_json` reads it."""
        times = {
            clock: each if isinstance(each, str) else each.to_json()
            for clock, each in self.times.items()
        }
        return {**vars(self), "times": times}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """The inverse of :meth:`to_json`."""
        times = {
            clock: each if isinstance(each, str) else Samples.from_json(each)
            for clock, each in data["times"].items()
        }
        return cls(**{**data, "times": times})


def build(name: str, inputs: Inputs, case: Case, peers: Peers) -> Variant | Outcome | None:
    """The variant called ``name``, or what prevents it; None where it does not exist by nature."""
    kind = kind_of(name)
    try:
        if kind == "peer":
            return peers.variant(name, inputs, case)
        return backend_variant(name, inputs, case)
    except Unavailable as error:
        return Outcome(name, kind, "unavailable", str(error))
    except Exception as error:  # noqa: BLE001 -- whatever it is, the others' rows matter
        return failed(name, error)


def verified(backend: str, inputs: Inputs, case: Case) -> Outcome:
    """Whether a backend is right on the case, through the call that would be timed."""
    built = build(backend, inputs, case, Peers())
    return built if isinstance(built, Outcome) else _verified(built, inputs)


def time_case(
    case: Case, inputs: Inputs, names: Iterable[str], peers: Peers, effort: Effort, seed: int
) -> list[Outcome]:
    """Verifies the variants, times those that are right, interleaved, and verifies them again.

    Args:
        case: what to time.
        inputs: its tensors.
        names: backends and peers.
        peers: makes the peers.
        effort: how long.
        seed: of the order.

    Returns:
        One outcome for each variant that exists, in the order of ``names``.
    """
    built = [each for name in names if (each := build(name, inputs, case, peers)) is not None]
    outcomes = {each.name: each for each in built if isinstance(each, Outcome)}
    variants = [each for each in built if isinstance(each, Variant)]
    for variant in variants:
        outcomes[variant.name] = _verified(variant, inputs)
    ready = [variant for variant in variants if outcomes[variant.name].status == "ok"]
    device = torch.device(case.device)
    subjects = [variant.subject for variant in ready]
    for clock in measure.CLOCKS[device.type] if ready else ():
        times = measure.measure(subjects, clock, effort, device=device, seed=seed)
        for name, samples in times.items():
            outcomes[name].times[clock] = samples
    for variant in ready:
        again = _verified(variant, inputs)
        if again.status != "ok":
            again.reason = f"right before the timing, not after it: {again.reason}"
            outcomes[variant.name] = again
    return [outcomes[each.name] for each in built]


def _verified(variant: Variant, inputs: Inputs) -> Outcome:
    outcome = Outcome(variant.name, variant.kind)
    try:
        result = variant.verify(inputs)
    except Exception as error:  # noqa: BLE001 -- a variant that raises is one failed row
        return failed(variant.name, error)
    outcome.rel_err = result.rel_err
    if not result.ok:
        outcome.status, outcome.reason = "wrong", result.detail
    return outcome


def failed(name: str, error: Exception | str) -> Outcome:
    """A backend that raises, or whose process dies, has failed its check; a peer is then merely not
    to be had."""
    reason = error
    if isinstance(error, Exception):
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    kind = kind_of(name)
    return Outcome(name, kind, "error" if kind == "backend" else "unavailable", reason[:300])
