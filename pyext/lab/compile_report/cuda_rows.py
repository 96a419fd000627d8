"""The compile report's rows of the CUDA library, read from its file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from pyext import doctor
from pyext._build import toolchain
from pyext.lab.compile_report import machine_code
from pyext.lab.compile_report.row import Row, make_row

NAMESPACE = "pyext::"
MANGLED_NAMESPACE = "_ZN5pyext"  # its kernels; the CUDA headers bring one of their own


class Unavailable(Exception):
    """There is nothing to report on; the message says why, in a sentence."""


class CudaLibrary:
    """The library of CUDA kernels that this PyTorch loads, as a file.

    Raises Unavailable if there is none or if nothing here can read it.
    """

    def __init__(self) -> None:
        self.path = _find_library()
        introspection = doctor.introspection()
        if introspection is None:
            raise Unavailable("pyext._introspect is not built; rebuild with `pip install -e .`")
        self._introspection: ModuleType = introspection
        toolkit = toolchain.find_cuda_toolkit(torch.version.cuda, toolchain.search_paths())
        home = toolkit.home if isinstance(toolkit, toolchain.CudaToolkit) else None
        self._cuobjdump = machine_code.find_cuobjdump(home)
        if self._cuobjdump is None:
            raise Unavailable("no cuobjdump; `pip install triton` or install a CUDA toolkit")

    def architectures(self) -> list[str]:
        """Those that the library holds machine code for."""
        return machine_code.architectures(self._cuobjdump, self.path)

    def rows(self, architectures: list[str]) -> list[Row]:
        """One row per kernel and architecture. The code is read once per architecture, for it is
        tens of megabytes of text."""
        registered = {
            split_signature(kernel["name"]): kernel
            for kernel in self._introspection.cuda_kernels(str(self.path))
        }
        with ThreadPoolExecutor() as readers:
            codes = readers.map(
                lambda each: machine_code.read(self._cuobjdump, self.path, each), architectures
            )
            return [
                self._row(name, architecture, code, registered)
                for architecture, kernels in zip(architectures, codes, strict=True)
                for name, code in kernels.items()
                if name.startswith(MANGLED_NAMESPACE)
            ]

    def _row(self, mangled, architecture, code, registered) -> Row:
        kernel, instantiation = split_signature(self._introspection.demangled(mangled))
        stated = registered.get((kernel, instantiation), {})
        return make_row(
            kernel,
            "cuda",
            instantiation,
            architecture,
            code,
            threads=stated.get("threads_per_block"),
            dynamic_shared_bytes=stated.get("dynamic_shared_bytes"),
            limits=stated.get("limits"),
        )


def _find_library() -> Path:
    if torch.version.cuda is None:
        raise Unavailable("this PyTorch was built without CUDA, so there is no CUDA library")
    major = torch.version.cuda.partition(".")[0]
    path = Path(doctor.__file__).parent / f"_C_cuda{major}.so"
    if not path.exists():
        raise Unavailable(
            f"{path.name} was not built; `python -m pyext.doctor` says what is missing"
        )
    return path


def split_signature(signature: str) -> tuple[str, str]:
    """A demangled kernel's name and template arguments, without the namespace.

    ``void pyext::relu_forward_kernel<float, 4>(float const*, float*, long)`` gives
    ``("relu_forward_kernel", "float, 4")``.
    """
    depth = 0
    end = len(signature)
    for index, character in enumerate(signature):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = index
            break
    head = signature[:end].removeprefix("void ").replace(NAMESPACE, "").replace("> >", ">>")
    name, _, arguments = head.partition("<")
    return name, arguments.removesuffix(">").strip()
