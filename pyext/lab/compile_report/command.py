"""``python -m pyext.lab compile-report``: collects the rows, shows them, writes them as JSON.

Exit code 0 if every kernel keeps to its limits, 1 if one does not, 3 if there is nothing to read
or an architecture was asked for that is not there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pyext._build.toolchain import BuildError
from pyext.lab import results
from pyext.lab.compile_report import calls, machine_code, predictions, triton_rows
from pyext.lab.compile_report.calls import Call
from pyext.lab.compile_report.cuda_rows import CudaLibrary, Unavailable
from pyext.lab.compile_report.predictions import Prediction
from pyext.lab.compile_report.row import Row

OK, FAILED, MISSING, INTERRUPTED = 0, 1, 3, 130
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # where no library says which


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--arch",
        type=lambda text: [architecture(each) for each in text.split(",")],
        metavar="LIST",
        help="architectures, such as 80,90 (default: those that the CUDA library was built for)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")


def architecture(text: str) -> str:
    """``sm_90`` for ``90``, ``9.0`` or ``sm_90``; ``sm_90a`` for ``90a``."""
    found = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture; give 80, 9.0 or sm_90a")
    return f"sm_{found[1]}{found[2]}{found[3]}"


class Report:
    """The rows as they are found, and a note on what is left out."""

    def __init__(self, architectures: list[str] | None) -> None:
        """Raises Unavailable where there is nothing to read, or not for ``architectures``."""
        self.rows: list[Row] = []
        self._calls: list[Call] = []
        self.notes: list[str] = []
        self._library: CudaLibrary | None = None
        try:
            self._library = CudaLibrary()
        except Unavailable as reason:
            self.notes.append(f"No CUDA rows: {reason}.")
        self._with_triton = (reason := triton_rows.unavailable()) is None
        if reason:
            self.notes.append(f"No Triton rows: {reason}.")
        if self._library is None and not self._with_triton:
            raise Unavailable(" ".join(self.notes))
        held = self._library.architectures() if self._library else DEFAULT_ARCHITECTURES
        self.architectures = list(dict.fromkeys(architectures or held))
        if self._library and (missing := [each for each in self.architectures if each not in held]):
            raise Unavailable(_not_held(missing, held))

    def collect(self) -> Iterator[Row]:
        """Adds rows one by one. Raises RuntimeError where a kernel cannot be compiled or read."""
        for found in self._found():
            if isinstance(found, Row):
                self.rows.append(found)
                yield found
            elif found.dtype in predictions.DTYPES:
                self._calls.append(found)

    def _found(self) -> Iterator[Row | Call]:
        gpu = predictions.H200
        if self._library:
            yield from self._library.rows(self.architectures)
            if gpu.arch in self.architectures:
                reason = calls.why_no_cuda_calls()
                try:
                    if reason is None:
                        yield from calls.cuda_calls(predictions.DTYPES, gpu.multiprocessors)
                except BuildError as error:
                    reason = str(error).removesuffix(".")
                if reason:
                    self.notes.append(f"No predictions for CUDA: {reason}.")
        for each in self.architectures if self._with_triton else ():
            for found in triton_rows.rows_and_calls(each):
                if isinstance(found, Row) or each == gpu.arch:
                    yield found

    def predictions(self) -> list[Prediction]:
        """What the calls that were seen should take at best, on the GPU whose architecture is among
        the report's; empty if none is."""
        return [predictions.predict(call, self.rows) for call in self._calls]

    def to_json(self, complete: bool) -> str:
        """The JSON file's text."""
        found = self.predictions()
        text = {
            "rows": [row.to_json() for row in self.rows],
            "predictions": [each.to_json() for each in found],
            "assumed": asdict(predictions.H200) if found else None,
            "notes": self.notes,
            "complete": complete,
        }
        return json.dumps(text, indent=1)


