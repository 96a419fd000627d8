"""The lab's main job: every op, every backend and peer, checked and timed on this machine.

``benchmarks/run.py`` is its command line. The order is: ceilings, the ops with all variants
interleaved, those with preallocated outputs in a process of their own, Triton in its interpreter,
each variant alone, the ceilings once more, and the MNIST training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyext import registry
from pyext.backends import BACKENDS, backends
from pyext.lab import environment, host_path, isolated, measure, roofline
from pyext.lab.cases import ALLOCATED, PREALLOCATED, Case, Inputs, cases
from pyext.lab.measure import Effort, Samples
from pyext.lab.peers import PEERS, Peers, kind_of, why_unavailable
from pyext.lab.results import FAILURES, Results, fill_floor, fill_times, new_row
from pyext.lab.timing import FULL, QUICK, Outcome, time_case, verified

MNIST = "mnist"
COMPILED = ("compile", "compile-max")
# Every mnist run needs about this long in the quick profile, and the plots and tables that.
_MNIST_S, _REPORT_S = 36.0, 7.0
# A process of its own for a variant, in the quick profile: 2 s to start, the rest measuring.
_ALONE_S = 12.0
# Triton's interpreter runs a thousand times slower: enough elements for several blocks and a tail.
_INTERPRETED_ELEMENTS, _INTERPRETED_EXTENT = 3000, 40
OUT_OF_TIME = "the time was used up; --profile full without --minutes leaves nothing out"
"""Why a row was skipped."""


@dataclass(frozen=True)
class Profile:
    """How much a run does unless told otherwise."""

    dtypes: dict[str, tuple[str, ...]]
    """Device type -> dtypes."""
    peers: tuple[str, ...]
    effort: Effort
    alone: Effort
    alone_directions: tuple[str, ...]
    """The directions in which every variant is also timed alone."""
    alone_outputs: tuple[str, ...]
    """The kinds of rows in which it is: with outputs allocated, or preallocated."""
    preallocated: tuple[str, ...]
    """The directions that are also timed with preallocated outputs, on a CPU."""
    host_path: bool
    """Whether small calls are taken apart."""
    limit_s: float | None
    """When time runs short, peers are left out rather than this exceeded."""


PROFILES = {
    "quick": Profile(
        dtypes={"cpu": ("float32",), "cuda": ("float32",)},
        peers=("eager-inplace", "compile", "graph", "jax"),
        effort=QUICK,
        alone=dataclasses.replace(QUICK, measure_s=0.06),
        alone_directions=("both", "step"),
        alone_outputs=(ALLOCATED,),
        preallocated=("both",),
        host_path=False,
        limit_s=225.0,
    ),
    "full": Profile(
        dtypes={"cpu": ("float32",), "cuda": ("float32", "bfloat16", "float16")},
        peers=PEERS,
        effort=FULL,
        # Twice FULL's, for what takes milliseconds and is often at its best here: its interval was
        # up to 10 % wide of 20 samples of two_layer at 1024 x 784 x 512 x 10.
        alone=dataclasses.replace(FULL, measure_s=1.2),
        alone_directions=("forward", "backward", "both", "step"),
        alone_outputs=(ALLOCATED, PREALLOCATED),
        preallocated=("forward", "backward", "both"),
        host_path=True,
        limit_s=None,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What one run is to do."""

    device: torch.device
    suites: tuple[str, ...]
    """Names of ops, and ``mnist``."""
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], ...]]
    """Op -> shapes."""
    profile: str
    seed: int
    effort: Effort
    alone: Effort | None
    """None: nothing is timed alone."""
    limit_s: float | None

    @property
    def ops(self) -> list[registry.Op]:
        """The suites that are ops."""
        return [registry.get(name) for name in self.suites if name != MNIST]

    def to_json(self) -> dict[str, Any]:
        """The ``settings`` object of a result file."""
        return {
            "suites": list(self.suites),
            "backends": list(self.backends),
            "peers": list(self.peers),
            "dtypes": list(self.dtypes),
            "shapes": {op: [list(shape) for shape in each] for op, each in self.shapes.items()},
            "profile": self.profile,
            "effort": dataclasses.asdict(self.effort),
            "alone": dataclasses.asdict(self.alone) if self.alone else None,
            "clocks": list(measure.CLOCKS[self.device.type]),
        }


Progress = Callable[[str, float], None]
"""``(what is going on, share of the phase that is done)``."""

