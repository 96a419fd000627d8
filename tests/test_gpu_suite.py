"""The GPU suite without a GPU: its parts, verdicts, time limits and Ctrl-C, on stand-in programs.

Its driver of kernel calls runs for real, on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pyext
from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import __main__ as lab
from pyext.lab import gpu_suite, kernel_calls
from pyext.lab.gpu_suite import Part, Step, Suite

pytestmark = pytest.mark.skipif(
    not (gpu_suite.ROOT / "setup.py").exists(), reason="needs the sources; this is an installation"
)
needs_extension = pytest.mark.skipif(
    BACKENDS["extension"].unavailable("cpu") is not None,
    reason=f"extension: {BACKENDS['extension'].unavailable('cpu')}",
)


@pytest.fixture
def suite(tmp_path):
    """A rehearsal of every part."""
    made = Suite(tmp_path, gpu_suite.PARTS, 60.0, "cpu", False, Console(quiet=True))
    made.environment = {"device": "a processor", "gpu": None}
    return made


def program(suite, code, name="program", limit_s=20.0) -> Step:
    return suite._step(name, [sys.executable, "-u", "-c", code], limit_s)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--only", "build,tests"], "--only does not know 'tests'; it accepts build,test,"),
            (["--minutes", "0"], "--minutes must be more than 0, not 0.0"),
            (["--minutes", "nan"], "--minutes must be more than 0, not nan"),
            (["--device", "tpu"], "--device"),
        ],
    )
    def test_wrong_usage_is_one_sentence_and_2(self, arguments, sentence, capsys):
        with pytest.raises(SystemExit) as stopped:
            lab.main(["gpu-suite", *arguments])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_no_gpu_is_one_sentence_and_3(self, capsys, tmp_path):
        assert lab.main(["gpu-suite", "--out", str(tmp_path / "out")]) == 3
        out = capsys.readouterr().out
        assert out.startswith("gpu-suite needs an NVIDIA GPU: ") and out.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_an_unwritable_folder_is_a_sentence_and_2(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit) as stopped:
            lab.main(["gpu-suite", "--device", "cpu", "--out", str(tmp_path / "file" / "x")])
        assert stopped.value.code == 2
        assert "cannot write to" in capsys.readouterr().err


class TestSteps:
    def test_outcomes_by_exit_code(self, suite):
        codes = {0: "passed", 1: "failed", 3: "missing"}
        for code, status in codes.items():
            step = program(suite, f"print('its last words'); raise SystemExit({code})")
            suite._run([step])
            assert (step.status, step.exit_code) == (status, code)
            assert code == 0 or step.detail == f"exit code {code}: its last words"

    def test_what_is_out_of_time_is_asked_to_end(self, suite):
        code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("files written")
"""
        step = program(suite, code, limit_s=1.0)
        suite._run([step])
        assert step.status == "cut" and step.text() == "files written\n" and step.seconds < 15

    def test_what_does_not_end_is_killed(self, suite, monkeypatch):
        monkeypatch.setattr(gpu_suite, "GRACE_S", 0.5)
        code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        step = program(suite, code, limit_s=1.0)
        suite._run([step])
        assert step.status == "cut" and step.exit_code == -signal.SIGKILL

    def test_several_at_once(self, suite, tmp_path):
        # Each waits for the other.
        code = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""
        steps = [program(suite, code, name) for name in ("one", "two")]
        steps[0].command += [str(tmp_path / "1"), str(tmp_path / "2")]
        steps[1].command += [str(tmp_path / "2"), str(tmp_path / "1")]
        suite._run(steps, workers=2)
        assert [step.status for step in steps] == ["passed", "passed"]

    def test_variables_are_added_and_taken_away(self, suite, monkeypatch):
        monkeypatch.setenv("TAKEN", "1")
        step = program(suite, "import os; print(os.environ.get('TAKEN'), os.environ['ADDED'])")
        step.variables = {"TAKEN": None, "ADDED": "2"}
        suite._run([step])
        assert step.text() == "None 2\n"


