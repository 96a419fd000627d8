"""The compile report, and the kernels' machine code held to the limits that they state.

No GPU is needed: what a GPU would run is read from the machine code. What the kernels compute is
checked elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pyext import doctor, registry
from pyext._build.toolchain import BuildError
from pyext.backends import BACKENDS
from pyext.lab import isolated
from pyext.lab.__main__ import main
from pyext.lab.compile_report import calls, command, machine_code, predictions, triton_rows
from pyext.lab.compile_report.calls import Call
from pyext.lab.compile_report.cuda_rows import CudaLibrary, Unavailable, split_signature
from pyext.lab.compile_report.machine_code import MachineCode, access_bytes
from pyext.lab.compile_report.occupancy import MULTIPROCESSORS, occupancy
from pyext.lab.compile_report.predictions import Prediction
from pyext.lab.compile_report.row import Row, make_row

ROOT = Path(__file__).parents[1]
TRITON_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LIMITS = {"registers": 64, "spill_bytes": 0, "shared_bytes": 0, "load_bytes": 16, "store_bytes": 4}


@functools.cache
def cuda_library() -> CudaLibrary | str:
    try:
        return CudaLibrary()
    except Unavailable as reason:
        return str(reason)


def held() -> list[str]:
    library = cuda_library()
    return [] if isinstance(library, str) else library.architectures()


needs_library = pytest.mark.skipif(
    isinstance(cuda_library(), str), reason=f"no CUDA library to read: {cuda_library()}"
)
# One architecture in the plain tier: reading one takes seconds.
each_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=[pytest.mark.slow] if index else [])
        for index, each in enumerate(held())
    ]
    or [pytest.param("none", marks=pytest.mark.skip(reason="no CUDA library to read"))],
)
needs_triton = pytest.mark.skipif(
    triton_rows.unavailable() is not None, reason=triton_rows.unavailable() or ""
)

needs_emulator = pytest.mark.skipif(
    calls.why_no_cuda_calls() is not None, reason=str(calls.why_no_cuda_calls())
)


@functools.cache
def cuda_rows(architecture: str) -> list[Row]:
    return cuda_library().rows([architecture])


def find(rows: list[Row], kernel: str, instantiation: str) -> Row:
    """The one row of this kernel whose instantiation matches a pattern."""
    (row,) = (
        row
        for row in rows
        if row.kernel == kernel and re.fullmatch(instantiation, row.instantiation)
    )
    return row


def broken(rows: list[Row]) -> list[str]:
    return [f"{command.title(row)}: {row.violations}" for row in rows if row.violations]


# The CUDA library


@needs_library
def test_machine_code_for_every_architecture_that_was_asked_for():
    asked_for = re.findall(
        r"(\d+)\.(\d+a?)", doctor.introspection().build_info()["cuda_architectures"]
    )
    assert asked_for
    assert set(held()) == {f"sm_{major}{minor}" for major, minor in asked_for}


@each_architecture
def test_cuda_kernels_keep_their_limits(architecture):
    """Also that each kernel states some: none is missing in the table of PYEXT_REGISTER_KERNEL."""
    rows = cuda_rows(architecture)
    assert rows
    assert not broken(rows)


@each_architecture
def test_the_table_of_kernels_is_what_was_compiled(architecture):
    table = doctor.introspection().cuda_kernels(str(cuda_library().path))
    registered = Counter(split_signature(kernel["name"]) for kernel in table)
    compiled = Counter((row.kernel, row.instantiation) for row in cuda_rows(architecture))
    assert registered == compiled
    assert set(registered.values()) == {1}


@each_architecture
def test_no_cuda_kernel_has_static_shared_memory(architecture):
    """All of it comes from the one accessor, so that the emulator can tell blocks apart."""
    assert {row.static_shared_bytes for row in cuda_rows(architecture)} == {0}


@each_architecture
def test_partial_sums_keep_loads_in_flight(architecture):
    row = find(cuda_rows(architecture), "mse_loss_partial_kernel", "float, 4")
    assert row.instruction_counts["LDG.E.128"] >= 8  # four of each operand


@each_architecture
def test_a_large_product_reads_shared_memory_once_per_16_multiply_adds(architecture):
    tile = r"Tile<128, 128, [\d, ]+>"
    row = find(cuda_rows(architecture), "product_kernel", rf"float, {tile}, StoreBias<float, true>")
    counts = row.instruction_counts
    multiply_adds = counts["FFMA"] + 2 * counts.get("FFMA2", 0)
    assert multiply_adds >= 16 * counts["LDS.128"] > 0


@each_architecture
def test_dynamic_shared_memory_is_the_launch_s(architecture):
    """Two buffers of two padded operands: what product.cuh's launch asks for."""
    tile = r"Tile<128, 128, [\d, ]+>"
    row = find(cuda_rows(architecture), "product_kernel", rf"float, {tile}, StoreBias<float, true>")
    assert row.dynamic_shared_bytes == 2 * 2 * 16 * (128 + 4) * 4
    assert row.threads_per_block == 256