def _not_held(missing: list[str], held: list[str]) -> str:
    wanted = sorted({machine_code.capability(each) for each in [*held, *missing]})
    listed = " ".join(f"{each // 10}.{each % 10}" for each in wanted)
    return (
        f"The CUDA library holds machine code for {', '.join(held)}, not for {', '.join(missing)}; "
        f'rebuild it with TORCH_CUDA_ARCH_LIST="{listed}" pip install --no-build-isolation '
        "--no-deps -e ."
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Runs the command; returns the exit code."""
    if options.json and not options.json.resolve().parent.is_dir():
        console.print(f"--json: the folder {options.json.resolve().parent} does not exist.")
        return MISSING
    try:
        report = Report(options.arch)
    except Unavailable as reason:
        console.print(str(reason), markup=False, soft_wrap=True)
        return MISSING
    complete, problem = False, None
    with console.status("Reading machine code ...") as status:
        try:
            for row in report.collect():
                status.update(f"{len(report.rows)} kernels, now {row.language} on {row.arch} ...")
            complete = True
        except RuntimeError as error:
            problem = str(error)
        except KeyboardInterrupt:
            problem = f"Interrupted: the report ends after {len(report.rows)} rows."
    show(report.rows, console)
    show_predictions(report.predictions(), console)
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)
    if options.json:
        results.replace_file(options.json, report.to_json(complete) + "\n")
        console.print(f"Wrote {len(report.rows)} rows to {options.json}.", markup=False)
    if problem:
        console.print(problem, markup=False, soft_wrap=True)
        return INTERRUPTED if problem.startswith("Interrupted") else FAILED
    failing = [row for row in report.rows if row.violations]
    for row in failing:
        console.print(f"{title(row)}: {'; '.join(row.violations)}.", markup=False, soft_wrap=True)
    verdict = f"{len(failing)} break" if failing else "all keep"
    console.print(f"{len(report.rows)} rows: {verdict} the limits that their kernels state.")
    return FAILED if failing else OK


def title(row: Row) -> str:
    """A row's name in a sentence."""
    return f"{row.kernel}<{row.instantiation}> ({row.language}, {row.arch})"


def show(rows: list[Row], console: Console) -> None:
    """One table per language and architecture."""
    for group in dict.fromkeys((row.language, row.arch) for row in rows):
        table = Table(title=f"{group[0]} {group[1]}", title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("kernel", overflow="fold")
        table.add_column("instantiation", overflow="fold")
        for name in (
            "registers",
            "spilled",
            "shared: static",
            "dynamic",
            "occupancy",
            "code",
            "load",
            "store",
        ):
            table.add_column(name, justify="right")
        table.add_column("matrix", overflow="fold")
        for row in rows:
            if (row.language, row.arch) == group:
                table.add_row(*_cells(row), style="red" if row.violations else None)
        console.print(table)
    if rows:
        console.print("Sizes in bytes; load and store: the widest access to global memory.")


def show_predictions(found: list[Prediction], console: Console) -> None:
    """One table: each op, shape and dtype with what it should take in both languages."""
    if not found:
        return
    gpu = predictions.H200
    table = Table(
        title=f"Predicted, not measured: {gpu.name}, at best",
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    for name in ("op", "shape", "dtype"):
        table.add_column(name, overflow="fold")
    languages = list(dict.fromkeys(each.language for each in found))
    for language in languages:
        table.add_column(f"{language}: µs", justify="right")
        table.add_column("launches", justify="right")
    by_call: dict[tuple, dict[str, Prediction]] = {}
    for each in found:
        call = each.op, "×".join(map(str, each.shape)), each.dtype
        by_call.setdefault(call, {})[each.language] = each
    for call, predicted in sorted(by_call.items()):
        cells = []
        for language in languages:
            each = predicted.get(language)
            cells += [f"{each.predicted_us:.1f}", str(each.launches)] if each else ["-", "-"]
        table.add_row(*call, *cells)
    console.print(table)
    console.print(
        f"Forward and backward, or a step: the larger of bytes / {gpu.copy_bytes_per_s / 1e12:g} "
        f"TB/s and FLOPs / {gpu.fma_flops_per_s / 1e12:g} TFLOP/s ("
        f"{gpu.tensor_core_flops_per_s / 1e12:g} where the machine code has tensor cores' "
        f"instructions), and {1e6 * gpu.launch_s:g} µs for each launch; what a kernel waits for "
        "within itself is left out.",
        soft_wrap=True,
    )


def _cells(row: Row) -> Iterator[str]:
    yield row.kernel
    yield row.instantiation
    for value in (
        row.registers,
        row.spill_bytes,
        row.static_shared_bytes,
        row.dynamic_shared_bytes,
        None if row.occupancy is None else f"{row.occupancy:.0%}",
        row.code_bytes,
        row.widest_load_bytes,
        row.widest_store_bytes,
    ):
        yield "-" if value is None else str(value)
    yield " ".join(row.matrix_instructions)
