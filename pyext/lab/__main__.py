"""``python -m pyext.lab``: what is done to the ops as a whole.

``report DIR`` shows a result file once more; ``compile-report`` what the compilers made of the
kernels; ``mutants`` plants bugs and shows what catches them; ``gpu-suite`` does on an NVIDIA GPU
all that needs one; ``tune`` finds faster tiles for Triton's products there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pyext.lab import gpu_suite, report, results, tune
from pyext.lab.compile_report import command as compile_report
from pyext.lab.mutants import command as mutants


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyext.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "report", help="draws the plots of DIR/results.json anew and prints its table as Markdown"
    )
    show.add_argument("folder", metavar="DIR", type=Path, help="a folder with a results.json")
    show.add_argument(
        "--terminal", action="store_true", help="print the terminal's tables instead of Markdown"
    )
    show.add_argument(
        "--direction",
        type=lambda text: text.split(","),
        metavar="NAMES",
        help="only these in the Markdown, such as both,step (default: all)",
    )
    compile_report.add_arguments(
        commands.add_parser(
            "compile-report",
            help="registers, spills, shared memory, occupancy and accesses of every kernel",
        )
    )
    planted = commands.add_parser(
        "mutants", help="plants bugs, one at a time, and shows which test catches each"
    )
    mutants.add_arguments(planted)
    gpu = commands.add_parser(
        "gpu-suite", help="builds, tests, sanitizes and benchmarks on an NVIDIA GPU"
    )
    gpu_suite.add_arguments(gpu)
    tuning = commands.add_parser("tune", help="finds faster tiles for the Triton products on a GPU")
    tune.add_arguments(tuning)
    options = parser.parse_args(arguments)
    if options.command == "compile-report":
        return compile_report.run(options, Console(highlight=False))
    if options.command == "mutants":
        return mutants.main(planted, options)
    if options.command == "gpu-suite":
        return gpu_suite.main(options, gpu.error)
    if options.command == "tune":
        return tune.main(tuning, options)
    return _report(options, show.error)


def _report(options: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    try:
        data = results.load(options.folder)
    except (OSError, ValueError) as error:
        fail(f"{options.folder} holds no result file of this version: {error}")
    report.write_plots(data, options.folder)
    results.write_csv(data["rows"], options.folder / "results.csv")
    if options.terminal:
        console = Console(highlight=False)
        report.show(data, console)
    else:
        sys.stdout.write(report.markdown(data, options.direction))
    return 0


if __name__ == "__main__":
    sys.exit(main())
