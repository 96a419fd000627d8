"""The compile report's rows of the Triton kernels, compiled ahead of time with no GPU.

In a process of its own, which does not interpret Triton, every op is called on CPU tensors under a
stand-in driver: it compiles each launch for the given architecture and launches nothing. What was
compiled lies in Triton's own cache, so that a second report is quick.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyext import registry
from pyext.lab import isolated
from pyext.lab.compile_report import machine_code
from pyext.lab.compile_report.calls import Call, gpu_shapes, run
from pyext.lab.compile_report.row import Row, make_row


def unavailable() -> str | None:
    """Why there are no Triton rows here, in a sentence."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (wheels exist for Linux)"
    return None


def rows_and_calls(
    architecture: str,
    dtypes: tuple[str, ...] = registry.DTYPE_NAMES,
    inputs: str = "benchmarks",
    cache: Path | None = None,
) -> Iterator[Row | Call]:
    """One row per kernel that the ops launch, compiled for one architecture, and each call at a
    benchmark shape with what it launched.

    Args:
        architecture: such as ``sm_90``.
        dtypes: of the ops' tensors.
        inputs: ``benchmarks`` (the shapes that speed is measured at, as far as they fit this
            machine's memory), ``smallest`` (the smallest of these only) or ``samples`` (everything
            an op must accept: strided, unaligned, odd, empty). A kernel that the first two do not
            launch is compiled for the samples that do.
        cache: Triton's cache folder; by default the user's.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    request = {"architecture": architecture, "dtypes": dtypes, "inputs": inputs}
    variables = {"TRITON_INTERPRET": "0"}
    if cache is not None:
        variables["TRITON_CACHE_DIR"] = str(cache)
    done = False
    death: object = "ended early"
    try:
        command = (sys.executable, "-m", __name__)
        for answer in isolated.stream(request, variables, command=command):
            if "error" in answer:
                raise RuntimeError(f"Triton, {architecture}: {answer['error']}")
            done = answer == {"done": True}
            if not done:
                yield Row(**answer["row"]) if "row" in answer else Call(**answer["call"])
    except isolated.ProcessDied as error:
        death = error
    if not done:
        raise RuntimeError(f"Triton, {architecture}: the compiling process {death}")


def _calls(
    op: registry.Op, dtype: torch.dtype, inputs: str
) -> Iterator[tuple[tuple[int, ...] | str, tuple, dict]]:
    """(shape or sample's name, arguments, keyword arguments) of every call to compile for."""
    if inputs == "samples":
        for sample in op.sample_inputs("cpu", dtype, requires_grad=not op.is_step):
            yield f"sample {sample.name}", sample.args, dict(sample.kwargs)
        return
    shapes = gpu_shapes(op)
    if inputs == "smallest":
        del shapes[1:]
    if op.cost(op.directions[-1], shapes[0], 1).unit == "elementwise":
        # An odd size: only the last tile may pay for it, with a mask that splits its accesses.
        shapes.append(tuple(size + 1 for size in shapes[0]))
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        yield shape, op.benchmark_inputs(shape, dtype, "cpu", generator), {}


class _Compiler:
    """Calls ops on the Triton backend with every launch replaced by its compilation."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        from pyext.backends import TritonBackend

        self.architecture = architecture
        self.launched: list[tuple[str, Any]] = []
        self.wanted: set[str] | None = None  # the kernels to compile; None: all
        target = GPUTarget("cuda", machine_code.capability(architecture), 32)

        class CompileOnlyDriver:
            def get_current_target(self):
                return target

            def get_current_device(self):
                return 0

            def get_current_stream(self, device):
                return 0

        driver.set_active(CompileOnlyDriver())
        compile_launch = JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **options):
            if self.wanted is None or kernel.__name__ in self.wanted:
                compiled = compile_launch(kernel, *args, grid=grid, warmup=True, **options)
                self.launched.append((kernel.__name__, compiled))

        JITFunction.run = compile_only
        TritonBackend.unavailable = lambda self, device, op=None: None

    def rows_and_calls(self, dtype: torch.dtype, inputs: str) -> Iterator[Row | Call]:
        """A row per distinct binary, as soon as it was compiled, and the calls at benchmark
        shapes."""
        found = set()
        self.wanted = None
        for each in self._rows_and_calls(dtype, inputs):
            if isinstance(each, Row):
                found.add(each.kernel)
            yield each
        # Not every kernel has a benchmark: a loss without reduction, say.
        self.wanted = self._stated() - found
        if self.wanted:
            for each in self._rows_and_calls(dtype, "samples"):
                found.add(each.kernel)
                yield each
        # Nor is every one in a first derivative.
        self.wanted = self._stated() - found
        if self.wanted:
            yield from self._raw_rows(dtype)

    def _rows_and_calls(self, dtype: torch.dtype, inputs: str) -> Iterator[Row | Call]:
        seen = set()
        for op in registry.ops().values():
            shapes = gpu_shapes(op)
            for shape, args, kwargs in _calls(op, dtype, inputs):
                run(op, args, kwargs, "triton")
                if shape in shapes:
                    yield Call.of(op, shape, dtype, "triton", [name for name, _ in self.launched])
                yield from self._new_rows(seen, f"{op.name} {shape}")

    def _raw_rows(self, dtype: torch.dtype) -> Iterator[Row]:
        from pyext.backends import BACKENDS

        seen = set()
        for op in registry.ops().values():
            for raw_op in op.raw_ops:
                for args in raw_op.samples(torch.device("cpu"), dtype):
                    getattr(BACKENDS["triton"].raw, raw_op.name)(*args)
                    yield from self._new_rows(seen, f"{raw_op.name} sample")

    def _new_rows(self, seen: set[str], example: str) -> Iterator[Row]:
        """Rows of what was launched since the last time and not seen before."""
        for name, compiled in self.launched:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                yield self._row(name, compiled, example)
        self.launched.clear()

    @staticmethod
    def _stated() -> set[str]:
        """Every kernel that states limits."""
        from pyext.kernels._limits import LIMITS

        return set(LIMITS)

    def _row(self, name: str, compiled: Any, example: str) -> Row:
        from pyext.kernels._limits import LIMITS

        code = _code_of(compiled.asm["cubin"], self.architecture)
        specialised = Specialised(compiled.src, compiled.metadata)
        if specialised.float_arguments:
            raise TypeError(f"{name}: not exact for float64: {specialised.float_arguments}")
        limits = LIMITS.get(name)
        return make_row(
            name,
            "triton",
            str(specialised),
            self.architecture,
            code,
            threads=specialised.threads,
            dynamic_shared_bytes=compiled.metadata.shared,
            tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
            limits=limits and limits(specialised)._asdict(),
            example=example,
        )


def _code_of(cubin: bytes, architecture: str) -> machine_code.MachineCode:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = triton.knobs.nvidia.cuobjdump.path
        (code,) = machine_code.read(path, Path(file.name), architecture).values()
    return code


class Specialised:
    """What a Triton kernel was specialised for: the types and some values of its arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        names = source.fn.arg_names
        self._types = {name: str(kind) for name, kind in source.signature.items()}
        self._divisible = [names[path[0]] for path, found in source.attrs.items() if found]
        self.constants = {names[path[0]]: value for path, value in source.constants.items()}
        """Values of the arguments that are constants of the machine code; None for one left out."""
        self.threads = 32 * metadata.num_warps
        self._stages = metadata.num_stages

    def itemsize(self, pointer: str) -> int:
        """Bytes of an element that a pointer argument points to."""
        return int(re.search(r"\d+$", self._types[pointer])[0]) // 8

    def aligned(self, *arguments: str) -> bool:
        """Whether all of these pointers are aligned to 16 bytes, or integers divisible by 16."""
        return set(arguments) <= set(self._divisible)

    @property
    def float_arguments(self) -> list[str]:
        """Arguments that Triton passes as float32, whatever the tensors' dtype."""
        return [name for name, kind in self._types.items() if kind.startswith("fp")]

    def __str__(self) -> str:
        """In short: the first pointer's element type and others that differ, constants, the
        operands left out, the arguments that 16 divides, the launch."""
        pointers = {k: v.removeprefix("*") for k, v in self._types.items() if v[0] == "*"}
        main = next(iter(pointers.values()))
        other = {k: v for k, v in pointers.items() if v != main}
        long = {k: v for k, v in self._types.items() if v == "i64"}
        parts = [main, *(f"{name} {kind}" for name, kind in (other | long).items())]
        given = {k: v for k, v in self.constants.items() if v is not None}
        parts += [f"{name}={value}" for name, value in given.items()]
        if missing := [name for name, value in self.constants.items() if value is None]:
            parts.append(f"without {' '.join(missing)}")
        if self._divisible:
            parts.append(f"16 divides {' '.join(self._divisible)}")
        return ", ".join([*parts, f"{self.threads // 32} warps", f"{self._stages} stages"])


def main() -> None:
    """The child: compiles what it is asked for and sends its rows."""
    request, send = isolated.receive()
    try:
        compiler = _Compiler(request["architecture"])
        for dtype in request["dtypes"]:
            for each in compiler.rows_and_calls(getattr(torch, dtype), request["inputs"]):
                send(json.dumps({type(each).__name__.lower(): each.to_json()}))
    except Exception as error:  # noqa: BLE001 -- told to the parent, which ends
        send(json.dumps({"error": f"{type(error).__name__}: {str(error)[:2000]}"}))
    else:
        send(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
