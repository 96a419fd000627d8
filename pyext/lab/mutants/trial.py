"""One mutant's trial: built, run against the tests, and proven to be what ran."""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pyext.lab.mutants import witness
from pyext.lab.mutants.patches import Mutant
from pyext.lab.mutants.scratch import BuildFailed, Scratch
from pyext.lab.mutants.witness import sha256

SLOWEST_TEST_S = 240
"""A test that runs for longer hangs: on an idle machine none of those below takes 30 s."""
MOST_MEMORY = 12 << 30
"""A mutant that loses count of its elements must not take the machine down."""


class Stopped(RuntimeError):
    """``stop`` was called."""


class NoEvidence(RuntimeError):
    """What ran was not the mutant: a defect of the harness, never a result."""


@dataclass(frozen=True)
class Checks:
    """A way's tests, as arguments of pytest."""

    files: tuple[str, ...]
    keyword: str
    libraries: tuple[str, ...]
    """Those that must be built, and must be what the tests loaded."""
    backend: str
    """Whose outputs show whether a mutant changes anything at all."""

    @property
    def complete(self) -> list[str]:
        return [*self.files, "-k", self.keyword]

    def narrow(self, word: str) -> list[str]:
        """The fastest of those with a word in their names."""
        if word.startswith("test_"):
            return [f"tests/{word}.py", "-k", self.keyword]
        return ["tests/test_ops.py", "-k", f"test_agrees and {word} and ({self.keyword})"]


_OPS = tuple(
    f"tests/test_{name}.py"
    for name in ("ops", "relu_mask", "contract", "autograd", "autocast", "indexing", "opinfo")
)
"""What every backend has to pass."""

CHECKS = {
    "cpp": Checks(
        (*_OPS, "tests/test_memory.py", "tests/test_backends.py"),
        "not triton and not emulated and not eager-cpu",
        ("cpp",),
        "extension",
    ),
    "cuda": Checks(_OPS, "emulated", ("cpp", "cuda"), "extension-emulated"),
    "triton": Checks(
        ("tests/test_triton.py", *_OPS, "tests/test_compile_report.py"),
        "triton",
        ("cpp",),
        "triton",
    ),
    "python": Checks(
        (*_OPS, "tests/test_nn.py", "tests/test_optim.py", "tests/test_backends.py"),
        "not triton and not emulated",
        ("cpp",),
        "extension",
    ),
}
"""Way -> its tests."""

_OP_FILES = Path(__file__).parents[2] / "ops"
# Files that several ops share -> which tests show first what is wrong with them.
_SHARED = {
    "elementwise": "relu",
    "reduce": "mse_loss",
    "reduction": "mse_loss",
    "autograd": "mse_loss",
    "sliced_sgd": "sgd_step",
    "checks": "sgd_step",
    "nn": "test_nn",
    "optim": "test_optim",
    "backends": "test_backends",
}


def first_of(mutant: Mutant) -> str:
    """A word in the names of the tests that come first."""
    stem = Path(mutant.path).stem.lstrip("_")
    if (_OP_FILES / f"{stem}.py").is_file():  # an op's files bear its name
        return stem
    return _SHARED.get(stem, "two_layer")


@dataclass(frozen=True)
class Run:
    """What one run of pytest said."""

    verdict: str
    """``passed``, ``failed``, ``crashed`` or ``stopped`` (it hung, or took all memory)."""
    test: str | None
    """The first test that did not pass."""
    message: str
    passed: int
    loaded: Mapping[str, str]
    """Path -> hash of the project's files that were in use."""

    @property
    def caught(self) -> bool:
        return self.verdict != "passed"


@dataclass
class Row:
    """A mutant's line in the table."""

    mutant: Mutant
    status: str
    """``caught``, ``survived``, ``equivalent`` (no output changes), ``invalid`` (does not compile)
    or ``defect`` (of the harness: it was not the mutant that ran)."""
    by: str = ""
    """The test that caught it, or why it is invalid."""
    message: str = ""
    seconds: float = 0.0
    evidence: dict[str, str] = field(default_factory=dict)
    """What proves that the mutant ran: file -> hash."""