class TestParts:
    def test_the_next_part_runs_after_one_that_fails(self, suite, monkeypatch, tmp_path):
        def failing(part):
            part.steps.append(program(suite, "raise SystemExit('no luck')", "first"))
            suite._run(part.steps)

        def passing(part):
            part.steps.append(program(suite, "pass", "second"))
            suite._run(part.steps)

        def lacking(part):
            part.status_without_steps, part.detail = "missing", "no such tool"

        monkeypatch.setattr(suite, "_look_at_the_device", lambda: True)
        for name, part in zip(gpu_suite.PARTS, (lacking, failing, passing, passing), strict=True):
            monkeypatch.setattr(suite, f"_{name}", part)
        assert suite.run() == 1
        parts = summary(tmp_path)["parts"]
        assert [part["status"] for part in parts] == ["missing", "failed", "passed", "passed"]
        assert parts[1]["steps"][0]["detail"] == "exit code 1: no luck"
        assert parts[1]["steps"][0]["command"].startswith("python -u -c")
        assert (tmp_path / parts[1]["steps"][0]["log"]).read_text() == "no luck\n"

    def test_what_only_lacks_something_is_3(self, suite, monkeypatch):
        monkeypatch.setattr(suite, "_look_at_the_device", lambda: True)

        def lacking(part):
            part.status_without_steps, part.detail = "missing", "no such tool"

        for name in gpu_suite.PARTS:
            monkeypatch.setattr(suite, f"_{name}", lacking)
        assert suite.run() == 3

    def test_budgets_share_what_is_left(self, suite):
        suite._seconds = 600.0
        budgets = [suite._budget(name) for name in gpu_suite.PARTS]
        assert budgets[-1] == pytest.approx(600, abs=1)  # the last one gets all
        assert budgets[1] == pytest.approx(600 * 9 / 21, abs=1)

    def test_the_worst_step_is_the_parts_outcome(self):
        steps = [Step(name, [], 0.0, status=name) for name in ("passed", "cut", "failed")]
        assert Part("test", steps=steps).status == "failed"
        assert Part("test", steps=steps[:2]).status == "cut"

    def test_no_path_of_this_machine_is_in_the_summary(self, suite, tmp_path):
        step = suite._pytest_step("plain tier", "not slow", [], {})
        assert str(tmp_path) not in json.dumps(step.to_json(tmp_path))
        assert str(gpu_suite.ROOT) not in json.dumps(step.to_json(tmp_path))


class TestPytest:
    TESTS = """
import pytest, time
def test_right(): pass
@pytest.mark.skip(reason="here")
def test_skipped(): pass
def test_{last}(): {body}
"""

    def run(self, suite, tmp_path, last, body, limit_s=60.0):
        tests = tmp_path / "tests"
        tests.mkdir()
        (tests / "test_it.py").write_text(self.TESTS.format(last=last, body=body))
        step = suite._pytest_step("plain tier", "not slow", [str(tests)], {})
        step.command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull]
        step.command = [word for word in step.command if word not in ("-n", str(suite._workers()))]
        step.limit_s = limit_s
        suite._run([step])
        return step

    def test_counts(self, suite, tmp_path):
        step = self.run(suite, tmp_path, "too", "pass")
        assert (step.status, step.detail) == ("passed", "2 passed, 0 failed, 1 skipped")

    def test_a_failure_is_named(self, suite, tmp_path):
        step = self.run(suite, tmp_path, "wrong", "assert False")
        assert step.status == "failed"
        assert step.detail.startswith("1 passed, 1 failed, 1 skipped; first ")
        assert step.detail.endswith("test_it::test_wrong")

    def test_what_was_not_run_in_time_is_said(self, suite, tmp_path):
        step = self.run(suite, tmp_path, "endless", "time.sleep(60)", limit_s=8.0)
        assert step.status == "cut"
        assert "of 3 tests in: 1 passed, 0 failed, 1 skipped" in step.detail

    def test_no_report_is_no_success(self, suite, tmp_path):
        step = Step("x", [], 1.0, log=tmp_path / "log", exit_code=4)
        step.log.write_text("ERROR: usage")
        step.settle()
        gpu_suite._judge_pytest(step, tmp_path / "absent.xml")
        assert (step.status, step.detail) == ("failed", "exit code 4: ERROR: usage")


# Stands for compute-sanitizer: finds what FOUND says in what its arguments run.
FAKE_SANITIZER = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index({python!r}):]
options = sys.argv[1:sys.argv.index({python!r})]
assert options[:2] == ["--tool", options[1]] and "--error-exitcode" in options
status = subprocess.run(command).returncode
found = os.environ["FOUND"]
if found == "nothing":
    print("========= ERROR SUMMARY: 0 errors")
elif found == "no device":
    print("========= Error: Device not supported")
    sys.exit(1)
else:
    print("========= Invalid __global__ read of size 4 bytes")
    print("========= ERROR SUMMARY: 1 error")
    status = int(options[options.index("--error-exitcode") + 1])
