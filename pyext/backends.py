"""Which backends exist here, and why the others do not.

A backend is one way to compute every op. ``eager`` is pure PyTorch; the others bring raw ops in a
dispatcher namespace of their own, which this module loads on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from pyext import registry
from pyext._build import emulator, toolchain
from pyext.ops._autograd import Differentiable

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent
_REBUILD = "rebuild with `pip install -e .`"


class Backend:
    """One way to compute every op: the reference, pure PyTorch ops."""

    name = "eager"
    namespace: str | None = None
    """Where ``torch.ops`` holds the raw ops; None for ``eager``, which has none."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """The types of the devices whose tensors it can ever compute on."""
    interpreted = False
    """True where the backend only emulates its hardware: for checking, never timed or a default."""
    checks_only = False
    """True where that is so on every machine: benchmarks and training do not offer it."""

    def unavailable(self, device: torch.device | str, op: str | None = None) -> str | None:
        """Why ``op`` (any if None) cannot run on ``device``, and what to do; None if it can."""
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            if torch.version.cuda is None:
                return "this PyTorch was built without CUDA; install a CUDA build of PyTorch"
            return "no usable NVIDIA GPU was found; run on a machine with one"
        return None

    def __repr__(self) -> str:
        return f"<backend {self.name}>"


class _KernelBackend(Backend):
    """A backend with raw ops in a dispatcher namespace."""

    namespace: str

    def unavailable(self, device: torch.device | str, op: str | None = None) -> str | None:
        device = torch.device(device)
        if device.type not in self.devices:
            known = " or ".join(map(repr, self.devices))
            return f"the lab has no kernels for {device.type!r} tensors; use {known}"
        return super().unavailable(device, op)

    @functools.cached_property
    def raw(self):
        """``torch.ops.<namespace>``: raw ops, their fakes and the autograd shells over them."""
        self._load()
        namespace, registered = getattr(torch.ops, self.namespace), []
        for op in registry.ops().values():
            for raw_op in op.raw_ops + op.cpu_raw_ops:
                if hasattr(namespace, raw_op.name):
                    torch.library.register_fake(f"{self.namespace}::{raw_op.name}", raw_op.fake)
                    registered.append(raw_op.name)
        Differentiable.make_shells(namespace, registered)
        return namespace

    def _load(self) -> None:
        raise NotImplementedError

    def _raw_ops(self, op: registry.Op) -> tuple[registry.RawOp, ...]:
        return op.raw_ops

    def _missing(self, op: str | None) -> str | None:
        """The first raw op that this backend lacks, as a sentence."""
        wanted = registry.ops().values() if op is None else (registry.get(op),)
        for name in (raw_op.name for each in wanted for raw_op in self._raw_ops(each)):
            if not hasattr(self.raw, name):
                return f"{self.namespace}::{name} is not registered; {_REBUILD}"
        return None


class ExtensionBackend(_KernelBackend):
    """The compiled extension: a C++ kernel for CPU tensors, a CUDA kernel for CUDA tensors."""

    name = "extension"
    namespace = "pyext"

    def unavailable(self, device: torch.device | str, op: str | None = None) -> str | None:
        if reason := super().unavailable(device):
            return reason
        if _load_errors()["cpu"]:
            return _load_errors()["cpu"]
        if torch.device(device).type == "cuda" and _load_errors()["cuda"]:
            return _load_errors()["cuda"]
        return self._missing(op)

    def _raw_ops(self, op: registry.Op) -> tuple[registry.RawOp, ...]:
        return op.raw_ops + op.cpu_raw_ops

    def _load(self) -> None:
        if error := _load_errors()["cpu"]:
            raise RuntimeError(f"backend 'extension' is not available: {error}")


class TritonBackend(_KernelBackend):
    """Triton kernels; on CPU tensors only in Triton's interpreter, for checking."""

    name = "triton"
    namespace = "pyext_triton"

    @property
    def interpreted(self) -> bool:
        """Whether this process runs Triton's interpreter; fixed when triton was first imported."""
        if "triton" in sys.modules:
            return bool(sys.modules["triton"].knobs.runtime.interpret)
        return os.environ.get("TRITON_INTERPRET") == "1"

    def unavailable(self, device: torch.device | str, op: str | None = None) -> str | None:
        if reason := super().unavailable(device):
            return reason
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; `pip install triton` (wheels exist for Linux)"
        if torch.device(device).type == "cpu" and not self.interpreted:
            return (
                "Triton has no CPU target; start Python with TRITON_INTERPRET=1 in the environment "
                "to check its kernels on CPU tensors in Triton's interpreter"
            )
        return self._missing(op)

    def _load(self) -> None:
        _import_kernels()


class EmulatedBackend(_KernelBackend):
    """The extension's CUDA kernels on CPU tensors, in the emulator of ``csrc/emulator``.

    For checking on any machine; compiled when it is first used (``docs/emulator.md``). A mistake of
    a kernel is a ``RuntimeError`` that names the kernel, the block and the thread.
    """

    name = "extension-emulated"
    namespace = "pyext_emulated"
    devices = ("cpu",)
    interpreted = True
    checks_only = True

    def unavailable(self, device: torch.device | str, op: str | None = None) -> str | None:
        """As for every backend; only with an ``op`` does it compile what is not yet compiled."""
        if reason := super().unavailable(device) or _load_errors()["cpu"]:
            return reason  # the schemas are those of the extension
        if reason := emulator.why_not(_ROOT):
            return f"the emulator cannot be built: {reason}"
        return None if op is None else self._missing(op)

    @functools.cached_property
    def library(self) -> Path:
        """The file of the emulated kernels, up to date; ``BuildError`` if it cannot be built."""
        return emulator.build(_ROOT, _this_torch())

    def _load(self) -> None:
        _load_errors()  # loads the compiled extension, whose schemas these are
        torch.ops.load_library(str(self.library))
        self._schemas = torch.library.Library(self.namespace, "FRAGMENT")
        for op in registry.ops().values():
            for raw_op in op.raw_ops:
                schema = getattr(torch.ops.pyext, raw_op.name).default._schema
                self._schemas.define(str(schema).removeprefix("pyext::"))


