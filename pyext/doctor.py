"""Says what this installation can do, and what to do about the rest: `python -m pyext.doctor`.

Exit code 0 if the backends eager and extension work on the CPU, 3 if not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from pyext import registry
from pyext._build import toolchain
from pyext.backends import BACKENDS, Backend
from pyext.lab import environment
from pyext.lab.check import same_random_numbers

DEVICES = ("cpu", "cuda")
REQUIRED_BACKENDS = ("eager", "extension")
REBUILD = "rebuild with `pip install -e .`"


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def guarded(describe: Callable[[], str]) -> str:
    """What `describe` returns, or the error that it raised: a doctor must not fall ill."""
    try:
        return describe()
    except Exception as error:
        return first_line(error)


def describe_python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def describe_torch() -> str:
    advice = ""
    if toolchain.release(torch.__version__) < toolchain.release(toolchain.OLDEST_TORCH):
        advice = f"; too old, the lab needs {toolchain.OLDEST_TORCH} or newer"
    return f"{torch.__version__} in {Path(torch.__file__).parent}{advice}"


def describe_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA; a CUDA build of PyTorch is needed for a GPU"
    return f"{torch.version.cuda}, the version that this PyTorch was built with"


def describe_nvcc() -> str:
    if torch.version.cuda is None:
        return "not needed: this PyTorch was built without CUDA"
    found = toolchain.find_cuda_toolkit(torch.version.cuda, toolchain.search_paths())
    if isinstance(found, str):
        return f"{found}; the CUDA kernels cannot be rebuilt. `pip install -e .` brings a compiler"
    return f"{found.version} in {found.home}"


def describe_triton() -> str:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed; `pip install triton` (there are wheels for Linux)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{version}, interpreting (TRITON_INTERPRET=1)"
    if tuned := torch.cuda.is_available() and environment.tuned_products("cuda"):
        return f"{version}, {tuned} products tuned for this GPU"
    return version


def describe_gpu() -> str:
    if torch.version.cuda is None:
        return "none can be used: this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except RuntimeError as error:
            return f"none can be used: {str(error).partition('.')[0]}"
        return "none"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(
        f"{each.name} (compute capability {each.major}.{each.minor}, {each.total_memory >> 30} GiB)"
        for each in devices
    )


def introspection() -> ModuleType | None:
    """pyext._introspect, or None where it was not built."""
    try:
        module = importlib.import_module("pyext._introspect")
    except ImportError:
        return None
    # Beside an editable install, a copy of the package is handed the original's compiled modules.
    return module if Path(module.__file__).parent == Path(__file__).parent else None


def describe_extension() -> str:
    module = introspection()
    if module is None:
        return f"not built; {REBUILD}"
    built = module.build_info()
    text = (
        f"built against PyTorch {built['torch']} (runs with {built['torch_abi_target']} and newer) "
        f"by {built['compiler']}; "
    )
    if built["cuda"] is None:
        return f"{text}CUDA kernels left out: {built['cuda_left_out']}"
    return f"{text}CUDA kernels by nvcc {built['cuda']} for {built['cuda_architectures']}"


ENVIRONMENT: dict[str, Callable[[], str]] = {
    "Python": describe_python,
    "PyTorch": describe_torch,
    "CUDA": describe_cuda,
    "nvcc": describe_nvcc,
    "Triton": describe_triton,
    "GPU": describe_gpu,
    "extension": describe_extension,
}


def examine(op: registry.Op, backend: Backend, device: str) -> str | None:
    """Why `op` does not work there, and what to do; None if a tiny call of it agrees with eager."""
    try:
        if reason := backend.unavailable(device, op.name):
            return reason
        shape = (4,) * len(op.shape_names)

        def arguments() -> tuple:
            generator = torch.Generator(device).manual_seed(0)
            return op.benchmark_inputs(shape, torch.float32, torch.device(device), generator)

        with same_random_numbers():
            actual = op.function(*arguments(), backend=backend.name)
        with same_random_numbers():
            expected = op.eager(*arguments())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    except AssertionError:
        return f"a tiny call gives a WRONG result; run `pytest`, and {REBUILD}"
    except Exception as error:
        if "no kernel image" in str(error):
            return "not built for this GPU; rebuild with its architecture in TORCH_CUDA_ARCH_LIST"
        return f"a tiny call fails: {first_line(error)}; {REBUILD}"
    return None


class Findings:
    """Every op x backend x device: whether it works, and each distinct reason against it once."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}  # reason -> the number that stands for it in the table
        self.cells: dict[tuple[str, str, str], str | None] = {}
        for op in registry.ops().values():
            for backend in BACKENDS.values():
                for device in backend.devices:
                    reason = examine(op, backend, device)
                    self.cells[op.name, backend.name, device] = reason
                    if reason is not None:
                        self.reasons.setdefault(reason, len(self.reasons) + 1)

    def rows(self) -> Iterator[list[str]]:
        for op in registry.ops():
            for device in DEVICES:
                yield [op, device, *(self.cell(op, name, device) for name in BACKENDS)]

    def cell(self, op: str, backend: str, device: str) -> str:
        if device not in BACKENDS[backend].devices:
            return "–"
        reason = self.cells[op, backend, device]
        if reason is not None:
            return f"no ({self.reasons[reason]})"
        if BACKENDS[backend].checks_only:
            return "emulated"
        return "interpreted" if BACKENDS[backend].interpreted else "yes"

    def healthy(self) -> bool:
        return all(
            reason is None
            for (_, backend, device), reason in self.cells.items()
            if backend in REQUIRED_BACKENDS and device == "cpu"
        )


def kernel_rows() -> list[list[str]]:
    """The CUDA kernels of every library, with what the current GPU would run."""
    module = introspection()
    rows = []
    for library in sorted(Path(__file__).parent.glob("_C_cuda*.so")):
        for kernel in module.cuda_kernels(str(library)) if module else ():
            if "error" in kernel:
                rows.append([kernel["name"], kernel["error"], "", "", ""])
            else:
                keys = ("registers_per_thread", "static_shared_bytes", "local_bytes_per_thread")
                numbers = [str(kernel[key]) for key in (*keys, "binary_version")]
                rows.append([kernel["name"], *numbers])
    return rows


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; plain text where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}", "\t".join(header), *("\t".join(row) for row in rows), sep="\n")
        return
    table = Table(title=title, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Escaped: rich would take a path in brackets for a style.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    # Piped, a table is as wide as it needs to be: names that are split cannot be searched for.
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyext.doctor", description=__doc__)
    parser.add_argument(
        "--kernels", action="store_true", help="also list the CUDA kernels and their registers"
    )
    options = parser.parse_args(arguments)

    show("Environment", ("", ""), [(name, guarded(text)) for name, text in ENVIRONMENT.items()])
    findings = Findings()
    show("What works", ("op", "device", *BACKENDS), list(findings.rows()))
    for reason, number in findings.reasons.items():
        print(f"({number}) {reason}")
    if options.kernels:
        columns = ("kernel", "registers", "shared bytes", "local bytes", "architecture")
        show("CUDA kernels", columns, kernel_rows())
    if findings.healthy():
        print("\neager and extension work on the CPU.")
        return 0
    print("\neager and extension do not both work on the CPU; see the reasons above.")
    return 3


if __name__ == "__main__":
    sys.exit(main())
