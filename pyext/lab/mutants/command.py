"""``python -m pyext.lab mutants``: plants bugs, one at a time, and shows which test catches each.

Exit codes: 0 all caught that must be; 1 a mutant made by hand survived, or the unmutated control
failed; 2 wrong usage; 3 the sources or a compiler are missing; 130 interrupted, with the finished
rows kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import queue
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyext import _arguments
from pyext.lab.mutants import generate, patches, trial
from pyext.lab.mutants.patches import FOLDER, Mutant, PatchError
from pyext.lab.mutants.scratch import ROOT, BuildFailed, Scratch
from pyext.lab.mutants.trial import CHECKS, NoEvidence, Row

OK, FAILED, WRONG_USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
QUICK = (
    "cpp-relu-identity",
    "cpp-sgd-w2-updated-before-read",
    "cuda-block-sum-barrier-missing",
    "triton-relu-tail-not-masked",
    "python-relu-ignores-grad-output",
    "python-sgd-version-not-bumped",
)
"""What ``--quick`` tries: each way, and each kind of evidence."""
MOST_DRAWS = 5
"""Automatic mutants that are tried for each that is wanted: some change nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--seed",
        type=_arguments.seed,
        default=0,
        metavar="N",
        help="of the automatic mutants; default: 0",
    )
    add(
        "--automatic",
        type=_arguments.integer(0),
        metavar="N",
        help="how many automatic mutants must change an output (default: as many as by hand)",
    )
    add(
        "--way",
        type=_arguments.names,
        metavar="NAMES",
        help=f"of {', '.join(CHECKS)} (default: all)",
    )
    add(
        "--only",
        type=_arguments.names,
        metavar="NAMES",
        help="only mutants with these names (* matches)",
    )
    add("--quick", action="store_true", help="a few mutants made by hand, in three minutes")
    add(
        "--jobs",
        type=_arguments.integer(1),
        default=2,
        metavar="N",
        help="mutants at a time; default: 2",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows, with their evidence, to FILE")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--list", action="store_true", help="print the mutants made by hand, and stop")


def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if not (ROOT / FOLDER).is_dir():
        print(
            f"mutants need the project's sources, and {ROOT} has no {FOLDER}: run this in a clone "
            "installed with `pip install -e .`",
            file=sys.stderr,
        )
        return MISSING
    try:
        by_hand = patches.read_all(ROOT)
    except PatchError as error:
        print(error, file=sys.stderr)
        return FAILED
    if options.list:
        for mutant in by_hand:
            console.print(f"{mutant.name}: {mutant.description} ({mutant.path})", markup=False)
        return OK
    plan = _plan(parser, options, by_hand)
    with tempfile.TemporaryDirectory(prefix="pyext-mutants-") as folder:
        session = Session(plan, Path(folder), options.json, console)
        return session.run(options.markdown)


@dataclass(frozen=True)
class Plan:
    """What is to be tried."""

    by_hand: tuple[Mutant, ...]
    automatic: Mapping[str, Iterator[Mutant]]
    """Way -> candidates, in order."""
    wanted: Mapping[str, int]
    """Way -> how many of them must change an output."""
    complete: bool
    """Whether the control runs every test; else only those that caught a mutant."""
    seed: int
    jobs: int

    @property
    def ways(self) -> list[str]:
        used = {mutant.way for mutant in self.by_hand}
        return [way for way in CHECKS if way in used or self.wanted.get(way)]


def _plan(
    parser: argparse.ArgumentParser, options: argparse.Namespace, by_hand: list[Mutant]
) -> Plan:
    known = {mutant.name: mutant for mutant in by_hand}
    if options.only is not None:
        automatic = itertools.chain.from_iterable(
            generate.candidates(ROOT, way, options.seed) for way in generate.SOURCES
        )
        known |= {mutant.name: mutant for mutant in automatic}
        chosen = [
            mutant
            for name, mutant in known.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
        ]
        if not chosen:
            parser.error(f"--only {','.join(options.only)} names no mutant; --list shows them")
        return Plan(tuple(chosen), {}, {}, False, options.seed, options.jobs)
    if options.quick:
        chosen = tuple(known[name] for name in QUICK)
        return Plan(chosen, {}, {}, False, options.seed, options.jobs)
    chosen = options.way or list(CHECKS)
    if unknown := sorted(set(chosen) - set(CHECKS)):
        parser.error(f"--way does not know {unknown[0]!r}; it accepts {', '.join(CHECKS)}")
    by_hand = [mutant for mutant in by_hand if mutant.way in chosen]
    total = len(by_hand) if options.automatic is None else options.automatic
    ways = [way for way in generate.SOURCES if way in chosen]
    wanted = {way: len(range(i, total, len(ways))) for i, way in enumerate(ways)}
    automatic = {
        way: itertools.islice(
            generate.candidates(ROOT, way, options.seed), MOST_DRAWS * wanted[way]
        )
        for way in ways
    }
    return Plan(tuple(by_hand), automatic, wanted, True, options.seed, options.jobs)