def _this_torch() -> toolchain.Torch:
    """The PyTorch of this process, as the builds describe it."""
    found = toolchain.find_torch([str(Path(torch.__file__).parents[1])])
    assert found is not None
    return found


@functools.cache
def _load_errors() -> dict[str, str | None]:
    """Loads the compiled libraries that fit this PyTorch; device type -> why not, or None."""
    errors = {"cpu": _load_library("_C_cpu*.so", "the compiled extension")}
    if torch.version.cuda is None:
        errors["cuda"] = "this PyTorch was built without CUDA; install a CUDA build of PyTorch"
    elif errors["cpu"]:
        errors["cuda"] = errors["cpu"]
    else:
        major = torch.version.cuda.split(".")[0]
        errors["cuda"] = _load_library(
            f"_C_cuda{major}*.so", f"the extension's CUDA {major} library"
        )
    return errors


def _load_library(pattern: str, what: str) -> str | None:
    paths = sorted(_PACKAGE.glob(pattern))
    if not paths:
        return f"{what} was not built ({pattern} is missing); {_REBUILD}"
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        return f"{what} does not load ({error}); {_REBUILD}"
    return None


@functools.cache
def _import_kernels() -> tuple[ModuleType, ...]:
    return tuple(importlib.import_module(f"pyext.kernels.{name}") for name in registry.ops())


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (ExtensionBackend(), TritonBackend(), Backend(), EmulatedBackend())
}
"""Every backend by name, in the order in which a call without a preference tries them."""


class _Default(threading.local):
    """``use_backend``'s name in a thread; a getattr that fails costs a small call 1 of 40 µs.

    Each thread sets its own: of a class's attribute ``torch.compile`` does not see it change.
    """

    def __init__(self):
        self.name: str | None = None


_default = _Default()


def backends(device: torch.device | str = "cpu") -> list[str]:
    """The names of the backends that are available for real work on ``device``.

    Args:
        device: a device or its name, ``"cpu"`` or ``"cuda"``.

    Returns:
        Names in order of preference; never an interpreted backend, which is for checking only.
    """
    return [
        name
        for name, backend in BACKENDS.items()
        if not backend.interpreted and backend.unavailable(device) is None
    ]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Makes ``name`` the default backend within a ``with`` block, for the current thread.

    Args:
        name: ``"eager"``, ``"extension"`` or ``"triton"``; ``None``: the first that is available at
            each call, as outside of any block.

    Raises:
        ValueError: no backend has that name.
    """
    if name is not None:
        lookup(name)
    previous = _default.name
    _default.name = name
    try:
        yield
    finally:
        _default.name = previous


def empty_buffer_pool() -> int:
    """Frees the memory that the C++ kernels keep for the intermediates and large outputs to come.

    Returns:
        Bytes freed: 256 MiB at most; 0 where the extension is not available, or where another
        thread is at the pool just then.
    """
    extension = BACKENDS["extension"]
    return 0 if extension.unavailable("cpu") else extension.raw.empty_buffer_pool()


def select(name: str | None, device: torch.device, op: str) -> Backend:
    """The backend for one call: the argument, else ``use_backend``'s, else the first that works.

    Args:
        name: the caller's ``backend`` argument.
        device: where the call's tensors are.
        op: the op's name.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend that was asked for cannot run ``op`` on ``device`` here.
    """
    if name is None:
        name = _default.name
        if name is None:
            return BACKENDS[_best(device, op)]
    backend = lookup(name)
    if reason := _unavailable(name, device, op):
        raise RuntimeError(f"{op}: backend {name!r} is not available for {device}: {reason}")
    return backend


def select_at_once(name: str | None, device: torch.device, op: str) -> Backend:
    """:func:`select`, where ``torch.compile`` does not trace: an answer is looked up, not sought
    again (with a name 0.13 µs in place of 0.23, in a loop of nothing else)."""
    try:
        return _selected(_default.name if name is None else name, device, op)
    except TypeError:  # a name that has no hash
        return select(name, device, op)


_selected = functools.cache(select)
"""None stands for no preference, the thread's default included."""


def lookup(name: str) -> Backend:
    """The backend of that name; ``ValueError`` if there is none."""
    backend = BACKENDS.get(name) if isinstance(name, str) else None
    if backend is None:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected None or one of {known}")
    return backend


# What a process can run does not change while it lives, and asking anew would cost every call. The
# caches know a device by itself: its type is a new string each time, 3 of a small call's 46 µs.
@functools.cache
def _unavailable_now(name: str, device: torch.device, op: str) -> str | None:
    return BACKENDS[name].unavailable(device, op)


def _unavailable(name: str, device: torch.device, op: str) -> str | None:
    return _unavailable_now(name, device, op)


def _best(device: torch.device, op: str) -> str:
    return _best_now(device, op)


@functools.cache
def _best_now(device: torch.device, op: str) -> str:
    for name, backend in BACKENDS.items():
        if not backend.interpreted and _unavailable_now(name, device, op) is None:
            return name
    return "eager"


# What torch.compiler.assume_constant_result sets, without importing the compiler (and triton with
# it) just for that: torch.compile calls these while tracing instead of tracing how a library loads.
_unavailable._dynamo_marked_constant = True
_best._dynamo_marked_constant = True
