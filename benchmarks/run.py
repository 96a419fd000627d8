"""The lab's main job: checks and times every op, backend and peer on this machine.

    python benchmarks/run.py                  quick, in under four minutes
    python benchmarks/run.py --device cuda --profile full

Exit codes: 0 done; 1 a result was wrong; 2 wrong usage; 3 the environment lacks something; 130
interrupted, with the finished rows kept.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for mnist_suite, when imported by tests
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler logs to the terminal otherwise

import mnist_suite  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table  # noqa: E402

from pyext import _arguments, registry  # noqa: E402
from pyext.backends import BACKENDS  # noqa: E402
from pyext.lab import environment, report  # noqa: E402
from pyext.lab.bench import (  # noqa: E402
    MNIST,
    PROFILES,
    Benchmark,
    Profile,
    Settings,
    availability,
    default_backends,
)
from pyext.lab.measure import Effort  # noqa: E402
from pyext.lab.peers import PEERS  # noqa: E402
from pyext.lab.timing import QUICK  # noqa: E402

OK, FAILED, WRONG_USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
RESULTS = Path(__file__).resolve().parent / "results"


class _Missing(RuntimeError):
    """The environment lacks something; the message is the sentence that says what."""


def main(
    arguments: Sequence[str] | None = None, *, effort: Effort | None = None, alone: bool = True
) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; by default those of the process.
        effort: how long to measure, instead of the profile's (for tests).
        alone: whether peers are also timed alone (for tests).

    Returns:
        The exit code.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = _console(sys.stdout)
    try:
        device = _device(options.device)
    except _Missing as error:
        _console(sys.stderr).print(str(error), markup=False)
        return MISSING
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = _settings(parser, options, device, effort, alone)
    if options.list:
        _print_list(console, settings)
        return OK
    environment.use_full_precision()
    folder = options.out or RESULTS / _default_name(device)
    command = "python benchmarks/run.py"
    given = sys.argv[1:] if arguments is None else arguments
    if given:
        command += " " + shlex.join(_without_folder(given))
    benchmark = Benchmark(settings, folder, command, mnist_suite.run)
    return _run(benchmark, console)


def _run(benchmark: Benchmark, console: Console) -> int:
    results, interrupted = benchmark.results, False
    folder = results.folder
    try:
        results.save()
    except OSError as error:
        _console(sys.stderr).print(f"Cannot write to {folder}: {error.strerror}.", markup=False)
        return WRONG_USAGE
    try:
        _run_phases(benchmark, console)
    except KeyboardInterrupt:
        interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the files are being written
    benchmark.finish(interrupted=interrupted)
    report.show(results.data, console)
    plots = report.write_plots(results.data, folder)
    if mnist_suite.is_substitute(results.data["mnist"]):
        console.print(f"The data folder is {mnist_suite.data.data_root()}.", markup=False)
    console.print(f"Wrote results.json, results.csv and {len(plots)} plots to {_shown(folder)}.")
    if interrupted:
        console.print(f"Interrupted: the {len(results.rows)} finished rows are kept.")
        return INTERRUPTED
    if results.failed:
        wrong = sorted({(row["variant"], row["op"]) for row in results.wrong_rows})
        what = ", ".join(f"{variant} in {op}" for variant, op in wrong) or "the MNIST training"
        console.print(f"[bold red]A result was wrong:[/] {what}; the rows say what is off.")
        return FAILED
    return OK


def _run_phases(benchmark: Benchmark, console: Console) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    # Drawn twice a second: drawing takes time from what is being measured.
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        for title, phase in benchmark.phases():
            task = progress.add_task(title, total=1.0, what="")

            def update(what: str, done: float, task=task) -> None:
                progress.update(task, completed=done, what=what)

            phase(update)
            progress.update(task, completed=1.0, what="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Checks and times every op, backend and peer on this machine.",
        epilog="Lists are separated by commas. docs/results.md explains the files and the numbers.",
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--suite", type=_arguments.names, metavar="NAMES", help=f"ops, and {MNIST} (default: all)")
    add(
        "--backend",
        type=_arguments.names,
        metavar="NAMES",
        help="default: all; eager is always timed",
    )
    add("--peer", type=_arguments.names, metavar="NAMES", help=f"of {', '.join(PEERS)}; or none")
    add(
        "--dtype",
        type=_arguments.names,
        metavar="NAMES",
        help=f"of {', '.join(registry.DTYPE_NAMES)}",
    )
    add("--shape", type=_arguments.names, metavar="SHAPES", help="such as 4096 or 64x1000x100x10")
    add("--profile", choices=tuple(PROFILES), default="quick", help="default: quick")
    add(
        "--minutes",
        type=_arguments.number(lambda value: value > 0, "above 0"),
        metavar="N",
        help="leave out what does not fit into that time (default: quick about 4, full no limit)",
    )
    add("--out", type=Path, metavar="DIR", help="where results.json, the CSV and the plots go")
    add(
        "--seed",
        type=_arguments.seed,
        default=0,
        metavar="N",
        help="of data, order and bootstrap; default: 0",
    )
    add(
        "--threads",
        type=_arguments.integer(1),
        metavar="N",
        help="PyTorch's CPU threads; default: PyTorch's",
    )
    add("--list", action="store_true", help="print what there is to run, and stop")
    return parser


def _effort(profile: Profile, minutes: float | None) -> Effort:
    """With a limit of time, many cases measured quickly rather than few measured long."""
    return profile.effort if minutes is None else QUICK


def _alone(profile: Profile, minutes: float | None) -> Effort:
    return profile.alone if minutes is None else PROFILES["quick"].alone


def _device(name: str) -> torch.device:
    """The device to use; raises ``_Missing`` where there is no usable GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if reason := BACKENDS["eager"].unavailable("cuda"):
        raise _Missing(f"--device cuda cannot be used here: {reason}.")
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        if name == "auto":
            return torch.device("cpu")
        first = str(error).splitlines()[0]
        raise _Missing(
            f"--device cuda cannot be used here: the GPU refuses work ({first})."
        ) from None
    return torch.device("cuda", torch.cuda.current_device())