@needs_library
@pytest.mark.parametrize("op", registry.ops().values(), ids=list(registry.ops()))
def test_every_raw_op_has_a_cuda_kernel(op):
    BACKENDS["extension"].unavailable("cpu")  # loads the libraries
    for raw_op in op.raw_ops:
        name = f"pyext::{raw_op.name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


# Triton


@pytest.fixture(scope="session")
def empty_cache(tmp_path_factory) -> Path:
    """A Triton cache of this run alone, so that everything is compiled."""
    return tmp_path_factory.mktemp("triton-cache")


def rows_of(*request) -> list[Row]:
    return [each for each in triton_rows.rows_and_calls(*request) if isinstance(each, Row)]


def check_triton(rows: list[Row]) -> None:
    assert not broken(rows)
    names = Counter((row.kernel, row.instantiation, row.arch) for row in rows)
    assert set(names.values()) == {1}
    # The interpreter's process knows the same kernels: all of them were launched.
    for op in registry.ops():
        importlib.import_module(f"pyext.kernels.{op}")
    from pyext.kernels._limits import LIMITS

    assert set(LIMITS) == {row.kernel for row in rows}
    for row in rows:
        # float32 is multiplied exactly: no tensor core takes it but as TF32. (The instantiation
        # begins with the operands' type; the partial sums of 16-bit operands are float32, too.)
        if row.instantiation.startswith("fp32"):
            assert not {"HMMA", "WGMMA"} & set(row.matrix_instructions), row
        for name in row.instruction_counts:
            if name.startswith("LDGSTS"):  # the operands of a pipelined product: none is narrower
                assert access_bytes(name) >= row.limits["load_bytes"], row


@needs_triton
def test_triton_kernels_keep_their_limits_at_the_smallest_shapes(empty_cache):
    """The fast subset: float32 on sm_90."""
    check_triton(rows_of("sm_90", ("float32",), "smallest", empty_cache))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", registry.DTYPE_NAMES)
@pytest.mark.parametrize("architecture", TRITON_ARCHITECTURES)
def test_triton_kernels_keep_their_limits(architecture, dtype, empty_cache):
    check_triton(rows_of(architecture, (dtype,), "benchmarks", empty_cache))


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", registry.DTYPE_NAMES)
def test_triton_kernels_keep_their_limits_for_every_sample(dtype, empty_cache):
    """Strided, unaligned, odd and empty operands, and every combination of epilogues."""
    check_triton(rows_of("sm_90", (dtype,), "samples", empty_cache))


@pytest.mark.parametrize("answers", [[], [{"done": True}]])
def test_a_compiling_process_that_dies_says_how_unless_it_was_done(monkeypatch, answers):
    def stream(*args, **kwargs):
        yield from answers
        raise isolated.ProcessDied("was ended by SIGKILL")

    monkeypatch.setattr(isolated, "stream", stream)
    rows = triton_rows.rows_and_calls("sm_90", ("float32",), "smallest")
    if answers:
        assert list(rows) == []
    else:
        with pytest.raises(RuntimeError, match="sm_90: the compiling process was ended by SIGKILL"):
            list(rows)


# What a row says


