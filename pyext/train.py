"""`python -m pyext.train mnist`: trains the MNIST CNN with one backend, or with each in turn, or,
with `--recipe fast`, a small network to 99 % in the least time.

Exit codes: 0 trained; 1 the loss is not finite, or the fast recipe missed its check; 2 wrong usage;
3 the data, the device or the backend is not available; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pyext import _arguments, _fast_recipe
from pyext.backends import BACKENDS, Backend, backends
from pyext.lab import environment
from pyext.workloads import data as datasets
from pyext.workloads import engine, mnist_cnn, mnist_fast
from pyext.workloads.engine import HyperParameters, TestResult, Training

OK, FAILED, WRONG_USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
DEFAULTS = HyperParameters()
_OTHER_DATA = "(Or name the folder with --data-dir{}.)"
_DIGITS = ", or train on scikit-learn's digits: --dataset digits"


class _Missing(RuntimeError):
    """The environment lacks something; the message says what and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # Lines stay whole where they are piped: a sentence is easier to search for than to re-join.
    console = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if options.recipe == "fast":
            return _train_fast(parser, options, console, errors)
        return _train(parser, options, console)
    except _Missing as error:
        errors.print(str(error), markup=False)
        return MISSING
    except datasets.DataError as error:
        other = _OTHER_DATA.format("" if options.recipe == "fast" else _DIGITS)
        errors.print(f"{error} {other}", markup=False)
        return MISSING
    except engine.CheckpointError as error:
        parser.error(f"--resume: {error}")
    except engine.Diverged as error:
        errors.print(f"Stopped: {error}.", markup=False)
        return FAILED
    except OSError as error:
        errors.print(f"Stopped, after what is shown above: {error}.", markup=False)
        return MISSING
    except KeyboardInterrupt:
        errors.print("Interrupted; nothing was saved since the last epoch.")
        return INTERRUPTED


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> int:
    for name in ("seeds", "json", "validation"):
        if getattr(options, name):
            parser.error(f"--{name} goes with --recipe fast")
    state = engine.load_checkpoint(options.resume) if options.resume else None
    hyper = _hyper_parameters(parser, options, state)
    _check_writable(parser, "--save", options.save)
    if state is not None and options.backend == "all":
        parser.error("--resume continues one run; it does not go with --backend all")
    device = _device(options.device)
    names = _backends(options.backend, device, state, console)
    threads = options.threads or (state["threads"] if state else None)
    if threads is not None:
        torch.set_num_threads(threads)

    data = _load(hyper.dataset, options, console)
    console.print(
        f"{data.title}: {len(data.train_images)} training and {len(data.test_images)} test images; "
        f"{device}, threads: {torch.get_num_threads()}; {_describe(hyper)}"
    )
    finished: list[tuple[Training, float]] = []
    for name in names:
        training = mnist_cnn.prepare(hyper, data, backend=name, device=device)
        console.print(_introduction(training), markup=False)
        if state is not None:
            training.load_state_dict(state)
            console.print(f"resumed at {_position(training)}")
        save = _save_path(options.save, name, several=len(names) > 1)
        start = time.perf_counter()
        if not _run(training, save, console):
            return INTERRUPTED
        finished.append((training, time.perf_counter() - start))
        if save is not None:
            console.print(f"saved {save}", markup=False)
    if len(finished) > 1:
        console.print(_summary(data.title, finished))
    return OK


