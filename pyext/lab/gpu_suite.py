"""Everything that needs an NVIDIA GPU, in one command: build, test, sanitize, bench.

``python -m pyext.lab gpu-suite`` runs each part in processes of their own, within a budget of time,
and goes on with the next part when one fails. Its folder holds the logs, the benchmarks' result
file and plots, and ``summary.json``, which is written anew after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from pyext._build import toolchain
from pyext.backends import BACKENDS
from pyext.lab import environment, results

SCHEMA = "pyext-lab/gpu-suite/1"
ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, WRONG_USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
# What a part gets of the time that is left, against the parts after it.
WEIGHTS = {"build": 3, "test": 9, "sanitize": 4, "bench": 8}
PARTS = tuple(WEIGHTS)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER = "compute-sanitizer"
SANITIZER_FOUND = 86  # its exit code where it has found something, unlike any of ours
# From being asked to stop until being killed; pytest and run.py still write their files.
GRACE_S = 20.0
# Python, PyTorch and CUDA, started under compute-sanitizer.
SANITIZER_START_S = 15.0
# A CUDA context and what PyTorch's allocator keeps, for each process of the tests.
GPU_GIB_PER_WORKER, MOST_WORKERS = 3.0, 12
# Looks at the GPU in a process of its own: a context in this one would stay on it to the end.
DESCRIBE = "import json; from pyext.lab import environment; print(json.dumps({}))".format(
    "environment.describe('{device}', 0)"
)
# Prints why the extension that is built cannot be used on the device; nothing if it can.
EXAMINE = """
from pyext import doctor, registry
from pyext.backends import BACKENDS
reasons = (doctor.examine(op, BACKENDS["extension"], "{device}") for op in registry.ops().values())
print(next(filter(None, reasons), ""))
"""


@dataclass
class Step:
    """One process, and what became of it."""

    name: str
    command: list[str]
    limit_s: float
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """Additions to the environment; None takes one away."""
    judge: Callable[[Step], None] = lambda step: None
    """Sets ``status`` and ``detail``, once the process has ended, from its exit code and log."""
    status: str = "not run"
    """``passed``, ``failed``, ``missing`` (the environment lacks something), ``cut`` (its time was
    up), ``interrupted`` or ``not run``."""
    detail: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    out_of_time: bool = False
    log: Path | None = None

    def text(self) -> str:
        """What the process printed."""
        return self.log.read_text(errors="replace") if self.log and self.log.exists() else ""

    def last_line(self) -> str:
        """The last line that it printed."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it printed nothing"

    def settle(self) -> None:
        """The usual verdict on a process that has ended; a judge may know better."""
        if self.out_of_time:
            self.status, self.detail = "cut", f"stopped after {self.limit_s:.0f} s"
        elif self.exit_code == OK:
            self.status = "passed"
        else:
            self.status = "missing" if self.exit_code == MISSING else "failed"
            self.detail = f"exit code {self.exit_code}: {self.last_line()}"

    def to_json(self, folder: Path) -> dict[str, Any]:
        """For ``summary.json``: no path but those within the folder."""
        command = shlex.join(
            ["python" if word == sys.executable else word for word in self.command]
        )
        return {
            "name": self.name,
            "status": self.status,
            "detail": _without_paths(self.detail, folder),
            "seconds": round(self.seconds, 1),
            "limit_s": round(self.limit_s, 1),
            "exit_code": self.exit_code,
            "command": _without_paths(command, folder),
            "variables": dict(self.variables),
            "log": None if self.log is None else str(self.log.relative_to(folder)),
        }


@dataclass
class Part:
    """One of ``PARTS`` and its steps."""

    name: str
    budget_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    detail: str = ""
    """Why there is no step."""
    status_without_steps: str = "not run"

    @property
    def status(self) -> str:
        """The worst of its steps'."""
        found = {step.status for step in self.steps} or {self.status_without_steps}
        order = ("interrupted", "failed", "missing", "cut", "not run", "passed")
        return next(status for status in order if status in found)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def _without_paths(text: str, folder: Path) -> str:
    return text.replace(f"{folder}{os.sep}", "").replace(f"{ROOT}{os.sep}", "")