Section = tuple[dict[str, Any], list[dict[str, Any]], list[str]]
"""What a workload's comparison adds to a result file: its section, rows and notes."""


class Benchmark:
    """One run. Rows appear in ``results`` as they are finished, and the files with them.

    Args:
        settings: what to do.
        folder: where the files go.
        command: the command line, for the record.
        mnist: trains and compares, in so many seconds; the lab itself knows no workload.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        command: str,
        mnist: Callable[[Settings, Progress, float | None], Section],
    ):
        self.settings = settings
        self._mnist = mnist
        self._mnist_rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self.results = Results(
            folder,
            environment.describe(settings.device, settings.seed, command),
            settings.to_json(),
        )
        self._ceilings: roofline.Ceilings | None = None
        self._timed: dict[Case, list[Outcome]] = {}
        self._alone: dict[tuple[Case, str], dict[str, Samples]] = {}
        self._case_rows: dict[Case, list[dict[str, Any]]] = {}
        self._compile_s = 15.0  # the first compilation also warms the compiler up

    def phases(self) -> Iterator[tuple[str, Callable[[Progress], None]]]:
        """The title of each phase and what runs it; to be run in this order."""
        settings = self.settings
        if settings.ops:
            yield "ceilings", self._measure_ceilings
            yield "ops", self._time_ops
            if any(case.outputs == PREALLOCATED for case in self._cases()):
                yield "ops, outputs preallocated", self._time_preallocated
            if "triton" in settings.backends and settings.device.type == "cpu":
                yield "triton in its interpreter", self._check_interpreted
            if PROFILES[settings.profile].host_path:
                yield "host path of small calls", self._take_small_calls_apart
            if settings.alone and self._soloists():
                yield "each alone", self._time_alone
            yield "ceilings once more", self._measure_ceilings
        if MNIST in settings.suites:
            yield "mnist", self._train_mnist

    def finish(self, *, interrupted: bool) -> None:
        """Writes the files for the last time."""
        data = self.results.data
        data["complete"], data["interrupted"] = not interrupted, interrupted
        data["duration_s"] = round(time.monotonic() - self._started, 1)
        self.results.save()

    # --- phases ----------------------------------------------------------------------------------

    def _measure_ceilings(self, progress: Progress) -> None:
        settings = self.settings
        clocks = measure.CLOCKS[settings.device.type]
        dtypes = [getattr(torch, name) for name in settings.dtypes]
        steps = 2 + 2 * len(dtypes)
        measured = roofline.measure_ceilings(settings.device, dtypes, clocks)
        ceilings = None
        for step, (what, ceilings) in enumerate(measured):  # noqa: B007 -- the last one counts
            progress(what, step / steps)
        # The machine may have been slower then, and a ceiling is the best that it can do.
        self._ceilings = ceilings.with_better(self._ceilings) if self._ceilings else ceilings
        self.results.data["ceilings"] = self._ceilings.to_json()
        self._write_rows(*self._timed)

    def _time_ops(self, progress: Progress) -> None:
        every = [case for case in self._cases() if case.outputs == ALLOCATED]
        peers, inputs, key = Peers(), None, None
        for done, case in enumerate(every):
            if (case.op, case.shape, case.dtype) != key:
                key, inputs = (case.op, case.shape, case.dtype), None  # frees the last one's first
                if self._time_left() < self._after_ops_s():
                    self._leave_out(every[done:])
                    return
                inputs = Inputs(registry.get(case.op), case, self.settings.seed)
                compile_in_time = self._time_left() > self._reserve(len(every) - done)
            progress(case.label, done / len(every))
            self._time(case, inputs, peers, compile_in_time)
            self._write_rows(case)

    def _time_preallocated(self, progress: Progress) -> None:
        """In a process that recycles its memory: this one handles its own as a user's does."""
        settings, jobs, prevented = self.settings, [], {}
        for case in self._cases():
            if case.outputs == PREALLOCATED:
                compiled = any(
                    each.name in COMPILED and each.status == "ok"
                    for each in self._timed[dataclasses.replace(case, outputs=ALLOCATED)]
                )
                names, prevented[case] = self._variants(case, compiled)
                jobs.append((case, names))
        limit = None
        if settings.limit_s is not None:
            limit = max(self._time_left() - self._after_ops_s(), 5.0)
        progress("starting a process", 0.0)
        timed = isolated.time_apart(jobs, settings.effort, settings.seed, limit)
        for done, (case, outcomes) in enumerate(timed):
            progress(case.label, (done + 1) / len(jobs))
            self._timed[case] = outcomes + prevented[case]
            self._write_rows(case)
        if left := [case for case, _ in jobs if case not in self._timed]:
            self._leave_out(left)

    def _leave_out(self, left: Sequence[Case]) -> None:
        """Rows for the cases that there is no time for."""
        for case in left:
            names, prevented = self._variants(case, compile_in_time=False)
            skipped = [Outcome(name, kind_of(name), "skipped", OUT_OF_TIME) for name in names]
            self._timed[case] = skipped + prevented
        self._write_rows(*left)
        self._note_short_of_time(f"{len(left)} cases of ops were not timed")

    def _time(self, case: Case, inputs: Inputs, peers: Peers, compile_in_time: bool) -> None:
        names, prevented = self._variants(case, compile_in_time)
        start = time.monotonic()
        settings = self.settings
        outcomes = time_case(case, inputs, names, peers, settings.effort, settings.seed)
        if set(names) & set(COMPILED):
            self._compile_s = max(5.0, min(self._compile_s, time.monotonic() - start))
        self._timed[case] = outcomes + prevented

    def _check_interpreted(self, progress: Progress) -> None:
        settings = self.settings
        small = [
            case
            for op in settings.ops
            for case in cases(
                op, settings.device, settings.dtypes, [_interpretable(settings.shapes[op.name][0])]
            )
        ]
        if reason := interpreter_missing():
            for case in small:
                self._timed[case] = [Outcome("triton", "backend", "unavailable", reason)]
            self._write_rows(*small)
            return
        limit = None if settings.limit_s is None else max(self._time_left() - _REPORT_S, 20.0)
        progress("starting the interpreter", 0.0)
        checks = isolated.check_interpreted(small, settings.seed, limit)
        for done, (case, outcome) in enumerate(checks):
            progress(case.label, (done + 1) / len(small))
            self._timed[case] = [outcome]
            self._write_rows(case)
        unchecked = [case for case in small if case not in self._timed]
        for case in unchecked:
            self._timed[case] = [Outcome("triton", "backend", "skipped", OUT_OF_TIME)]
        self._write_rows(*unchecked)

    def _take_small_calls_apart(self, progress: Progress) -> None:
        """A backend that is wrong there, before or after, has a row that says so instead."""
        settings, device = self.settings, str(self.settings.device)
        jobs = [
            (op, backend)
            for op in settings.ops
            for backend in settings.backends
            if getattr(torch, settings.dtypes[0]) in op.dtypes
            and BACKENDS[backend].namespace
            and not BACKENDS[backend].interpreted
            and not BACKENDS[backend].unavailable(device, op.name)
        ]
        self.results.data["host_path"] = found = []
        for done, (op, backend) in enumerate(jobs):
            progress(f"{op.name} {backend}", done / len(jobs))
            if self._time_left() < self._after_ops_s():
                self._note_short_of_time(
                    f"{len(jobs) - done} of {len(jobs)} small calls were not taken apart"
                )
                break
            case = host_path.small_case(op, settings.dtypes[0], device)
            inputs = Inputs(op, case, settings.seed)
            outcome = verified(backend, inputs, case)
            if outcome.status == "ok":
                path = host_path.host_path(case, inputs, backend, settings.alone or QUICK)
                outcome = verified(backend, inputs, case)
            if outcome.status == "ok":
                found.append(path.to_json())
            else:
                self._timed.setdefault(case, []).append(outcome)
                self._write_rows(case)
        self.results.save()

    def _time_alone(self, progress: Progress) -> None:
        profile = PROFILES[self.settings.profile]
        right = {
            name: [
                case
                for case, outcomes in self._timed.items()
                if case.direction in profile.alone_directions
                and case.outputs in profile.alone_outputs
                and any(each.name == name and each.status == "ok" for each in outcomes)
            ]
            for name in self._soloists()
        }
        groups = self._groups_apart([name for name, cases in right.items() if cases])
        counts = dict.fromkeys(right, 0)
        for index, group in enumerate(groups):
            share = len(group) / sum(map(len, groups[index:]))
            apart = {name: self._time_apart(name, right[name], share) for name in group}
            with contextlib.ExitStack() as processes:
                for each in apart.values():
                    processes.callback(each.close)
                for name, case in _turns(group, right):
                    done = sum(counts.values()) / sum(map(len, right.values()))
                    progress(f"{name}: {case.label}", done)
                    if (found := next(apart[name], None)) is not None:
                        counts[name] += 1
                        self._take_alone(name, *found)
        for name, count in counts.items():
            if count < len(right[name]):
                self._note_short_of_time(
                    f"{name} was timed alone in {count} of {len(right[name])} cases"
                )
        self._write_rows()

    def _groups_apart(self, soloists: Sequence[str]) -> list[list[str]]:
        """Whose processes are there at the same time.

        On a CPU all, and one case is timed after the other, not one variant: a machine that is
        slower by the minute is then slower for all. But where the time is limited, one peer that
        hangs must not take that of the backends. On a GPU each by itself: its memory is one.
        """
        if self.settings.device.type != "cpu":
            return [[name] for name in soloists]
        if self.settings.limit_s is None:
            return [list(soloists)]
        peers = [name for name in soloists if name in PEERS]
        own = [name for name in soloists if name not in PEERS]
        return [group for group in (own, peers) if group]

    def _time_apart(
        self, name: str, cases: Sequence[Case], share: float
    ) -> Iterator[tuple[Case, list[Outcome]]]:
        """In ``share`` of the time that is left when the first case is asked for."""
        limit_s = None
        if self.settings.limit_s is not None:
            limit_s = share * max(self._time_left() - self._after_ops_s(), 0.0)
            if limit_s < 5.0:  # starting Python and PyTorch takes most of that
                return
        # A backend beside eager, which it is compared with: a quiet moment is then both's.
        names = [name] if name == "eager" or name in PEERS else ["eager", name]
        jobs = [(case, names) for case in cases]
        yield from isolated.time_apart(jobs, self.settings.alone, self.settings.seed, limit_s)

    def _take_alone(self, name: str, case: Case, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.status not in FAILURES:
                self._add_alone(case, outcome)
            else:  # right among the others, but not apart from them
                self._timed[case] = [
                    outcome if each.name == outcome.name else each for each in self._timed[case]
                ]
            if outcome.status == "unavailable":
                self.results.data["notes"].append(
                    f"{name} could not be timed alone in {case.label}: {outcome.reason}."
                )
        self._write_rows(case)

    def _add_alone(self, case: Case, outcome: Outcome) -> None:
        """Keeps the better of what a variant has shown apart from the others so far."""
        kept = self._alone.setdefault((case, outcome.name), {})
        for clock, samples in outcome.times.items() if outcome.status == "ok" else ():
            if isinstance(samples, Samples):
                before = kept.get(clock)
                if before is None or samples.median < before.median:
                    kept[clock] = samples

    def _train_mnist(self, progress: Progress) -> None:
        # What a profile trains without --minutes is short enough by itself.
        limit_s = None
        if self.settings.limit_s != PROFILES[self.settings.profile].limit_s:
            limit_s = max(self._time_left() - _REPORT_S, 0.0)
        section, self._mnist_rows, notes = self._mnist(self.settings, progress, limit_s)
        self.results.data["mnist"] = section
        self.results.data["notes"] += notes
        self._write_rows()

    # --- rows ------------------------------------------------------------------------------------

    def _write_rows(self, *changed: Case) -> None:
        """Makes the rows of the cases that changed anew, and writes all."""
        for case in changed:
            self._case_rows[case] = list(self._rows(case))
        places = {case: place for place, case in enumerate(self._cases())}
        in_order = sorted(self._case_rows, key=lambda case: places.get(case, len(places)))
        rows = [row for case in in_order for row in self._case_rows[case]]
        self.results.data["rows"] = rows + self._mnist_rows
        self.results.save()

    def _rows(self, case: Case) -> Iterator[dict[str, Any]]:
        outcomes = self._timed[case]
        eager = next((each for each in outcomes if each.name == "eager"), None)
        for outcome in outcomes:
            clocks = measure.CLOCKS[torch.device(case.device).type]
            for clock in clocks if outcome.status == "ok" else (None,):
                yield self._row(case, outcome, eager, clock)

    def _row(
        self, case: Case, outcome: Outcome, eager: Outcome | None, clock: str | None
    ) -> dict[str, Any]:
        row = new_row(case, outcome.name, outcome.kind, clock, outcome.status)
        row |= {"rel_err": outcome.rel_err, "reason": outcome.reason}
        row["verified"] = outcome.status in ("ok", "interpreted")
        if clock is None:
            return row
        samples = outcome.times[clock]
        if isinstance(samples, str):
            return row | {"status": "unavailable", "reason": samples}
        baseline = eager.times.get(clock) if eager else None
        alone, baseline_alone = (
            self._alone.get((case, name), {}).get(clock) for name in (outcome.name, "eager")
        )
        fill_times(
            row,
            samples,
            alone,
            baseline if isinstance(baseline, Samples) else None,
            baseline_alone,
            self.settings.seed,
        )
        fill_floor(row, case, self._ceilings)
        return row

    # --- what, and how long ----------------------------------------------------------------------

    def _cases(self) -> Iterator[Case]:
        settings = self.settings
        recycles = settings.device.type == "cpu" and measure.can_recycle_memory()
        preallocated = PROFILES[settings.profile].preallocated if recycles else ()
        # One dtype of every op before the next: what is interrupted has seen every op.
        for dtype in settings.dtypes:
            for op in settings.ops:
                shapes = settings.shapes[op.name]
                yield from cases(op, settings.device, [dtype], shapes, preallocated)

    def _variants(self, case: Case, compile_in_time: bool) -> tuple[list[str], list[Outcome]]:
        """The names to try on a case, and the outcomes of those that cannot be."""
        names, prevented = ["eager"], []
        for name in self.settings.backends:
            if name == "eager" or (name == "triton" and case.device == "cpu"):
                continue  # Triton's rows on a CPU come from the interpreter, in its own process
            if reason := BACKENDS[name].unavailable(case.device, case.op):
                prevented.append(Outcome(name, "backend", "unavailable", reason))
            else:
                names.append(name)
        for name in self.settings.peers:
            if name in COMPILED and not compile_in_time:
                prevented.append(Outcome(name, "peer", "skipped", OUT_OF_TIME))
            else:
                names.append(name)
        return names, prevented

    def _soloists(self) -> list[str]:
        """Who is also timed alone: whatever can run here at all, the baseline first."""
        device = self.settings.device
        usable = set(backends(device))
        peers = (name for name in self.settings.peers if why_unavailable(name, device) is None)
        timed = (name for name in self.settings.backends if name in usable and name != "eager")
        return ["eager", *timed, *peers]

    def _time_left(self) -> float:
        if self.settings.limit_s is None:
            return float("inf")
        return self.settings.limit_s - (time.monotonic() - self._started)

    def _reserve(self, cases_left: int) -> float:
        """Seconds to keep for what must still happen if the next op is to be compiled."""
        names = 2 + len(self.settings.peers)
        clocks = len(measure.CLOCKS[self.settings.device.type])
        each = names * clocks * (2 * self.settings.effort.measure_s)
        alone = _ALONE_S * len(self._soloists()) if self.settings.alone else 0.0
        return self._compile_s + cases_left * each + self._after_ops_s() + alone

    def _after_ops_s(self) -> float:
        return _REPORT_S + (_MNIST_S if MNIST in self.settings.suites else 0.0)

    def _note_short_of_time(self, what: str) -> None:
        self.results.data["notes"].append(f"{what}: {OUT_OF_TIME}.")


def _turns(names: Sequence[str], cases: Mapping[str, Sequence[Case]]) -> Iterator[tuple[str, Case]]:
    """Who comes after whom, case by case; preallocated outputs last, as in each process."""
    every = dict.fromkeys(case for name in names for case in cases[name])
    for case in sorted(every, key=lambda case: case.outputs == PREALLOCATED):
        yield from ((name, case) for name in names if case in cases[name])


def _interpretable(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape``, made small enough for Triton's interpreter; odd, so that masks matter."""
    limit = _INTERPRETED_ELEMENTS if len(shape) == 1 else _INTERPRETED_EXTENT
    return tuple(min(extent, limit - 1 - 2 * axis) for axis, extent in enumerate(shape))


def interpreter_missing() -> str | None:
    """Why Triton's kernels cannot be interpreted here; None if they can."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return BACKENDS["triton"].unavailable("cpu")
    return None


def default_backends() -> tuple[str, ...]:
    """All that are timed on some machine, the baseline first."""
    timed = (name for name, each in BACKENDS.items() if not each.checks_only and name != "eager")
    return ("eager", *timed)


def availability(device: torch.device) -> Iterator[tuple[str, str, str | None]]:
    """``(name, kind, why not)`` of every backend and peer."""
    usable = backends(device)
    for name in default_backends():
        yield name, "backend", None if name in usable else BACKENDS[name].unavailable(device)
    for name in PEERS:
        yield name, "peer", why_unavailable(name, device)