def _train_fast(
    parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console, errors: Console
) -> int:
    """The fast recipe, seed after seed."""
    _check_fast(parser, options)
    seed = mnist_fast.RECIPE.seed if options.seed is None else options.seed
    seeds = options.seeds or 1
    if seed + seeds - 1 > _arguments.MOST_SEED:
        parser.error(f"--seeds {seeds}: the last seed would be above {_arguments.MOST_SEED}")
    hyper = dataclasses.replace(mnist_fast.RECIPE, seed=seed)
    device = _device(options.device)
    [backend] = _backends(options.backend or "eager", device, None, console)
    if BACKENDS[backend].interpreted:
        raise _Missing(f"--recipe fast measures time, and {backend} is interpreted here.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    described = environment.describe(device, hyper.seed, _command(options))

    start = time.perf_counter()
    data = _load("mnist", options, console)
    if options.validation:
        data = mnist_fast.hold_out(data)
    resident = mnist_fast.Resident.of(data, device)
    load_s = time.perf_counter() - start
    console.print(
        f"{data.title}: {len(data.train_images)} training and {len(data.test_images)} test images, "
        f"loaded in {load_s:.1f} s; {device}, threads: {torch.get_num_threads()}; {hyper.steps} "
        f"steps, batches of {hyper.batch_size}"
    )
    swapped = mnist_fast.FastTraining(hyper, resident, backend=backend).swapped
    console.print(str(swapped or f"backend {backend}: torch.nn's own modules"), markup=False)
    if backend != "eager":
        agrees, sentence = _fast_recipe.agrees_with_eager(hyper, resident, backend)
        console.print(sentence, markup=False)
        if not agrees:
            errors.print(f"Stopped: {backend} does not train as eager does; nothing was timed.")
            return FAILED

    with _progress(console) as progress:
        bar = progress.add_task("seeds", total=seeds)
        outcome = _fast_recipe.run_seeds(
            hyper, resident, seeds, backend=backend, on_run=lambda run: progress.advance(bar)
        )
    if outcome.diverged:
        errors.print(f"Stopped: {outcome.diverged}.", markup=False)
    if not outcome.runs:
        if outcome.diverged:
            return FAILED
        errors.print("Interrupted before the first seed was finished.")
        return INTERRUPTED
    console.print(_fast_recipe.table(data.title, outcome))
    for note in sorted({run.note for run in outcome.runs} - {""}):
        console.print(note, markup=False)
    console.print(_fast_recipe.verdict(outcome))
    if options.json is not None:
        _fast_recipe.save(
            options.json,
            outcome,
            data_title=data.title,
            load_s=load_s,
            described=described,
            swapped=[str(entry) for entry in swapped or ()],
        )
        console.print(f"saved {options.json}", markup=False)
    if outcome.interrupted:
        errors.print(f"Interrupted after {len(outcome.runs)} of {seeds} seeds.")
        return INTERRUPTED
    return FAILED if outcome.failed else OK


def _check_fast(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what does not go with `--recipe fast`."""
    for name in ("epochs", "batch_size", "lr", "gamma"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} does not go with --recipe fast, which fixes it")
    for name in ("save", "resume"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} does not go with --recipe fast, which writes no checkpoint")
    if options.dataset not in (None, "mnist"):
        parser.error(
            f"--dataset {options.dataset} does not go with --recipe fast, which was chosen on MNIST"
        )
    if options.backend == "all":
        parser.error("--backend all does not go with --recipe fast; name one backend")
    _check_writable(parser, "--json", options.json)


def _command(options: argparse.Namespace) -> str:
    """The command line again, without what names a path."""
    words = ["python", "-m", "pyext.train", options.workload, "--recipe", options.recipe]
    for name in ("backend", "device", "seed", "seeds", "threads"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--validation"] * options.validation
    return shlex.join(words)


def _load(name: str, options: argparse.Namespace, console: Console) -> datasets.Data:
    """The data set, downloaded with a progress bar where it is absent."""
    with _progress(console) as progress:
        return datasets.load(
            name,
            options.data_dir,
            download=not options.no_download,
            progress=lambda file: _DownloadBar(progress, file),
        )


def _check_writable(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """Says before the training what would fail after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        parser.error(f"{flag}: there is no folder {path.parent}")
    if path.is_dir():
        parser.error(f"{flag}: {path} is a folder, not a file")
    if not os.access(path.parent, os.W_OK):
        parser.error(f"{flag}: the folder {path.parent} cannot be written to")


def _run(training: Training, save: Path | None, console: Console) -> bool:
    """Trains with a progress bar; on Ctrl-C stops after the current step and returns False."""
    epoch_start = time.perf_counter()
    with _progress(console) as progress, _Interruption(console) as interruption:
        bar = progress.add_task("", total=training.steps_per_epoch)

        def on_step(training: Training) -> None:
            every = max(1, training.steps_per_epoch // 100)
            if training.step_in_epoch % every == 0:
                progress.update(
                    bar,
                    description=f"epoch {training.epoch + 1}/{training.hyper.epochs}, "
                    f"loss {training.mean_loss:.4f}",
                    completed=training.step_in_epoch,
                )

        def on_epoch(training: Training, result: TestResult) -> None:
            nonlocal epoch_start
            now = time.perf_counter()
            console.print(
                f"epoch {training.epoch}: test accuracy {100 * result.accuracy:.2f} %, "
                f"test loss {result.loss:.4f}, {now - epoch_start:.1f} s"
            )
            epoch_start = now
            progress.reset(bar)

        completed = mnist_cnn.train(
            training,
            save=save,
            on_step=on_step,
            on_epoch=on_epoch,
            should_stop=lambda: interruption.requested,
        )
    if not completed:
        kept = (
            f"{save} holds everything up to there: go on with --resume {save}."
            if save
            else "Nothing was saved: there was no --save."
        )
        console.print(f"Interrupted at {_position(training)}. {kept}", markup=False)
    return completed


class _Interruption:
    """Turns the first Ctrl-C into a request, so that no step is left half done."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console

    def __enter__(self) -> _Interruption:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print("Ctrl-C: stopping after this step; press it again to stop at once.")


class _DownloadBar:
    """A download as pooch reports it, shown by rich."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(f"downloading {name}", total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.remove_task(self._task)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield progress


def _hyper_parameters(
    parser: argparse.ArgumentParser, options: argparse.Namespace, state: dict[str, Any] | None
) -> HyperParameters:
    """The flags over the defaults, or over a checkpoint's, of which only the epochs may change."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(HyperParameters)
        if getattr(options, field.name) is not None
    }
    if state is None:
        return dataclasses.replace(DEFAULTS, **given)
    saved = HyperParameters(**state["hyper_parameters"])
    for name, value in given.items():
        if name != "epochs" and value != getattr(saved, name):
            flag = f"--{name.replace('_', '-')}"
            parser.error(
                f"{flag} {value} contradicts the checkpoint, which was trained with "
                f"{getattr(saved, name)}; only --epochs may change in a resumed run"
            )
    return dataclasses.replace(saved, epochs=given.get("epochs", saved.epochs))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if reason := BACKENDS["eager"].unavailable(device):
        raise _Missing(f"--device {name} is not available: {reason}.")
    return device


def _offered() -> dict[str, Backend]:
    return {name: backend for name, backend in BACKENDS.items() if not backend.checks_only}


def _backends(
    wanted: str | None, device: torch.device, state: dict[str, Any] | None, console: Console
) -> list[str]:
    """The backends to train with, in order; says of `all` which ones are missing, and why."""
    if wanted == "all":
        available = backends(device)
        for name, backend in _offered().items():
            if name not in available:
                reason = backend.unavailable(device) or (
                    "it only runs in an interpreter here, which takes days; name it to try it"
                )
                console.print(f"without {name}: {reason}", markup=False)
        return sorted(available, key=lambda name: name != "eager")
    name = wanted or (state["backend"] if state else backends(device)[0])
    if reason := BACKENDS[name].unavailable(device):
        raise _Missing(f"backend {name!r} is not available for {device}: {reason}.")
    if BACKENDS[name].interpreted and device.type == "cpu":
        console.print(f"{name} runs in its interpreter here: right, but very slow")
    return [name]


def _save_path(path: Path | None, backend: str, *, several: bool) -> Path | None:
    return path.with_stem(f"{path.stem}.{backend}") if path and several else path


def _describe(hyper: HyperParameters) -> str:
    return (
        f"{hyper.epochs} epochs, batches of {hyper.batch_size}, lr {hyper.lr:g}, "
        f"gamma {hyper.gamma:g}, seed {hyper.seed}"
    )


def _introduction(training: Training) -> str:
    if not training.swapped:
        return f"backend {training.backend}: torch.nn's own modules"
    return "\n".join(map(str, training.swapped))


def _position(training: Training) -> str:
    return (
        f"epoch {training.epoch + 1}, step {training.step_in_epoch} of {training.steps_per_epoch}"
    )


def _summary(title: str, finished: Sequence[tuple[Training, float]]) -> Table:
    table = Table(
        title=f"MNIST CNN on {title}",
        caption="Times of runs one after the other; to compare backends, use benchmarks/run.py.",
    )
    for column in ("backend", "epochs", "test accuracy", "test loss", "time"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for training, seconds in finished:
        result = training.tests[-1]
        table.add_row(
            training.backend,
            str(training.epoch),
            f"{100 * result.accuracy:.2f} %",
            f"{result.loss:.4f}",
            f"{seconds:.1f} s",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyext.train",
        description="Train a network with one of the lab's backends, or with each in turn.",
        epilog="Exit codes: 0 trained; 1 the loss is not finite, or with the fast recipe a backend "
        "does not train as eager does or the mean over "
        f"{_fast_recipe.SEEDS_OF_A_CLAIM} seeds or more is below "
        f"{100 * mnist_fast.TARGET_ACCURACY:g} %; 2 wrong usage; 3 the data, the device or the "
        "backend is not available; 130 interrupted.",
    )
    parser.add_argument("workload", choices=["mnist"], help="the MNIST CNN of PyTorch's examples")
    parser.add_argument(
        "--recipe",
        choices=["example", "fast"],
        default="example",
        help="example (default): network and training of PyTorch's examples; fast: a small network "
        "and a short schedule, both fixed, to 99 %% in the least time",
    )
    parser.add_argument(
        "--seeds",
        type=_arguments.integer(1),
        metavar="N",
        help="with --recipe fast: train with N seeds from --seed on, and show their spread",
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="with --recipe fast: hold out a sixth of the training images and test on them, not "
        "on the test set",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --recipe fast: write results and machine"
    )
    parser.add_argument(
        "--backend",
        choices=[*_offered(), "all"],
        help="default: the first of " + ", ".join(_offered()) + " that is available; with "
        "--recipe fast: eager",
    )
    parser.add_argument(
        "--device", type=_device_name, default="auto", help="auto (default), cpu or cuda"
    )
    parser.add_argument(
        "--dataset",
        choices=[*datasets.DATASETS, "digits"],
        help="default: mnist; digits is scikit-learn's, which needs no download and is not MNIST",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="default: PYEXT_DATA, or a cache folder of yours"
    )
    parser.add_argument("--no-download", action="store_true", help="use only data that is there")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write a checkpoint each epoch")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint")
    for flag, kind, text in (
        ("--epochs", _arguments.integer(1), "how often to go through the training set"),
        ("--batch-size", _arguments.integer(1), "examples in a step"),
        ("--lr", _arguments.number(lambda value: value > 0, "above 0"), "Adadelta's learning rate"),
        (
            "--gamma",
            _arguments.number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
            "what the learning rate is multiplied by after each epoch",
        ),
        ("--seed", _arguments.seed, "of weights, order and dropout"),
    ):
        default = getattr(DEFAULTS, flag.removeprefix("--").replace("-", "_"))
        parser.add_argument(flag, type=kind, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--threads", type=_arguments.integer(1), metavar="N", help="default: PyTorch's choice"
    )
    return parser


def _device_name(text: str) -> str:
    kind, _, index = text.partition(":")
    if text in ("auto", "cpu") or (kind == "cuda" and (index.isdigit() or text == "cuda")):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:INDEX")


if __name__ == "__main__":
    sys.exit(main())