def _settings(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    device: torch.device,
    effort: Effort | None,
    alone: bool,
) -> Settings:
    profile = PROFILES[options.profile]
    suites = _arguments.chosen(parser, "--suite", options.suite, (*registry.ops(), MNIST))
    ops = [registry.get(name) for name in suites if name != MNIST]
    peers = profile.peers
    if options.peer == ["none"]:
        peers = ()
    elif options.peer is not None and "none" in options.peer:
        parser.error("--peer none stands alone")
    elif options.peer is not None:
        peers = _arguments.chosen(parser, "--peer", options.peer, PEERS, also="none")
    return Settings(
        device=device,
        suites=suites,
        backends=_arguments.chosen(parser, "--backend", options.backend, default_backends()),
        peers=peers,
        dtypes=_arguments.chosen(
            parser,
            "--dtype",
            options.dtype,
            registry.DTYPE_NAMES,
            default=profile.dtypes[device.type],
        ),
        shapes=_arguments.shapes(parser, options.shape, ops, device, options.profile),
        profile=options.profile,
        seed=options.seed,
        effort=effort or _effort(profile, options.minutes),
        alone=(effort or _alone(profile, options.minutes)) if alone else None,
        limit_s=profile.limit_s if options.minutes is None else 60 * options.minutes,
    )


def _default_name(device: torch.device) -> str:
    now = datetime.datetime.now()
    name = environment.slug(environment.device_name(device)) or device.type
    return f"{name}-{now:%Y%m%d}-{now:%H%M%S}"


def _without_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments without ``--out``, whose path is nobody's business but the user's."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--out="):
            skip = False
        elif argument == "--out":
            skip = True
        else:
            kept.append(argument)
    return kept


def _shown(folder: Path) -> str:
    try:
        return os.path.relpath(folder)
    except ValueError:
        return str(folder)


def _console(file) -> Console:
    """Wide enough for the tables where the output is piped and has no width of its own."""
    width = None if file.isatty() else 150
    return Console(file=file, width=width, highlight=False, soft_wrap=False)


def _print_list(console: Console, settings: Settings) -> None:
    table = Table(title=f"Suites ({settings.profile}, {settings.device.type})", title_style="bold")
    for title in ("suite", "directions", "shapes", "dtypes"):
        table.add_column(title)
    for op in settings.ops:
        shapes = ", ".join("x".join(map(str, shape)) for shape in settings.shapes[op.name])
        names = "x".join(op.shape_names)
        table.add_row(
            op.name, ", ".join(op.directions), f"{shapes} ({names})", ", ".join(settings.dtypes)
        )
    if MNIST in settings.suites:
        table.add_row(MNIST, "step, training", "batches of 64 images", "float32, float64")
    console.print(table)
    table = Table(title="Backends and peers", title_style="bold")
    for title in ("name", "kind", "here"):
        table.add_column(title)
    for name, kind, reason in availability(settings.device):
        if kind == "peer" and reason is None and name not in settings.peers:
            reason = f"available; not in the {settings.profile} profile unless named"
        if kind == "backend" and name == "triton" and settings.device.type == "cpu":
            reason = "checked in Triton's interpreter, not timed"
        table.add_row(name, kind, reason or "available")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
