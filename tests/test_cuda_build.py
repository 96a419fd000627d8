"""The CUDA library as a file: its architectures, its kernels, their registers and accesses.

No GPU is needed: what a GPU would run is read from the machine code. What the kernels compute is
checked by ``tests/cpp/emulated_kernels_test.cpp`` and, on a GPU, by ``test_ops.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pyext
from pyext import registry
from pyext.backends import BACKENDS

LIBRARIES = sorted(Path(pyext.__file__).parent.glob("_C_cuda*.so"))


def find_cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return str(bundled)
    return None


def why_not() -> str | None:
    """Why these tests cannot run here, in a sentence."""
    if not LIBRARIES:
        return "the CUDA kernels were not built; `python -m pyext.doctor` says why"
    if find_cuobjdump() is None:
        return "no cuobjdump; install Triton or a CUDA toolkit"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def cuobjdump(*arguments: str) -> str:
    command = [find_cuobjdump(), *arguments, str(LIBRARIES[0])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build_info() -> dict:
    from pyext import _introspect

    return _introspect.build_info()


@functools.cache
def resource_usage() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> mangled kernel name -> {"REG": registers, "STACK": bytes, ...}."""
    usage: dict[str, dict[str, dict[str, int]]] = {}
    architecture = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line and name.startswith("_ZN5pyext"):
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            usage.setdefault(architecture, {})[name] = numbers
    return usage


def machine_code(architecture: str, kernel: str) -> str:
    return cuobjdump("-sass", "-arch", architecture, "-fun", kernel)


def test_machine_code_for_every_architecture_that_was_asked_for():
    asked_for = re.findall(r"(\d+)\.(\d+a?)", build_info()["cuda_architectures"])
    assert asked_for
    assert set(resource_usage()) == {f"sm_{major}{minor}" for major, minor in asked_for}


def test_every_architecture_has_every_kernel():
    kernels = [set(by_name) for by_name in resource_usage().values()]
    assert all(each == kernels[0] for each in kernels)


def test_the_table_of_kernels_is_complete():
    """Each kernel that was compiled is registered with PYEXT_REGISTER_KERNEL, once."""
    from pyext import _introspect

    names = [kernel["name"] for kernel in _introspect.cuda_kernels(str(LIBRARIES[0]))]
    assert len(names) == len(set(names))
    compiled = next(iter(resource_usage().values()))
    assert len(names) == len(compiled)


def test_no_kernel_spills_registers():
    spilling = [
        f"{name} on {architecture}: {usage}"
        for architecture, by_name in resource_usage().items()
        for name, usage in by_name.items()
        if usage["STACK"] or usage["LOCAL"]
    ]
    assert not spilling


def test_no_kernel_has_static_shared_memory():
    """All of it comes from the one accessor, so that the emulator can tell blocks apart."""
    # From compute capability 9.0 on, the first 1024 bytes of every kernel belong to the system.
    reserved = {0, 1024}
    assert all(
        usage["SHARED"] in reserved
        for by_name in resource_usage().values()
        for usage in by_name.values()
    )


@pytest.mark.parametrize(
    "kernel",
    [
        r"relu_forward_kernelIfLi4E",
        r"relu_forward_kernelI13__nv_bfloat16Li8E",
        r"relu_backward_kernelI6__halfLi8E",
        r"mse_loss_backward_kernelIdLi2E",
        r"product_kernelIfNS_4TileILi128ELi128E\w*StoreBiasIfLb1E",
        r"product_kernelIfNS_4TileILi32ELi32E\w*UpdateWeightIfE",
    ],
)
def test_global_memory_moves_16_bytes_at_a_time(kernel):
    for architecture, by_name in resource_usage().items():
        (name,) = (each for each in by_name if re.search(kernel, each))
        code = machine_code(architecture, name)
        assert "LDG.E.128" in code
        assert "STG.E.128" in code


def test_partial_sums_are_read_16_bytes_at_a_time():
    for architecture, by_name in resource_usage().items():
        (name,) = (each for each in by_name if "mse_loss_partial_kernelIfLi4E" in each)
        assert machine_code(architecture, name).count("LDG.E.128") >= 8  # four in flight, twice


def test_a_large_product_reads_shared_memory_once_per_16_multiply_adds():
    for architecture, by_name in resource_usage().items():
        pattern = r"product_kernelIfNS_4TileILi128ELi128E\w*StoreBiasIfLb1E"
        (name,) = (each for each in by_name if re.search(pattern, each))
        code = machine_code(architecture, name)
        assert len(re.findall(r"\bFFMA\b", code)) >= 16 * code.count("LDS.128") > 0


@pytest.mark.parametrize("op", registry.ops().values(), ids=str)
def test_every_raw_op_has_a_cuda_kernel(op):
    major = torch.version.cuda and torch.version.cuda.partition(".")[0]
    if LIBRARIES[0].stem != f"_C_cuda{major}":
        pytest.skip(f"this PyTorch does not load {LIBRARIES[0].name}")
    BACKENDS["extension"].unavailable("cpu")  # loads the libraries
    for raw_op in op.raw_ops:
        name = f"pyext::{raw_op.name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