class Suite:
    """The parts that were asked for, run one after the other.

    Args:
        folder: where everything goes; must exist.
        parts: of ``PARTS``.
        seconds: for all of them together.
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        rebuild: build even where a usable extension is there.
        console: for people.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[str],
        seconds: float,
        device: str,
        rebuild: bool,
        console: Console,
    ):
        self.folder, self.device, self.rebuild = folder, device, rebuild
        self.parts = {name: Part(name) for name in parts}
        self.environment: dict[str, Any] | None = None
        self._console = console
        self._seconds = seconds
        self._started = time.monotonic()
        self._date = datetime.datetime.now(datetime.UTC)
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Runs everything; returns the exit code."""
        runners = {
            "build": self._build,
            "test": self._test,
            "sanitize": self._sanitize,
            "bench": self._bench,
        }
        interrupted = False
        try:
            if not self._look_at_the_device():
                return MISSING
            for name, part in self.parts.items():
                part.budget_s = self._budget(name)
                self._say(f"[bold]{name}[/] (at most {part.budget_s:.0f} s)")
                runners[name](part)
                self.save()
        except KeyboardInterrupt:
            interrupted = True
        self.save()
        self.show()
        return self._conclude(interrupted)

    def save(self) -> None:
        """Writes ``summary.json``, as a whole."""
        data = {
            "schema": SCHEMA,
            "started": self._date.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._started, 1),
            "budget_s": self._seconds,
            "device": self.device,
            "environment": self.environment,
            "parts": [
                {
                    "name": part.name,
                    "status": part.status,
                    "detail": part.detail,
                    "seconds": round(part.seconds, 1),
                    "budget_s": round(part.budget_s, 1),
                    "steps": [step.to_json(self.folder) for step in part.steps],
                }
                for part in self.parts.values()
            ],
        }
        results.replace_file(self.folder / "summary.json", json.dumps(data, indent=1) + "\n")

    def show(self) -> None:
        """Prints the summary as a table."""
        table = Table(title=f"GPU suite on {self._device_name()}", title_style="bold")
        for title in ("part", "step", "outcome", "time", "detail"):
            table.add_column(title, overflow="fold", justify="right" if title == "time" else "left")
        for part in self.parts.values():
            if not part.steps:
                table.add_row(part.name, "", part.status, "", part.detail)
            for step in part.steps:
                time_text = f"{step.seconds:.0f} s"
                detail = _without_paths(step.detail, self.folder).replace("[", r"\[")
                table.add_row(part.name, step.name, _styled(step.status), time_text, detail)
        self._console.print(table)

    def _conclude(self, interrupted: bool) -> int:
        """The last sentences, and the exit code."""
        self._say(f"Logs, results and summary.json are in {_shown(self.folder)}.")
        by_status: dict[str, list[str]] = {}
        for part in self.parts.values():
            by_status.setdefault(part.status, []).append(part.name)
        if interrupted:
            self._say("Interrupted: what was finished is kept.")
            return INTERRUPTED
        if "cut" in {step.status for part in self.parts.values() for step in part.steps}:
            self._say("Not everything ran: the time was up. --minutes gives it more.")
        if failed := by_status.get("failed"):
            self._say(f"[bold red]Failed:[/] {', '.join(failed)}.")
            return FAILED
        if missing := by_status.get("missing"):
            names = ", ".join(missing)
            self._say(f"[bold yellow]Not done, for something is missing here:[/] {names}.")
            return MISSING
        return OK

    # --- parts -----------------------------------------------------------------------------------

    def _look_at_the_device(self) -> bool:
        """Fills in ``environment``; False, with a sentence, where the device refuses work."""
        step = self._python_step("device", DESCRIBE.format(device=self.device), 120.0)
        self._run([step])
        if step.status != "passed":
            self._say(f"The {self.device} device cannot be used: {step.detail}")
            return False
        self.environment = json.loads(step.text().strip().splitlines()[-1])
        return True

    def _build(self, part: Part) -> None:
        examine = EXAMINE.format(device=self.device)
        if not self.rebuild:
            found = self._python_step("prebuilt extension", examine, part.budget_s)
            found.judge = _judge_examination
            self._run([found])
            if found.status == "passed":
                found.detail = "taken as it is; --rebuild builds it anew"
                part.steps.append(found)
                return
            self._say(f"  no prebuilt extension: {found.detail}")
        if self.device == "cuda" and (reason := _compiler_missing()):
            part.status_without_steps, part.detail = "missing", reason
            self._say(f"  {reason}")
            return
        command = ["pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        build = self._step(
            "pip install -e .",
            [sys.executable, "-m", *command],
            part.budget_s,
            self._build_variables(),
        )
        check = self._python_step("built extension", examine, 120.0)
        check.judge = _judge_examination
        part.steps += [build, check]
        self._run([build])
        if build.status == "passed":
            self._run([check])
        else:
            check.detail = "nothing was built"

    def _build_variables(self) -> dict[str, str]:
        if self.device == "cpu":
            return {}
        capability = self.environment["gpu"]["compute_capability"]
        # This GPU's alone compiles three times as fast as the default list.
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or capability
        return {"PYEXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": chosen}

    def _test(self, part: Part) -> None:
        if importlib.util.find_spec("pytest") is None:
            part.status_without_steps, part.detail = "missing", "pytest is not installed."
            return
        end = time.monotonic() + part.budget_s
        plain = "not slow and not exhaustive and not large"
        runs = [("plain tier", plain, [], {"TRITON_INTERPRET": None})]
        if self.device == "cuda":
            interpreted = {"TRITON_INTERPRET": "1"}
            runs.append(("Triton interpreted", plain, ["-k", "triton-cpu"], interpreted))
        slow = "slow and not exhaustive and not large"
        runs.append(("slow tier", slow, [], {"TRITON_INTERPRET": None}))
        part.steps += [self._pytest_step(*run) for run in runs]
        for step in part.steps:
            self._run_until(step, end)

    def _pytest_step(
        self, name: str, tier: str, more: Sequence[str], variables: Mapping[str, str | None]
    ) -> Step:
        report = self.folder / "logs" / f"test-{environment.slug(name)}.xml"
        command = [sys.executable, "-m", "pytest", "-m", tier, f"--junitxml={report}", *more]
        # That test is the step `Triton interpreted`.
        command += ["--deselect", "tests/test_triton.py::test_interpreted_on_a_machine_with_a_gpu"]
        threads = _usable_cpus()
        if importlib.util.find_spec("xdist"):
            workers = self._workers()
            command += ["-n", str(workers)]
            threads = max(1, threads // workers)
        step = self._step(name, command, 0.0, {**variables, "OMP_NUM_THREADS": str(threads)})
        step.judge = lambda step: _judge_pytest(step, report)
        return step

    def _workers(self) -> int:
        workers = min(_usable_cpus(), MOST_WORKERS)
        gpu = self.environment["gpu"]
        return max(1, min(workers, int(gpu["memory_gib"] / GPU_GIB_PER_WORKER)) if gpu else workers)

    def _sanitize(self, part: Part) -> None:
        end = time.monotonic() + part.budget_s
        backends = [
            name
            for name, backend in BACKENDS.items()
            if backend.namespace and not backend.checks_only
        ]
        # First without a tool: that the results are right, and that Triton has compiled all of it.
        plain = [self._kernel_calls(f"{name}, no tool", name, []) for name in backends]
        tool = shutil.which(SANITIZER)
        checked = [
            self._kernel_calls(f"{name}, {kind}", name, _sanitizer_command(tool, kind, port))
            for port, (kind, name) in enumerate((k, n) for k in TOOLS for n in backends)
        ]
        part.steps += [*plain, *checked]
        workers = max(1, min(len(checked), _usable_cpus() // 2))
        self._run_together(plain, end - 0.6 * part.budget_s, workers)
        if tool is None:
            for step in checked:
                step.status = "missing"
                step.detail = f"{SANITIZER} is not on the PATH; it comes with the CUDA toolkit"
            self._say(f"  {SANITIZER} is not on the PATH: the kernels' memory is not checked.")
            return
        self._run_together(checked, end, workers)

    def _kernel_calls(self, name: str, backend: str, wrapper: Sequence[str]) -> Step:
        command = [sys.executable, "-m", "pyext.lab.kernel_calls"]
        command += ["--device", self.device, "--backend", backend]
        # Each tensor is an allocation of its own: in PyTorch's pool what is out of bounds is not.
        variables: dict[str, str | None] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        variables["TRITON_INTERPRET"] = "1" if self.device == "cpu" else None
        step = self._step(name, [*wrapper, *command], 0.0, variables)
        step.judge = _judge_kernel_calls
        return step

    def _bench(self, part: Part) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--device", self.device]
        command += ["--profile", "full" if self.device == "cuda" else "quick"]
        # Its own plan for the time must end before ours does.
        minutes = max(part.budget_s - GRACE_S, 10.0) / 60
        command += ["--minutes", f"{minutes:.2f}", "--out", str(self.folder)]
        step = self._step("run.py", command, part.budget_s, {"TRITON_INTERPRET": None})
        step.judge = lambda step: _judge_bench(step, self.folder)
        part.steps.append(step)
        self._run([step])

    # --- processes -------------------------------------------------------------------------------

    def _step(
        self,
        name: str,
        command: list[str],
        limit_s: float,
        variables: Mapping[str, str | None] | None = None,
    ) -> Step:
        log = self.folder / "logs" / f"{environment.slug(name)}.txt"
        return Step(name, command, limit_s, variables or {}, log=log)

    def _python_step(self, name: str, code: str, limit_s: float) -> Step:
        return self._step(name, [sys.executable, "-c", code], limit_s, {"TRITON_INTERPRET": None})

    def _run_until(self, step: Step, end: float) -> None:
        """Runs one step if there is time for it."""
        step.limit_s = end - time.monotonic()
        if step.limit_s < 5:
            step.status, step.detail, step.limit_s = "cut", "no time was left for it", 0.0
            return
        self._run([step])

    def _run_together(self, steps: Sequence[Step], end: float, workers: int) -> None:
        """Kernel calls, several at a time, each told how much time it has."""
        rounds = -(-len(steps) // workers)
        limit = (end - time.monotonic()) / rounds
        for step in steps:
            step.limit_s = max(limit, SANITIZER_START_S + 5)
            step.command += ["--seconds", f"{step.limit_s - SANITIZER_START_S:.0f}"]
        self._run(steps, workers)

    def _run(self, steps: Sequence[Step], workers: int = 1) -> None:
        """Runs steps, ``workers`` at a time; a step that is out of time is asked to end.

        Raises KeyboardInterrupt where the user does, once all processes have ended.
        """
        waiting, running = list(steps), []
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_Process(waiting.pop(0)))
                for process in [each for each in running if each.ended()]:
                    running.remove(process)
                    self._finish(process)
                time.sleep(0.05)
        except KeyboardInterrupt:
            with _ignoring_interrupts():
                for process in running:
                    process.stop()
                for process in running:
                    process.wait()
                    process.step.status = "interrupted"
                    process.step.detail = process.step.last_line()
            raise

    def _finish(self, process: _Process) -> None:
        step = process.step
        step.settle()
        step.judge(step)
        detail = f": {_without_paths(step.detail, self.folder)}" if step.detail else ""
        self._say(f"  {step.name}: {_styled(step.status)} after {step.seconds:.0f} s", detail)
        self.save()

    def _budget(self, name: str) -> float:
        """This part's share of the time that is left."""
        names = list(self.parts)
        ahead = sum(WEIGHTS[each] for each in names[names.index(name) :])
        left = self._seconds - (time.monotonic() - self._started)
        return max(left * WEIGHTS[name] / ahead, 30.0)

    def _device_name(self) -> str:
        name = self.environment["device"] if self.environment else self.device
        return name if self.device == "cuda" else f"{name}: a rehearsal, no GPU was used"

    def _say(self, text: str, plain: str = "") -> None:
        self._console.print(text + plain.replace("[", r"\["), soft_wrap=True)


class _Process:
    """A step that is running, in a session of its own: Ctrl-C is this process's to pass on."""

    def __init__(self, step: Step):
        self.step = step
        self._start = time.monotonic()
        self._stopped_at: float | None = None
        environ = dict(os.environ)
        for name, value in step.variables.items():
            environ.pop(name, None) if value is None else environ.update({name: value})
        self._log: IO[bytes] = step.log.open("wb")
        try:
            self._child = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError:
            self._log.close()
            raise

    def ended(self) -> bool:
        """Whether it has ended; stops it when its time is up."""
        if self._child.poll() is not None:
            self._close()
            return True
        now = time.monotonic()
        if self._stopped_at is None and now - self._start > self.step.limit_s:
            self.step.out_of_time = True
            self.stop()
        elif self._stopped_at is not None and now - self._stopped_at > GRACE_S:
            self._kill()
        return False

    def stop(self) -> None:
        """Asks it to end, as Ctrl-C would."""
        self._stopped_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Until it has ended, by force if it must be."""
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            self._child.wait()
        self._close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _close(self) -> None:
        self.step.seconds = time.monotonic() - self._start
        self.step.exit_code = self._child.returncode
        self._kill()  # what it may have left running
        self._log.close()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """While the processes end: a second Ctrl-C must not leave them behind."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# --- verdicts ------------------------------------------------------------------------------------


def _judge_examination(step: Step) -> None:
    """The extension's examination prints what is wrong with it."""
    if step.status == "passed" and step.text().strip():
        step.status, step.detail = "failed", step.last_line()


def _judge_pytest(step: Step, report: Path) -> None:
    """Counts the tests by pytest's own report, which it writes also when it is stopped."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        if step.status == "cut":
            step.detail += " before it had written its report"
        return
    names = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in names
    )
    passed = tests - failures - errors - skipped
    counts = f"{passed} passed, {failures + errors} failed, {skipped} skipped"
    collected = re.search(r"(\d+) (?:items\]|selected|items\n)", step.text())
    if step.status == "cut":
        of = f" of {collected[1]}" if collected else ""
        step.detail = f"{step.detail}, {tests}{of} tests in: {counts}"
    elif step.exit_code in (0, 1):
        step.detail = counts
    if failures or errors:
        step.status = "failed"
        first = next(
            f"{case.get('classname')}::{case.get('name')}"
            for suite in suites
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        )
        step.detail += f"; first {first}"
    elif step.status == "cut" and not passed:
        step.status = "failed"


def _judge_kernel_calls(step: Step) -> None:
    """The calls' own count, and what the tool around them found."""
    text = step.text()
    counts = re.findall(r"^(\d+) of (\d+) calls, (\d+) failed$", text, re.MULTILINE)
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if "Device not supported" in text:
        step.status, step.detail = "missing", f"{SANITIZER} does not support this device"
        return
    if step.exit_code == MISSING:
        return
    found = [f"{SANITIZER}: {errors[-1]}"] if errors else []
    if not counts:
        last = next((x for x in reversed(text.splitlines()) if x and x[0] not in "= "), "nothing")
        step.detail = "; ".join([step.detail, f"last call: {last}", *found])
        if step.status == "cut" and step.exit_code == SANITIZER_FOUND:
            step.status = "failed"
        return
    done, every, _ = (int(number) for number in counts[-1])
    step.detail = "; ".join([f"{done} of {every} calls", *found])
    if wrong := re.search(r"^FAILED (.*)$", text, re.MULTILINE):
        step.status, step.detail = "failed", f"{step.detail}; {wrong[1]}"
    elif step.status == "passed" and done < every:
        step.status = "cut" if done else "failed"


def _judge_bench(step: Step, folder: Path) -> None:
    """Counts the rows of the result file, which is there whatever happened."""
    if step.exit_code == MISSING:
        return
    try:
        data = results.load(folder)
    except (OSError, ValueError):
        return
    by_status: dict[str, int] = {}
    for row in data["rows"]:
        by_status[row["status"]] = by_status.get(row["status"], 0) + 1
    counts = ", ".join(f"{count} {status}" for status, count in by_status.items()) or "no rows"
    step.detail = "; ".join(filter(None, [step.detail, counts, *data["notes"]]))
    if step.status == "passed" and "skipped" in by_status:
        step.status = "cut"


# --- what the machine has ------------------------------------------------------------------------


def _compiler_missing() -> str | None:
    """Why the CUDA kernels cannot be built here."""
    import torch

    found = toolchain.find_cuda_toolkit(torch.version.cuda or "", toolchain.search_paths())
    if isinstance(found, str):
        return f"{found}, so the extension cannot be built; `pip install -e .` brings a compiler"
    return None


def _sanitizer_command(tool: str | None, kind: str, number: int) -> list[str]:
    command = [tool or SANITIZER, "--tool", kind, "--error-exitcode", str(SANITIZER_FOUND)]
    # Several run at once; each tries ten ports from its own on.
    command += ["--target-processes", "application-only", "--port", str(49152 + 16 * number)]
    if kind != "initcheck":  # that must see who writes
        command += ["--kernel-name-exclude", "kns=2at6native"]
    return command


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _styled(status: str) -> str:
    style = {"passed": "green", "failed": "bold red", "missing": "yellow", "cut": "yellow"}
    return f"[{style.get(status, 'dim')}]{status}[/]"


def _shown(folder: Path) -> str:
    return os.path.relpath(folder)


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gpu-suite``."""
    parser.add_argument(
        "--only", metavar="PARTS", help=f"of {','.join(PARTS)}; separated by commas (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: below benchmarks/results")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for all parts together (default: 10)"
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="build even where a usable extension is there"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: rehearse without a GPU (default: cuda)",
    )


def main(options: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    """Runs the command; returns the exit code.

    Args:
        options: as ``add_arguments`` parsed them.
        fail: ends the program with a sentence about wrong usage.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    parts = PARTS if options.only is None else options.only.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        fail(f"--only does not know {', '.join(map(repr, unknown))}; it accepts {','.join(PARTS)}")
    if not options.minutes > 0:
        fail(f"--minutes must be more than 0, not {options.minutes}")
    if not (ROOT / "setup.py").exists():
        console.print("gpu-suite needs the sources, and this is an installed package: clone them.")
        return MISSING
    if reason := BACKENDS["eager"].unavailable(options.device):
        console.print(f"gpu-suite needs an NVIDIA GPU: {reason}.", soft_wrap=True)
        return MISSING
    try:
        folder = (options.out or ROOT / "benchmarks" / "results" / _default_name()).resolve()
        suite = Suite(
            folder,
            [name for name in PARTS if name in parts],
            60 * options.minutes,
            options.device,
            options.rebuild,
            console,
        )
    except OSError as error:
        fail(f"cannot write to {options.out}: {error.strerror}")
    return suite.run()


def _default_name() -> str:
    return f"gpu-suite-{datetime.datetime.now():%Y%m%d-%H%M%S}"