@dataclass
class Session:
    """One run of the command."""

    plan: Plan
    folder: Path
    json_file: Path | None
    console: Console
    rows: list[Row] = field(default_factory=list)
    control: dict[str, str] = field(default_factory=dict)
    """Way -> what its tests say of the unmutated copy."""
    original: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, markdown: bool) -> int:
        """Everything; returns the exit code."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
        )
        interrupted = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # nor may that leave children
        try:
            with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
                self._phases(progress)
        except KeyboardInterrupt:
            interrupted = True
        except BuildFailed as error:
            print(f"The unmutated sources do not build: {error}", file=sys.stderr)
            return MISSING
        self._save(interrupted)
        self._show(markdown)
        if interrupted:
            self.console.print(f"Interrupted: the {len(self.rows)} finished rows are above.")
            return INTERRUPTED
        return OK if self._passed() else FAILED

    def _phases(self, progress: Progress) -> None:
        jobs = self.plan.jobs
        task = progress.add_task("building", total=jobs, what="the unmutated libraries")
        scratches = [Scratch.of_project(self.folder / "0", jobs)]
        libraries = {name for way in self.plan.ways for name in CHECKS[way].libraries}
        scratches[0].build(libraries)
        self.original = {name: scratches[0].built[name].sha256 for name in libraries}
        progress.update(task, advance=1)
        for i in range(1, jobs):
            scratches.append(scratches[0].clone(self.folder / str(i)))
            progress.update(task, advance=1)
        for scratch in scratches:
            scratch.jobs = 1
        free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        for scratch in scratches:
            free.put(scratch)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                if not self.plan.complete or self._control(pool, free, progress):
                    self._try_all(pool, free, progress)
                if not self.plan.complete:
                    self._control_of_catchers(pool, free, progress)
            except BaseException:
                trial.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _control(self, pool, free, progress: Progress) -> bool:
        """Every test of every way, on the unmutated copy; whether all pass."""
        self._ask(pool, free, progress, {way: CHECKS[way].complete for way in self.plan.ways})
        return self._control_passed()

    def _control_of_catchers(self, pool, free, progress: Progress) -> None:
        """The tests that caught a mutant, on the unmutated copy."""
        caught: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status == "caught" and "::" in row.by:
                caught.setdefault(row.mutant.way, []).append(row.by)
        self._ask(pool, free, progress, {way: sorted(set(each)) for way, each in caught.items()})

    def _ask(self, pool, free, progress: Progress, tests: Mapping[str, list[str]]) -> None:
        task = progress.add_task("control", total=len(tests), what=", ".join(tests))
        futures = {
            way: pool.submit(_with, free, _answer_of, way, arguments)
            for way, arguments in tests.items()
        }
        for way, future in futures.items():
            self.control[way] = future.result()
            progress.update(task, advance=1)

    def _try_all(self, pool, free, progress: Progress) -> None:
        wanted = dict(self.plan.wanted)
        total = len(self.plan.by_hand) + sum(wanted.values())
        task = progress.add_task("mutants", total=total, what="")

        def submit(mutant: Mutant) -> Future:
            return pool.submit(_with, free, self._try, mutant)

        waiting = {submit(mutant): None for mutant in self.plan.by_hand}
        for way, number in wanted.items():
            drawn = itertools.islice(self.plan.automatic[way], number)
            waiting |= {submit(mutant): way for mutant in drawn}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                way, row = waiting.pop(future), future.result()
                self.rows.append(row)
                self._save(interrupted=True)
                if way is not None and row.status in ("equivalent", "invalid"):
                    waiting |= {
                        submit(m): way for m in itertools.islice(self.plan.automatic[way], 1)
                    }
                else:
                    progress.update(task, advance=1)
                progress.update(task, what=f"{row.mutant.name}: {row.status}")

    def _try(self, mutant: Mutant, scratch: Scratch) -> Row:
        try:
            outputs = {} if mutant.by_hand else self._original_outputs(mutant.way, scratch)
        except NoEvidence as error:
            return Row(mutant, "defect", str(error))
        return trial.try_mutant(scratch, mutant, self.original, outputs)

    def _original_outputs(self, way: str, scratch: Scratch) -> dict[str, str]:
        with self.lock:  # else two threads would compute the same
            if way not in self.outputs:
                scratch.build(CHECKS[way].libraries)
                found = trial.run_outputs(scratch, CHECKS[way])
                if found is None:  # any mutant would seem to change an output
                    raise NoEvidence(f"the outputs of the unmutated {way} library cannot be made")
                self.outputs[way] = found
            return self.outputs[way]

    def _control_passed(self) -> bool:
        return all(answer.startswith("passed") for answer in self.control.values())

    def _passed(self) -> bool:
        bad = {"survived", "invalid", "defect", "equivalent"}
        wrong = [row for row in self.rows if row.mutant.by_hand and row.status in bad]
        defects = [row for row in self.rows if row.status == "defect"]
        return self._control_passed() and not wrong and not defects

    def _save(self, interrupted: bool) -> None:
        if self.json_file is None:
            return
        data = {
            "seed": self.plan.seed,
            "interrupted": interrupted,
            "seconds": round(time.monotonic() - self.begin, 1),
            "control": self.control,
            "rows": [_as_json(row) for row in _sorted(self.rows)],
        }
        self.json_file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def _show(self, markdown: bool) -> None:
        rows = _sorted(self.rows)
        if markdown:
            sys.stdout.write("\n".join(_markdown(rows)) + "\n")
        else:
            self.console.print(_table(rows))
        for way, answer in self.control.items():
            self.console.print(f"Control, {way}: {answer}.", markup=False)
        self.console.print(_summary(rows, time.monotonic() - self.begin), markup=False)


def _with(free: queue.SimpleQueue, function, *arguments):
    """Calls ``function`` with a free scratch copy as its last argument."""
    scratch = free.get()
    try:
        return function(*arguments, scratch)
    finally:
        free.put(scratch)


def _answer_of(way: str, tests: list[str], scratch: Scratch) -> str:
    """What these tests say of the unmutated copy."""
    checks = CHECKS[way]
    scratch.build(checks.libraries)
    try:
        run = trial.run_tests(scratch, tests)
        trial.check_evidence(scratch, run, checks.libraries)
    except NoEvidence as error:
        return f"no evidence: {error}"
    if run.caught:
        return f"{run.verdict} in {run.test}: {run.message}"
    return f"passed ({run.passed} tests)"


def _sorted(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (not row.mutant.by_hand, row.mutant.way, row.mutant.name))


def explanations(root: Path = ROOT) -> dict[tuple[str, str], str]:
    """(file, description) of automatic mutants that rightly survive -> why."""
    path = root / FOLDER / "survivors.toml"
    entries = tomllib.loads(path.read_text())["survivor"] if path.exists() else []
    return {(each["file"], each["change"]): each["why"] for each in entries}


def why_it_survives(row: Row) -> str | None:
    """The explanation of an automatic survivor, if it has one."""
    return explanations().get((row.mutant.path, row.mutant.description))


def _outcome(row: Row) -> str:
    if row.status == "caught":
        return row.by
    if row.status == "survived" and not row.mutant.by_hand:
        return f"SURVIVED: {why_it_survives(row) or 'not explained'}"
    return f"{row.status.upper()}{': ' if row.by else ''}{row.by}"


_STYLES = {"caught": "green", "survived": "bold red", "defect": "bold red", "invalid": "yellow"}


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mutant", no_wrap=True)
    table.add_column("bug", ratio=1)
    table.add_column("caught by", ratio=1)
    for row in rows:
        style = _STYLES.get(row.status, "dim")
        table.add_row(
            row.mutant.name, Text(row.mutant.description), Text(_outcome(row), style=style)
        )
    return table


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    yield "| mutant | file | bug | caught by |"
    yield "|---|---|---|---|"
    for row in rows:
        cells = (row.mutant.name, f"`{row.mutant.path}`", row.mutant.description, _outcome(row))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _summary(rows: Sequence[Row], seconds: float) -> str:
    parts = []
    for by_hand, name in ((True, "by hand"), (False, "automatic")):
        count = Counter(row.status for row in rows if row.mutant.by_hand is by_hand)
        counted = count["caught"] + count["survived"]
        if not count:
            continue
        text = f"{name}: {count['caught']} of {counted} caught"
        apart = [f"{number} {status}" for status, number in count.items() if status not in _COUNTED]
        parts.append(text + (f" (and {', '.join(apart)})" if apart else ""))
    return f"{'; '.join(parts) or 'nothing was tried'}; {seconds:.0f} s."


_COUNTED = ("caught", "survived")


def _as_json(row: Row) -> dict[str, Any]:
    mutant = row.mutant
    return {
        "name": mutant.name,
        "kind": "by hand" if mutant.by_hand else "automatic",
        "way": mutant.way,
        "file": mutant.path,
        "description": mutant.description,
        "status": row.status,
        "by": row.by,
        "message": row.message,
        "seconds": round(row.seconds, 1),
        "evidence": row.evidence,
    }