sys.exit(status)
"""
FAKE_CALLS = """
import sys
print("relu extension float32 4096")
print("{done} of 9 calls, {failed} failed")
"""


class TestSanitizer:
    @pytest.fixture
    def tool(self, tmp_path, monkeypatch):
        folder = tmp_path / "bin"
        folder.mkdir()
        path = folder / gpu_suite.SANITIZER
        path.write_text(FAKE_SANITIZER.format(python=sys.executable))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return str(path)

    def run(self, suite, monkeypatch, found, done=9, failed=0):
        """The part with a stand-in for the kernel calls."""
        monkeypatch.setenv("FOUND", found)
        original = suite._kernel_calls

        def quickly(name, backend, wrapper):
            step = original(name, backend, wrapper)
            code = FAKE_CALLS.format(done=done, failed=failed)
            step.command = [*wrapper, sys.executable, "-c", code]
            return step

        monkeypatch.setattr(suite, "_kernel_calls", quickly)
        part = suite.parts["sanitize"]
        part.budget_s = 60.0
        suite._sanitize(part)
        return part

    def test_every_tool_runs_over_every_backend_with_kernels(self, suite, monkeypatch, tool):
        part = self.run(suite, monkeypatch, "nothing")
        backends = ["extension", "triton"]
        kinds = ["no tool", *gpu_suite.TOOLS]
        wanted = {f"{name}, {kind}" for name in backends for kind in kinds}
        assert {step.name for step in part.steps} == wanted
        assert part.status == "passed"
        assert part.steps[-1].detail == "9 of 9 calls; compute-sanitizer: 0 errors"
        assert len({step.log for step in part.steps}) == len(part.steps)
        ports = [step.command[step.command.index("--port") + 1] for step in part.steps[2:]]
        assert len(set(ports)) == len(ports)

    def test_what_it_finds_fails(self, suite, monkeypatch, tool):
        part = self.run(suite, monkeypatch, "an error")
        assert part.status == "failed"
        assert "compute-sanitizer: 1 error" in part.steps[-1].detail

    def test_a_device_that_it_does_not_support_is_missing(self, suite, monkeypatch, tool):
        assert self.run(suite, monkeypatch, "no device").status == "missing"

    def test_calls_that_were_left_out_are_said(self, suite, monkeypatch, tool):
        part = self.run(suite, monkeypatch, "nothing", done=4)
        assert part.status == "cut" and part.steps[-1].detail.startswith("4 of 9 calls")

    def test_no_tool_is_missing_and_the_results_are_checked_anyway(self, suite, monkeypatch):
        monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
        part = self.run(suite, monkeypatch, "nothing")
        assert part.status == "missing"
        by_status = {step.name: step.status for step in part.steps}
        assert by_status["extension, no tool"] == "passed"
        assert by_status["extension, memcheck"] == "missing"


def test_ctrl_c_keeps_what_is_done_and_ends_what_runs(tmp_path):
    """In a process of its own, which gets the signal as from a terminal."""
    code = """
import signal, sys
from pathlib import Path
from rich.console import Console
from pyext.lab.gpu_suite import Suite
signal.signal(signal.SIGINT, signal.default_int_handler)
suite = Suite(Path(sys.argv[1]), ["build", "test", "bench"], 120.0, "cpu", False, Console())
suite._look_at_the_device = lambda: True
def part(code):
    def run(part):
        part.steps.append(suite._step(part.name, [sys.executable, "-u", "-c", code], 60.0))
        suite._run(part.steps)
    return run
suite._build = part("pass")
suite._test = part("print('started', flush=True); import time; time.sleep(100)")
sys.exit(suite.run())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=gpu_suite.ROOT)
    log = tmp_path / "logs" / "test.txt"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130, out
    assert "Interrupted: what was finished is kept." in out and "Traceback" not in out
    parts = summary(tmp_path)["parts"]
    assert [part["status"] for part in parts] == ["passed", "interrupted", "not run"]