def code(registers=32, local_bytes=0, shared_bytes=0, **instructions) -> MachineCode:
    named = {name.replace("_", "."): count for name, count in instructions.items()}
    return MachineCode(registers, local_bytes, shared_bytes, Counter(named))


def row_of(machine: MachineCode, limits=LIMITS, threads=256, dynamic_shared_bytes=0) -> Row:
    return make_row(
        "some_kernel",
        "cuda",
        "float",
        "sm_90",
        machine,
        threads=threads,
        dynamic_shared_bytes=dynamic_shared_bytes,
        limits=limits,
    )


def test_a_kernel_that_keeps_its_limits():
    assert row_of(code(LDG_E_128=4, STG_E=1)).violations == []


@pytest.mark.parametrize(
    ("machine", "dynamic", "expected"),
    [
        (code(registers=65, LDG_E_128=1, STG_E=1), 0, "65 registers"),
        (code(local_bytes=8, LDG_E_128=1, STG_E=1), 0, "8 bytes of local memory"),
        (code(shared_bytes=4, LDG_E_128=1, STG_E=1), 0, "4 bytes of shared memory"),
        (code(LDG_E_128=1, STG_E=1), 16, "16 bytes of shared memory"),
        (code(LDG_E_64=1, STG_E=1), 0, "8 bytes in the widest global load"),
        (code(LDG_E_128=1, STG_E_U16=1), 0, "2 bytes in the widest global store"),
        (code(LDG_E_128=1), 0, "0 bytes in the widest global store"),
    ],
)
def test_what_breaks_a_limit(machine, dynamic, expected):
    (violation,) = row_of(machine, dynamic_shared_bytes=dynamic).violations
    assert violation.startswith(expected)


def test_a_kernel_without_limits_breaks_them():
    assert row_of(code(LDG_E_128=1, STG_E=1), limits=None).violations == ["states no limits"]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("LDG.E", 4),
        ("LDG.E.U8.CONSTANT", 1),
        ("LDG.E.S16", 2),
        ("LDG.E.64", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_the_width_of_an_access(instruction, expected):
    assert access_bytes(instruction) == expected


def test_matrix_instructions():
    names = ("FFMA", "FFMA2", "HGMMA.64x128x16.F32", "DMMA.8x8x4", "UTCHMMA", "HMMA.16816.F32")
    others = ("HFMA2.MMA", "IMAD", "FADD", "UTCBAR", "LDG.E")
    machine = MachineCode(instructions=Counter(dict.fromkeys((*names, *others), 1)))
    assert list(machine.matrix_instructions) == [
        "DMMA", "FFMA", "FFMA2", "HMMA", "UTCHMMA", "WGMMA",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("void pyext::f<float, 4>(float const*, long)", ("f", "float, 4")),
        ("pyext::f(pyext::Matrix<float>)", ("f", "")),
        (
            "void pyext::g<double, pyext::Tile<8, 4>, pyext::S<double, true> >(std::a<(b)1>::t)",
            ("g", "double, Tile<8, 4>, S<double, true>"),
        ),
    ],
)
def test_a_signature_in_two(signature, expected):
    assert split_signature(signature) == expected


# Occupancy


@pytest.mark.parametrize(
    ("arguments", "blocks", "limited_by"),
    [
        ((80, 256, 32, 0), 8, "warps"),
        ((80, 256, 33, 0), 6, "registers"),  # 40 registers are allocated
        ((80, 32, 16, 0), 32, "blocks"),
        ((80, 128, 32, 48 << 10), 3, "shared memory"),  # 49 KiB with the system's
        ((90, 128, 32, 48 << 10), 4, "shared memory"),
        ((100, 128, 32, 0, 256), 2, "tensor memory"),
    ],
)
def test_occupancy_by_hand(arguments, blocks, limited_by):
    found = occupancy(*arguments)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.occupancy == blocks * arguments[1] / 2048


def test_an_unknown_architecture_has_no_occupancy():
    assert occupancy(75, 128, 32, 0) is None


