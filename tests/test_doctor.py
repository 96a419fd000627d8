"""The doctor's verdicts and exit codes, with everything in place and with parts missing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyext
from pyext import doctor, registry
from pyext.backends import BACKENDS

PACKAGE = Path(pyext.__file__).parent

# Runs the doctor in a process in which the modules named by the first argument cannot be found.
WITHOUT_MODULES = """
import runpy, sys
hidden = sys.argv.pop(1).split(",")
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hiding, sys.meta_path)
runpy.run_module("pyext.doctor", run_name="__main__", alter_sys=True)
"""


def run(*command, cwd=None, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | {"COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
    )


def test_a_working_installation():
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(f"the extension is not available here: {reason}")
    finished = run("-m", "pyext.doctor")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in ("Python", "PyTorch", "CUDA", "nvcc", "Triton", "GPU", "built against PyTorch"):
        assert name in finished.stdout
    for op in registry.ops():
        assert finished.stdout.count(f"│ {op} ") == len(doctor.DEVICES)
    assert finished.stdout.endswith("eager and extension work on the CPU.\n")


def test_nothing_built(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pyext", ignore=shutil.ignore_patterns("*.so"))
    found = run("-c", "import pyext; print(pyext.__file__)", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert found.stdout.strip() == str(tmp_path / "pyext" / "__init__.py")
    finished = run("-m", "pyext.doctor", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 3
    assert "not built; rebuild with `pip install -e .`" in finished.stdout
    assert "Traceback" not in finished.stdout + finished.stderr


@pytest.mark.parametrize("hidden", ["triton", "rich"])
def test_a_missing_dependency(hidden):
    finished = run("-c", WITHOUT_MODULES, hidden)
    assert finished.returncode in (0, 3), finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
    assert "two_layer" in finished.stdout
    if hidden == "triton":
        assert "Triton is not installed; `pip install triton`" in finished.stdout


def test_wrong_usage():
    finished = run("-m", "pyext.doctor", "--no-such-option")
    assert finished.returncode == 2


def test_an_unavailable_extension_is_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(
        type(BACKENDS["extension"]), "unavailable", lambda *_: "gone; fetch it back"
    )
    assert doctor.main([]) == 3
    assert "gone; fetch it back" in capsys.readouterr().out


def test_a_wrong_result_is_seen():
    op = dataclasses.replace(registry.get("relu"), function=lambda x, backend: torch.zeros_like(x))
    assert "WRONG" in doctor.examine(op, BACKENDS["eager"], "cpu")


def test_a_failing_call_is_seen():
    def fail(x, backend):
        raise RuntimeError("no luck today\nsecond line")

    op = dataclasses.replace(registry.get("relu"), function=fail)
    verdict = doctor.examine(op, BACKENDS["eager"], "cpu")
    assert verdict.startswith("a tiny call fails: RuntimeError: no luck today; ")


def test_a_gpu_that_was_not_built_for_is_seen():
    def fail(x, backend):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    op = dataclasses.replace(registry.get("relu"), function=fail)
    assert "TORCH_CUDA_ARCH_LIST" in doctor.examine(op, BACKENDS["eager"], "cpu")


def test_a_line_that_cannot_be_found_out_names_its_error():
    def describe():
        raise OSError("unreadable")

    assert doctor.guarded(describe) == "OSError: unreadable"


def test_the_introspection_names_what_was_built():
    module = doctor.introspection()
    if module is None:
        pytest.skip("pyext._introspect is not built; `pip install -e .` builds it")
    built = module.build_info()
    assert built["torch_abi_target"] == "2.11"
    assert (built["cuda"] is None) != (built["cuda_left_out"] is None)


def test_the_cuda_library_lists_its_kernels():
    libraries = sorted(PACKAGE.glob("_C_cuda*.so"))
    module = doctor.introspection()
    if module is None or not libraries or torch.version.cuda is None:
        pytest.skip("needs a built CUDA library and a CUDA build of PyTorch")
    kernels = module.cuda_kernels(str(libraries[0]))
    assert kernels
    for kernel in kernels:
        assert kernel["name"]
        # Without a GPU the attributes are an error text, not a crash.
        assert ("error" in kernel) != ("registers_per_thread" in kernel)


def test_a_library_that_does_not_load_is_an_error(tmp_path):
    module = doctor.introspection()
    if module is None:
        pytest.skip("pyext._introspect is not built; `pip install -e .` builds it")
    with pytest.raises(RuntimeError, match="nothing.so"):
        module.cuda_kernels(str(tmp_path / "nothing.so"))