class TestBuild:
    @needs_extension
    def test_a_usable_extension_is_taken_as_it_is(self, suite):
        part = suite.parts["build"]
        part.budget_s = 120.0
        suite._build(part)
        assert [step.name for step in part.steps] == ["prebuilt extension"]
        assert part.status == "passed"

    def test_only_this_gpus_architecture_is_built_unless_told(self, suite, monkeypatch):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        suite.device, suite.environment = "cuda", {"gpu": {"compute_capability": "9.0"}}
        wanted = {"PYEXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
        assert suite._build_variables() == wanted
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        assert suite._build_variables()["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"

    def test_without_a_compiler_it_is_missing(self, suite, monkeypatch):
        monkeypatch.setattr(gpu_suite, "_compiler_missing", lambda: "no nvcc in this test")
        suite.device, suite.rebuild = "cuda", True
        part = suite.parts["build"]
        suite._build(part)
        assert (part.status, part.detail, part.steps) == ("missing", "no nvcc in this test", [])


class TestKernelCalls:
    def test_every_op_backend_and_dtype_is_called(self):
        calls = list(kernel_calls.kernel_calls(["extension", "triton"]))
        found = {(call.op.name, call.backend, call.dtype) for call in calls}
        for op in registry.ops().values():
            for dtype in op.dtypes:
                for backend in ("extension", "triton"):
                    assert (op.name, backend, dtype) in found
        integers = {op for op, _, dtype in found if not dtype.is_floating_point}
        assert integers == {"relu"}

    def test_breadth_first(self):
        calls = kernel_calls.kernel_calls(["extension"], [torch.float32])
        ops = registry.ops()
        assert [next(calls).op.name for _ in ops] == list(ops)

    @needs_extension
    def test_strides_and_alignment_travel(self):
        device = torch.device("cpu")
        value = torch.randn(13, 9)[1::2, 2::3]
        copy = kernel_calls._on_device(value, device)
        assert torch.equal(copy, value) and copy.stride() == value.stride()
        assert copy.data_ptr() % 16 == value.data_ptr() % 16

    @needs_extension
    def test_right_results_pass_and_wrong_ones_do_not(self, capsys):
        calls = [c for c in kernel_calls.kernel_calls(["extension"]) if c.name in ("5x7", "4096")]
        assert calls
        assert kernel_calls._run(calls, torch.device("cpu"), 60.0) == 0
        at = next(i for i, call in enumerate(calls) if call.op.name == "relu")
        wrong = dataclasses.replace(
            calls[at].op, function=lambda *args, backend, **kwargs: calls[at].op.eager(*args) + 1
        )
        calls[at] = dataclasses.replace(calls[at], op=wrong)
        assert kernel_calls._run(calls, torch.device("cpu"), 60.0) == 1
        out = capsys.readouterr().out
        assert "FAILED" in out and out.endswith(f"{len(calls)} of {len(calls)} calls, 1 failed\n")

    def test_a_call_that_raises_is_a_failure(self):
        def broken(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access\nsecond line")

        call = next(kernel_calls.kernel_calls(["extension"]))
        call = dataclasses.replace(call, op=dataclasses.replace(call.op, function=broken))
        found = call.failure(torch.device("cpu"))
        assert found == "RuntimeError: CUDA error: an illegal memory access"

    @needs_extension
    def test_it_stops_in_time_and_says_so(self, capsys):
        calls = list(kernel_calls.kernel_calls(["extension"], [torch.float32]))
        assert kernel_calls._run(calls, torch.device("cpu"), 0.0) == 0
        assert capsys.readouterr().out == f"0 of {len(calls)} calls, 0 failed\n"

    @pytest.mark.slow
    @needs_extension
    def test_every_call_is_right_on_the_cpu(self):
        calls = list(kernel_calls.kernel_calls(["extension"]))
        assert kernel_calls._run(calls, torch.device("cpu"), float("inf")) == 0

    @pytest.mark.slow
    def test_the_first_calls_of_interpreted_triton_are_right(self):
        if reason := BACKENDS["triton"].unavailable("cpu"):
            pytest.skip(f"triton: {reason}")
        calls = [c for c in kernel_calls.kernel_calls(["triton"]) if c.name in ("5x7", "small")]
        assert kernel_calls._run(calls, torch.device("cpu"), float("inf")) == 0

    def test_no_backend_to_call_is_3(self, monkeypatch, capsys):
        monkeypatch.setattr(type(BACKENDS["extension"]), "unavailable", lambda *_: "gone")
        assert kernel_calls.main(["--device", "cpu", "--backend", "extension"]) == 3
        assert capsys.readouterr().out == "extension cannot be called on cpu: gone.\n"


@pytest.mark.slow
@needs_extension
def test_a_rehearsal_on_the_cpu(tmp_path):
    """Two parts for real, one after the other, in too little time for all of it."""
    command = [sys.executable, "-m", "pyext.lab", "gpu-suite", "--device", "cpu"]
    command += ["--only", "build,bench", "--minutes", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu_suite.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a rehearsal, no GPU was used" in done.stdout
    found = summary(tmp_path)
    assert [part["name"] for part in found["parts"]] == ["build", "bench"]
    assert found["parts"][1]["status"] in ("passed", "cut")
    assert (tmp_path / "results.json").exists()
    assert str(Path(pyext.__file__).parent) not in (tmp_path / "summary.json").read_text()
