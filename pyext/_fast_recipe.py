"""What `python -m pyext.train mnist --recipe fast` does: several seeds, their table, their file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pyext.lab.results import replace_file
from pyext.workloads import mnist_fast
from pyext.workloads.compare import FLOAT64_LIMIT
from pyext.workloads.engine import Diverged
from pyext.workloads.mnist_fast import FastHyperParameters, FastRun, Resident

SCHEMA = "pyext-lab/fast-recipe/1"
SEEDS_OF_A_CLAIM = 20
"""A mean over fewer seeds is shown, but neither passes nor fails."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None of one value), least and greatest."""

    mean: float
    standard_deviation: float | None
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The finished runs, in the order of their seeds."""

    hyper: FastHyperParameters
    backend: str
    runs: tuple[FastRun, ...]
    interrupted: bool
    diverged: str = ""
    """What became of the seed that ended the runs because its loss was not finite."""

    @property
    def accuracy(self) -> Spread:
        return Spread.of([run.accuracy for run in self.runs])

    @property
    def train_s(self) -> Spread:
        return Spread.of([run.train_s for run in self.runs])

    @property
    def failed(self) -> bool:
        """A seed diverged; or enough seeds for a claim, and their mean is below the target."""
        if self.diverged:
            return True
        enough = len(self.runs) >= SEEDS_OF_A_CLAIM
        return enough and self.accuracy.mean < mnist_fast.TARGET_ACCURACY


def agrees_with_eager(hyper: FastHyperParameters, data: Resident, backend: str) -> tuple[bool, str]:
    """Whether the backend's first losses are `eager`'s, in float64, and a sentence about it."""
    distance = mnist_fast.parity(hyper, data, backend)
    return distance <= FLOAT64_LIMIT, (
        f"{backend}: losses within {distance:.1e} of eager's in float64 (limit {FLOAT64_LIMIT:g})"
    )


def run_seeds(
    hyper: FastHyperParameters,
    data: Resident,
    seeds: int,
    *,
    backend: str = "eager",
    on_run: Callable[[FastRun], None] = lambda run: None,
) -> Outcome:
    """Trains with `hyper.seed`, `hyper.seed + 1`, …; a loss that is not finite or Ctrl-C ends it
    and keeps the finished runs."""
    runs: list[FastRun] = []
    interrupted, diverged = False, ""
    try:
        for seed in range(hyper.seed, hyper.seed + seeds):
            runs.append(
                mnist_fast.train(dataclasses.replace(hyper, seed=seed), data, backend=backend)
            )
            on_run(runs[-1])
    except KeyboardInterrupt:
        interrupted = True
    except Diverged as error:
        diverged = str(error)
    return Outcome(hyper, backend, tuple(runs), interrupted, diverged)


def table(title: str, outcome: Outcome) -> Table:
    """One row for each seed, then mean, standard deviation, least and greatest."""
    result = Table(
        title=f"the fast recipe on {title}, {outcome.backend}",
        caption="train: from initialised weights to the last update. "
        "prepare: the libraries' first calls and, on a GPU, the capture.",
    )
    result.add_column("seed")
    for column in ("test accuracy", "train", "prepare", "test"):
        result.add_column(column, justify="right")
    last = len(outcome.runs) - 1
    for index, run in enumerate(outcome.runs):
        result.add_row(
            str(run.seed),
            f"{100 * run.accuracy:.2f} %",
            *(f"{seconds:.3f} s" for seconds in (run.train_s, run.prepare_s, run.test_s)),
            end_section=index == last,
        )
    accuracy, train_s = outcome.accuracy, outcome.train_s
    for field in dataclasses.fields(Spread):
        share, seconds = getattr(accuracy, field.name), getattr(train_s, field.name)
        if share is not None:
            name = field.name.replace("_", " ")
            result.add_row(name, f"{100 * share:.3f} %", f"{seconds:.3f} s")
    return result


def verdict(outcome: Outcome) -> str:
    """What the runs say about the target."""
    mean, count = 100 * outcome.accuracy.mean, len(outcome.runs)
    target = 100 * mnist_fast.TARGET_ACCURACY
    side = "below" if mean < target else "at or above"
    sentence = f"mean over {count} seed{'s' * (count > 1)}: {mean:.3f} %, {side} {target:g} %"
    if count < SEEDS_OF_A_CLAIM:
        sentence += f"; a claim takes {SEEDS_OF_A_CLAIM} seeds"
    return sentence


def save(
    path: Path,
    outcome: Outcome,
    *,
    data_title: str,
    load_s: float,
    described: dict[str, Any],
    swapped: Sequence[str],
) -> None:
    """Writes everything that a document may cite; docs/mnist.md has the fields.

    Args:
        load_s: seconds of reading the data and bringing it, normalised, to the device.
        described: `environment.describe` of before the runs, whose load average is that of others.
        swapped: the modules that the backend's took the place of.
    """
    model = mnist_fast.FastCNN()
    contents = {
        "schema": SCHEMA,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "interrupted": outcome.interrupted,
        "diverged": outcome.diverged,
        "data": data_title,
        "backend": outcome.backend,
        "swapped": list(swapped),
        "hyper_parameters": dataclasses.asdict(outcome.hyper),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_image": mnist_fast.flops_per_image(),
        "load_s": load_s,
        "accuracy": dataclasses.asdict(outcome.accuracy),
        "train_s": dataclasses.asdict(outcome.train_s),
        "runs": [dataclasses.asdict(run) for run in outcome.runs],
        "environment": described,
    }
    replace_file(path, json.dumps(contents, indent=1, allow_nan=False) + "\n")
