"""The backend that runs the CUDA kernels on the CPU: what Python sees of a mistake, how the library
is built, and where it must not turn up.

What the emulator catches is shown kernel by kernel in ``tests/cpp/emulator_test.cpp``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyext
import pyext.functional as P
from pyext._build import emulator, toolchain
from pyext.backends import BACKENDS, _this_torch
from pyext.lab.bench import default_backends

ROOT = Path(pyext.__file__).parents[1]
NAME = "extension-emulated"

pytestmark = pytest.mark.skipif(
    BACKENDS[NAME].unavailable("cpu") is not None, reason=BACKENDS[NAME].unavailable("cpu") or ""
)

BROKEN = """
#include "common/tensor.h"

namespace broken {
using namespace pyext;

__global__ void barrier_kernel(const float*, float*) {
  if (threadIdx.x < 5) __syncthreads();
}
__global__ void overrun_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}
__global__ void race_kernel(const float* in, float* out) {
  if (threadIdx.x > 5) out[6] = in[threadIdx.x];
}
__global__ void double_kernel(const float* in, float* out) {
  out[threadIdx.x] = 2 * in[threadIdx.x];
}

template <auto* Kernel>
Tensor run(const Tensor& x) {
  const OnDeviceOf device(x);
  const Tensor out = torch::stable::empty_like(x);
  launch(Kernel, {dim3(1), dim3(static_cast<unsigned>(x.numel()))}, device.stream,
         const_data<float>(x), mutable_data<float>(out));
  return out;
}

STABLE_TORCH_LIBRARY(broken, m) {
  m.def("barrier(Tensor x) -> Tensor");
  m.def("overrun(Tensor x) -> Tensor");
  m.def("race(Tensor x) -> Tensor");
  m.def("double(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(broken, CPU, m) {
  m.impl("barrier", TORCH_BOX(&run<barrier_kernel>));
  m.impl("overrun", TORCH_BOX(&run<overrun_kernel>));
  m.impl("race", TORCH_BOX(&run<race_kernel>));
  m.impl("double", TORCH_BOX(&run<double_kernel>));
}
}  // namespace broken
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A source tree with the emulator, what kernels share, and one file of broken kernels."""
    root = tmp_path_factory.mktemp("a folder")  # with a space in its path
    for part in ("common", "emulator", "cuda/common"):
        shutil.copytree(ROOT / "csrc" / part, root / "csrc" / part)
    (root / "csrc" / "cuda" / "broken.cu").write_text(BROKEN)
    return root


def test_a_mistake_in_a_kernel_is_an_exception_after_which_everything_works(scratch):
    torch.ops.load_library(str(emulator.build(scratch, _this_torch())))
    x = torch.arange(8.0)
    for name, message in (
        ("barrier", r"thread \(0, 0, 0\): the barrier in line \d+, which thread \(5, 0, 0\)"),
        ("overrun", r"thread \(7, 0, 0\): a read of 4 bytes outside .* to byte 32 of the 32 bytes"),
        ("race", r"thread \(7, 0, 0\): two threads write, with no barrier between, byte 24"),
    ):
        what = rf"broken::{name}_kernel\(float const\*, float\*\), block \(0, 0, 0\), {message}"
        with pytest.raises(RuntimeError, match=what):
            getattr(torch.ops.broken, name)(x)
        assert torch.equal(torch.ops.broken.double(x), 2 * x)
    assert torch.equal(P.relu(x - 4, backend=NAME), torch.relu(x - 4))


def test_only_what_changed_is_compiled_again(scratch):
    library = emulator.build(scratch, _this_torch())
    objects = {path: path.stat().st_mtime_ns for path in library.parent.glob("*.o")}
    assert {path.name for path in objects} >= {"broken.cu.o", "device.cpp.o"}
    assert emulator.build(scratch, _this_torch()) == library
    source = scratch / "csrc" / "cuda" / "broken.cu"
    source.write_text(BROKEN + "// changed\n")
    emulator.build(scratch, _this_torch())
    changed = {path.name for path, time in objects.items() if path.stat().st_mtime_ns != time}
    assert changed == {"broken.cu.o"}


def test_a_source_that_does_not_compile_is_a_sentence_with_the_place(scratch):
    source = scratch / "csrc" / "cuda" / "broken.cu"
    source.write_text("int nonsense = ;\n")
    try:
        with pytest.raises(
            toolchain.BuildError, match=r"broken\.cu:1:\d+: error: .*\(all of it is"
        ):
            emulator.build(scratch, _this_torch())
    finally:
        source.write_text(BROKEN)


def test_processes_that_build_at_once_wait_for_each_other(scratch):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from pyext._build import emulator\nfrom pyext.backends import _this_torch\n"
        f"print(emulator.build(Path({str(scratch)!r}), _this_torch()))"
    )
    (scratch / "csrc" / "cuda" / "broken.cu").write_text(BROKEN + "// changed again\n")
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {process.communicate(timeout=300)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(outputs) == 1


def test_what_is_missing_is_said_in_a_sentence(tmp_path, monkeypatch):
    assert "from a clone of the repository" in emulator.why_not(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler, and 'no-such-compiler' is not there" in emulator.why_not(ROOT)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(shutil.which("c++")).parent)]))
    monkeypatch.setattr(emulator.sysconfig, "get_path", lambda name: str(tmp_path))
    if shutil.which("ninja") is None:
        assert "needs ninja" in emulator.why_not(ROOT)


def test_it_is_never_a_default_never_listed_and_never_timed():
    assert NAME not in pyext.backends("cpu") and NAME not in default_backends()
    assert BACKENDS[NAME].interpreted and BACKENDS[NAME].devices == ("cpu",)
    assert "no kernels for 'cuda'" in BACKENDS[NAME].unavailable("cuda")