OCCUPANCY_PROGRAM = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int capability, warps, blocks, threads, registers, shared;
  size_t shared_per_sm;
  while (std::scanf("%d %d %zu %d %d %d", &capability, &warps, &shared_per_sm, &threads, &registers,
                    &shared) == 6) {
    cudaOccDeviceProp device{};
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = shared_per_sm;
    device.sharedMemPerBlockOptin = shared_per_sm - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared_per_sm;
    cudaOccDeviceState state{};
    cudaOccResult result{};
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel,
                                                                       &state, threads, shared);
    if (error && error != CUDA_OCC_ERROR_UNKNOWN_DEVICE) return 1;
    std::printf("%d\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


def occupancy_header() -> Path | None:
    """The folder of NVIDIA's occupancy calculator, which Triton and the CUDA toolkit bring."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "include" if spec else None
    return folder if folder and (folder / "cuda_occupancy.h").exists() else None


@pytest.mark.skipif(occupancy_header() is None, reason="no cuda_occupancy.h; Triton brings one")
def test_occupancy_agrees_with_the_toolkit_s_calculator(tmp_path):
    cases = [
        (capability, threads, registers, shared)
        for capability in MULTIPROCESSORS
        for threads in (32, 64, 96, 128, 256, 384, 512, 1024)
        for registers in (8, 16, 32, 40, 41, 64, 72, 96, 128, 168, 255)
        for shared in (0, 16, 1000, 20 << 10, 33792, 48 << 10, 98304)
    ]
    source = tmp_path / "occupancy.cpp"
    source.write_text(OCCUPANCY_PROGRAM)
    program = tmp_path / "occupancy"
    include = f"-I{occupancy_header()}"
    subprocess.run(["c++", "-std=c++17", include, source, "-o", program], check=True)
    lines = []
    for capability, threads, registers, shared in cases:
        sm = MULTIPROCESSORS[capability]
        lines.append(f"{capability} {sm.warps} {sm.shared_bytes} {threads} {registers} {shared}")
    result = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    theirs = [int(line) for line in result.stdout.split()]
    ours = [occupancy(*case).blocks for case in cases]
    assert len(theirs) == len(cases)
    unknown = {case[0] for case, its in zip(cases, theirs, strict=True) if its == -1}
    assert unknown <= {103, 121}  # newer than the calculator that Triton 3.6 brings
    different = [
        (case, mine, its)
        for case, mine, its in zip(cases, ours, theirs, strict=True)
        if mine != its and case[0] not in unknown
    ]
    assert not different


# The command


@pytest.fixture
def two_rows(monkeypatch):
    """A report of one CUDA and one Triton row, both within their limits."""
    rows = [row_of(code(LDG_E_128=4, STG_E=1))]
    rows.append(dataclasses.replace(rows[0], language="triton", kernel="_some_kernel"))

    class Library:
        architectures = staticmethod(lambda: ["sm_90"])
        rows = staticmethod(lambda architectures: rows[:1])

    monkeypatch.setattr(command, "CudaLibrary", Library)
    monkeypatch.setattr(triton_rows, "unavailable", lambda: None)
    monkeypatch.setattr(
        triton_rows, "rows_and_calls", lambda architecture: iter([*rows[1:], relu_call("triton")])
    )
    monkeypatch.setattr(calls, "why_no_cuda_calls", lambda: None)
    monkeypatch.setattr(calls, "cuda_calls", lambda *args: iter([relu_call("cuda")]))
    return rows


def relu_call(language: str, dtype: str = "float32") -> Call:
    kernels = {"some_kernel": 1, "another_kernel": 1}
    return Call("relu", "both", [2**24], dtype, language, kernels)


def without_library(monkeypatch):
    def none():
        raise Unavailable("this PyTorch was built without CUDA")

    monkeypatch.setattr(command, "CudaLibrary", none)


def test_the_command_writes_every_row(two_rows, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["compile-report", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["complete"] is True
    assert written["rows"] == [row.to_json() for row in two_rows]
    assert [each["language"] for each in written["predictions"]] == ["cuda", "triton"]
    assert written["assumed"]["name"] == written["predictions"][0]["gpu"] == "H200"
    printed = capsys.readouterr().out
    assert "2 rows: all keep" in printed
    assert "Predicted, not measured: H200" in printed


def test_no_predictions_for_other_architectures(two_rows, monkeypatch, capsys):
    monkeypatch.setattr(command.CudaLibrary, "architectures", staticmethod(lambda: ["sm_80"]))
    assert main(["compile-report"]) == 0
    assert "Predicted" not in capsys.readouterr().out


@pytest.mark.parametrize("when", ["asked", "compiling"])
def test_no_predictions_for_cuda_without_the_emulator(
    two_rows, monkeypatch, tmp_path, capsys, when
):
    def fail(*args):
        raise BuildError("it needs a C++ compiler.")

    if when == "asked":
        monkeypatch.setattr(calls, "why_no_cuda_calls", lambda: "it needs a C++ compiler")
    monkeypatch.setattr(calls, "cuda_calls", fail)
    path = tmp_path / "report.json"
    assert main(["compile-report", "--json", str(path)]) == 0
    assert "No predictions for CUDA: it needs a C++ compiler." in capsys.readouterr().out
    assert [each["language"] for each in json.loads(path.read_text())["predictions"]] == ["triton"]


def test_a_broken_limit_is_exit_code_1(two_rows, capsys):
    two_rows[0].violations.append("65 registers, at most 64")
    assert main(["compile-report"]) == 1
    assert "65 registers, at most 64" in capsys.readouterr().out


def test_an_architecture_that_the_library_lacks(two_rows, capsys):
    assert main(["compile-report", "--arch", "90,8.6"]) == 3
    printed = capsys.readouterr().out
    assert "not for sm_86" in printed
    assert 'TORCH_CUDA_ARCH_LIST="8.6 9.0"' in printed


def test_triton_rows_alone(two_rows, monkeypatch, capsys):
    without_library(monkeypatch)
    assert main(["compile-report", "--arch", "90"]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA rows: this PyTorch was built without CUDA." in printed
    assert "1 rows: all keep" in printed


def test_cuda_rows_alone(two_rows, monkeypatch, capsys):
    monkeypatch.setattr(triton_rows, "unavailable", lambda: "Triton is not installed")
    assert main(["compile-report"]) == 0
    assert "No Triton rows: Triton is not installed." in capsys.readouterr().out


def test_nothing_to_read_is_exit_code_3(two_rows, monkeypatch, capsys):
    without_library(monkeypatch)
    monkeypatch.setattr(triton_rows, "unavailable", lambda: "Triton is not installed")
    assert main(["compile-report"]) == 3
    assert "Triton is not installed" in capsys.readouterr().out


def test_an_interrupted_report_keeps_its_rows(two_rows, monkeypatch, tmp_path, capsys):
    def interrupted(architecture):
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_rows, "rows_and_calls", interrupted)
    path = tmp_path / "report.json"
    assert main(["compile-report", "--json", str(path)]) == 130
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 1 and written["complete"] is False
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["x", "9", "sm_", "80;90"])
def test_a_wrong_architecture_is_wrong_usage(text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["compile-report", "--arch", text])
    assert exit.value.code == 2
    assert "no architecture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name"), [("80", "sm_80"), ("9.0a", "sm_90a"), ("sm_100", "sm_100")]
)
def test_how_an_architecture_may_be_written(text, name):
    assert command.architecture(text) == name


def test_the_document_explains_every_field():
    document = (ROOT / "docs" / "compile-report.md").read_text()
    of_rows, of_predictions = document.split("One prediction per op")
    for kind, text in ((Row, of_rows), (Prediction, of_predictions)):
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in text, field.name


def test_the_table_shows_every_row(two_rows):
    console = Console(width=200, record=True)
    command.show(two_rows, console)
    text = console.export_text()
    assert "some_kernel" in text and "_some_kernel" in text and "100%" in text


# What a call should take


def test_a_prediction_by_hand():
    """float32 squared error of 2^24 elements: 3 x 64 MiB at 4.3 TB/s and two launches of 2 µs."""
    call = dataclasses.replace(relu_call("cuda"), op="mse_loss")
    found = predictions.predict(call, [])
    assert found.bytes == 3 * 2**26
    assert (found.launches, found.bound, found.unit) == (2, "memory", "FMA")
    assert found.predicted_us == pytest.approx(3 * 2**26 / 4.3e6 + 4, abs=0.01)


@pytest.mark.parametrize(
    ("changed", "unit"),
    [
        ({}, "tensor cores"),
        ({"arch": "sm_80"}, "FMA"),
        ({"language": "cuda"}, "FMA"),
        ({"kernel": "a_third_kernel"}, "FMA"),
        ({"instantiation": "fp32, 4 warps"}, "FMA"),
        ({"matrix_instructions": ["FFMA"]}, "FMA"),
    ],
)
def test_tensor_cores_are_assumed_where_the_machine_code_uses_them(changed, unit):
    row = dataclasses.replace(
        row_of(code(LDG_E_128=4, STG_E=1)),
        language="triton",
        instantiation="bf16, 4 warps",
        matrix_instructions=["WGMMA"],
    )
    row = dataclasses.replace(row, **changed)
    call = relu_call("triton", "bfloat16")
    shape = [8192, 4096, 4096, 1024]
    call = dataclasses.replace(call, op="two_layer", shape=shape)
    found = predictions.predict(call, [row])
    assert found.unit == unit
    flops = 2 * (2 * 8192 * 4096 * 4096 + 3 * 8192 * 4096 * 1024)
    assert found.flops == flops
    rate = 790e6 if unit == "tensor cores" else 57e6
    assert found.predicted_us == pytest.approx(flops / rate + 4, rel=1e-4)


@needs_emulator
def test_a_dry_run_names_the_kernels():
    found = {(call.op, *call.shape): call.kernels for call in calls.cuda_calls(("float32",), 132)}
    assert {op for op, *_ in found} == set(registry.ops())
    assert found["relu", 2**12] == {"relu_forward_kernel": 1, "relu_backward_kernel": 1}
    # One cooperative launch, on a GPU with room for its grid.
    headline = 64, 1000, 100, 10
    assert found["two_layer_sgd_step", *headline] == {"sgd_steps_kernel": 1}
    op = registry.get("two_layer_sgd_step")
    args = op.benchmark_inputs(headline, torch.float32, "cpu", torch.Generator().manual_seed(0))
    with calls.dry_run(multiprocessors=4) as launches:
        op.function(*args, backend="extension-emulated")
    assert launches == ["sgd_multiply_kernel", "sgd_add_kernel", "sgd_update_kernel"]


@needs_emulator
def test_a_dry_run_runs_nothing_and_ends():
    op = registry.get("two_layer_sgd_step")
    args = op.benchmark_inputs((8, 8, 8, 8), torch.float32, "cpu", torch.Generator().manual_seed(0))
    args = (*args[:4], 0.1)
    before = args[2].clone()
    with calls.dry_run(132) as launches:
        op.function(*args, backend="extension-emulated")
    assert launches == ["sgd_steps_kernel"]
    assert torch.equal(args[2], before)
    op.function(*args, backend="extension-emulated")
    assert not torch.equal(args[2], before)


@needs_triton
def test_triton_calls_are_those_of_the_ops(empty_cache):
    found = triton_rows.rows_and_calls("sm_90", ("float32",), "smallest", empty_cache)
    kernels = {each.op: each.kernels for each in found if isinstance(each, Call)}
    assert set(kernels) == set(registry.ops())
    assert sum(kernels["relu"].values()) == 2


def test_cuobjdump_that_fails_is_an_error(tmp_path):
    fake = tmp_path / "cuobjdump"
    fake.write_text("#!/bin/sh\necho 'cuobjdump fatal: no such file'\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(RuntimeError, match="no such file"):
        machine_code.read(str(fake), tmp_path / "x.so", "sm_90")


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("architecture", held())
def test_launches_overlap_from_the_architecture_on_that_can(architecture):
    """The wait for the kernel ahead is in the machine code, or nothing would overlap."""
    library = cuda_library()
    code = machine_code.read(library._cuobjdump, library.path, architecture)
    can = machine_code.capability(architecture) >= 90
    for kernel in ("sgd_add_kernel", "sgd_update_kernel"):
        waits = [each.instructions["ACQBULK"] for name, each in code.items() if kernel in name]
        assert len(waits) == 4 and all((count > 0) == can for count in waits)