def try_mutant(
    scratch: Scratch, mutant: Mutant, original: Mapping[str, str], outputs: Mapping[str, str]
) -> Row:
    """Builds and runs one mutant.

    Args:
        scratch: an unmutated copy, which is unmutated again afterwards.
        mutant: the mutant.
        original: library -> its hash without any mutant.
        outputs: what ``outputs.py`` says of the original, for automatic mutants.

    Returns:
        Its row. An automatic mutant survives only if it changes an output; one by hand always does.
    """
    begin = time.monotonic()
    with scratch.mutated(mutant):
        try:
            row = _try(scratch, mutant, original, outputs)
        except NoEvidence as error:
            row = Row(mutant, "defect", str(error))
    row.seconds = time.monotonic() - begin
    return row


def _try(
    scratch: Scratch, mutant: Mutant, original: Mapping[str, str], outputs: Mapping[str, str]
) -> Row:
    checks = CHECKS[mutant.way]
    try:
        scratch.build(checks.libraries)
        if mutant.path.endswith(".py"):
            ast.parse((scratch.folder / mutant.path).read_text())
    except (BuildFailed, SyntaxError) as error:
        return Row(mutant, "invalid", str(error))
    in_library = mutant.way in checks.libraries
    if in_library:
        built = scratch.built[mutant.way]
        if mutant.path not in built.compiled:
            raise NoEvidence(f"{mutant.path} is no part of the library that was built")
        if built.sha256 == original[mutant.way]:
            return Row(mutant, "equivalent", "the same machine code")
    if not mutant.by_hand:  # one in two is caught at once, one in four changes nothing
        run, evidence = _run_mutant(scratch, mutant, checks.narrow(first_of(mutant)))
        if run.caught:
            return _caught(mutant, run, evidence)
        if not changes_output(scratch, mutant, outputs):
            return Row(mutant, "equivalent", "no output changes", evidence=evidence)
    run, evidence = _run_mutant(scratch, mutant, checks.complete)
    if run.caught:
        return _caught(mutant, run, evidence)
    return Row(mutant, "survived", evidence=evidence)


def _caught(mutant: Mutant, run: Run, evidence: dict[str, str]) -> Row:
    return Row(mutant, "caught", run.test or "the import", run.message, evidence=evidence)


def _run_mutant(
    scratch: Scratch, mutant: Mutant, arguments: list[str]
) -> tuple[Run, dict[str, str]]:
    first = f"test_triton.py {first_of(mutant)}"  # small tiles reach most, and are fast
    run = run_tests(scratch, arguments, first)
    return run, check_evidence(scratch, run, CHECKS[mutant.way].libraries, mutant)


def changes_output(scratch: Scratch, mutant: Mutant, outputs: Mapping[str, str]) -> bool:
    """Whether the mutant changes a bit of any output, crashes or hangs."""
    found = run_outputs(scratch, CHECKS[mutant.way], mutant)
    return found is None or found != dict(outputs)


def check_evidence(
    scratch: Scratch, run: Run, libraries: tuple[str, ...], mutant: Mutant | None = None
) -> dict[str, str]:
    """What proves that a run was the mutant's: file of the copy -> hash.

    Raises:
        NoEvidence: the tests loaded other files, or did not load the mutant's.
    """
    if not run.loaded:
        raise NoEvidence("the tests did not say what they loaded")
    root = scratch.folder.resolve()
    for path, digest in run.loaded.items():
        if not Path(path).resolve().is_relative_to(root):
            raise NoEvidence(f"{path} was loaded, which is not in the scratch copy {root}")
        if sha256(path) != digest:
            raise NoEvidence(f"{path} is not what it was when the tests ran")
    loaded = {
        Path(path).resolve().relative_to(root).as_posix(): digest
        for path, digest in run.loaded.items()
    }
    evidence = {}
    for name in libraries:
        built = scratch.built[name]
        if loaded.get(built.file) != built.sha256:
            raise NoEvidence(f"{built.file} was built but not loaded")
        evidence[built.file] = built.sha256
    if mutant and mutant.path.endswith(".py"):
        digest = sha256(scratch.folder / mutant.path)
        if loaded.get(mutant.path) != digest:
            raise NoEvidence(f"{mutant.path} was changed but not loaded")
        evidence[mutant.path] = digest
    return evidence


def run_tests(scratch: Scratch, arguments: list[str], first: str = "") -> Run:
    """Runs pytest in the copy, up to the first failure.

    Args:
        scratch: where.
        arguments: which tests.
        first: tests with one of these words in their name come first.
    """
    report = scratch.folder / "witness.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "pyext.lab.mutants.witness", "-p", "no:benchmark", *arguments]
    variables = {witness.REPORT: str(report), witness.FIRST: first}
    code, ended, output = _run(scratch, command, variables, watched=report)
    said = json.loads(report.read_text()) if report.exists() else {}
    known = {
        "passed": said.get("passed", 0),
        "loaded": said.get("loaded", {}),
    }
    if ended:
        return Run("stopped", said.get("running"), ended, **known)
    if code == -signal.SIGKILL:
        raise NoEvidence("the tests were killed, and not by this program")
    if code < 0:
        message = f"the process died of {signal.Signals(-code).name}"
        return Run("crashed", said.get("running"), message, **known)
    if code == 0:
        return Run("passed", None, "", **known)
    if said.get("failed") is None:
        raise NoEvidence(f"pytest ended with {code} and no failed test:\n{output[-2000:]}")
    return Run("failed", said["failed"], said["message"], **known)


def run_outputs(
    scratch: Scratch, checks: Checks, mutant: Mutant | None = None
) -> dict[str, str] | None:
    """Hashes of a backend's outputs over many inputs; None where it crashes or hangs.

    Raises:
        NoEvidence: they are another library's.
    """
    file = scratch.folder / "outputs.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pyext.lab.mutants.outputs", checks.backend, str(file)]
    variables = {"TRITON_INTERPRET": "1"} if checks.backend == "triton" else {}
    code, ended, _ = _run(scratch, command, variables, watched=file)
    if code == -signal.SIGKILL and not ended:
        raise NoEvidence("the outputs were killed, and not by this program")
    if code != 0:
        return None
    said = json.loads(file.read_text())
    run = Run("passed", None, "", len(said["hashes"]), said["loaded"])
    check_evidence(scratch, run, checks.libraries, mutant)
    return said["hashes"]


_children: set[subprocess.Popen] = set()
_stopped = threading.Event()


def stop() -> None:
    """Ends all trials that are under way in other threads; theirs raise ``Stopped``."""
    _stopped.set()
    for child in list(_children):
        os.killpg(child.pid, signal.SIGKILL)


def _run(
    scratch: Scratch, command: list[str], variables: Mapping[str, str], watched: Path
) -> tuple[int, str, str]:
    """(exit code, why this program ended it or "", output).

    It is ended when it writes nothing to ``watched`` for too long, or takes too much memory.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": str(scratch.folder),
        # Python takes an old .pyc for a new one of the same size and second.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch.folder / "inductor"),
        "TRITON_CACHE_DIR": str(scratch.folder / "triton"),
        "OMP_WAIT_POLICY": "passive",  # several children share the cores
        **variables,
    }
    log = scratch.folder / "log.txt"
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=scratch.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        _children.add(child)
        try:
            ended = _wait(child, watched)
        finally:
            _children.discard(child)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if _stopped.is_set():
        raise Stopped
    return child.returncode, ended, log.read_text(errors="replace")


def _wait(child: subprocess.Popen, watched: Path) -> str:
    """Waits until the child has ended, or says why it must be."""
    last, idle_s = None, 0  # counted, not read from a clock: a suspended machine makes no test slow
    while not _stopped.is_set():
        try:
            child.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if _resident_bytes(child.pid) > MOST_MEMORY:
                return f"it took over {MOST_MEMORY >> 30} GiB"
            changed = watched.stat().st_mtime_ns if watched.exists() else None
            idle_s = idle_s + 1 if changed == last else 0
            last = changed
            if idle_s > SLOWEST_TEST_S:
                return f"a test took over {SLOWEST_TEST_S} s"
    return ""


def _resident_bytes(pid: int) -> int:
    """What a process holds. (A limit of the kernel's would count what tests only reserve.)"""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # it has just ended
        return 0
