"""Finds what the extension is built with: the PyTorch of the target environment and NVIDIA's compiler.

Used by the build backend, by setup.py and by `python -m pyext.doctor`. Imports neither torch nor pyext, so that
it can look at an environment whose PyTorch is absent or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"  # OLDEST_TORCH, as torch/headeronly/version.h counts
TESTED_TORCH = "2.15"  # what a bare environment gets
TESTED_CUDA = "13.2"  # what that PyTorch is built with, on Linux
DEFAULT_CUDA_ARCHITECTURES = "8.0 9.0 10.0+PTX"  # without a list and a GPU, PyTorch's builder fails
STABLE_ABI_FLAGS = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",)


class BuildError(RuntimeError):
    """Something that was asked for cannot be built here; the message says what to do."""


def cuda_switch() -> str:
    """The value of PYEXT_CUDA: "auto" (the default), "1" or "0"."""
    value = os.environ.get("PYEXT_CUDA", "") or "auto"
    if value not in ("auto", "1", "0"):
        raise BuildError(f"PYEXT_CUDA is {value!r}; it must be auto, 1 or 0.")
    return value


def target_paths() -> list[str]:
    """Package folders of the environment that the build is for, the most specific first.

    In pip's build environment `sys.path` leads elsewhere, but sysconfig still describes the target. A virtual
    environment made with --system-site-packages also sees its base interpreter's packages, and an interpreter
    outside any virtual environment also the user's.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        if not hasattr(sys.flags, "isolated") or not sys.flags.isolated:
            paths.append(site.getusersitepackages())
        paths += site.getsitepackages()
    elif _sees_system_packages(Path(sys.prefix)):
        paths += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
    return [path for path in dict.fromkeys(paths) if path and os.path.isdir(path)]


def _sees_system_packages(prefix: Path) -> bool:
    try:
        text = (prefix / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"(?im)^include-system-site-packages\s*=\s*true", text) is not None


def search_paths() -> list[str]:
    """The target's package folders, then the build environment's own."""
    return list(dict.fromkeys([*target_paths(), *(path for path in sys.path if path)]))


def installed_version(name: str, paths: Iterable[str]) -> str | None:
    """The version of the distribution `name` under `paths`, or None."""
    for distribution in importlib.metadata.distributions(name=name, path=list(paths)):
        return distribution.version
    return None


@dataclass(frozen=True)
class Torch:
    """A PyTorch that was found, described without importing it.

    version: with its local part, such as "2.13.0+cpu"; cuda: the CUDA version that it was built with, or None;
    hip: likewise for ROCm; path: the folder that holds the package; requires: what it depends on.
    """

    version: str
    cuda: str | None
    hip: str | None
    path: Path
    requires: tuple[str, ...]

    @property
    def release(self) -> tuple[int, int]:
        """(major, minor)."""
        return release(self.version)


def release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise BuildError(f"{version!r} is no version of PyTorch.")
    return int(found[1]), int(found[2])


def find_torch(paths: Iterable[str]) -> Torch | None:
    """The first PyTorch under `paths`, or None."""
    for path in paths:
        try:
            text = Path(path, "torch", "version.py").read_text()
        except OSError:
            continue
        version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        if version is None:
            continue
        values = {
            name: re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
            for name in ("cuda", "hip")
        }
        metadata = next(iter(importlib.metadata.distributions(name="torch", path=[path])), None)
        return Torch(
            version=version[1],
            cuda=values["cuda"] and values["cuda"][1],
            hip=values["hip"] and values["hip"][1],
            path=Path(path),
            requires=tuple((metadata.requires or ()) if metadata else ()),
        )
    return None


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA compiler with the headers and libraries that a build needs.

    home: the folder that holds bin/nvcc; version: such as "13.2"; library: the runtime library to link.
    """

    home: Path
    version: str
    library: Path


def inspect_toolkit(home: Path, *, full: bool) -> CudaToolkit | str:
    """The toolkit at `home`, or why it cannot be used.

    full: also require the headers of NVIDIA's libraries. A toolkit of the machine's that lacks them is a
    fragment (some images carry one), and fails for anybody who includes PyTorch's own CUDA headers.
    """
    needed = ["bin/nvcc", "include/cuda_runtime.h", "include/crt/host_defines.h"]
    if full:
        needed += ["include/cublas_v2.h", "include/cusparse.h"]
    missing = [name for name in needed if not (home / name).exists()]
    if missing:
        return f"{home} lacks {', '.join(missing)}"
    libraries = [
        library
        for folder in ("lib64", "lib")
        for library in sorted((home / folder).glob("libcudart.so*"))
    ]
    if not libraries:
        return f"{home} lacks libcudart.so"
    version = nvcc_version(home / "bin" / "nvcc")
    if version is None:
        return f"{home}/bin/nvcc does not run"
    return CudaToolkit(home, version, libraries[0])


def nvcc_version(nvcc: Path) -> str | None:
    """The release that `nvcc --version` names, such as "13.2", or None if it does not run."""
    try:
        text = subprocess.run(
            [str(nvcc), "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found and found[1]


def find_cuda_toolkit(cuda: str, paths: Iterable[str]) -> CudaToolkit | str:
    """A toolkit that fits a PyTorch built with CUDA `cuda`, or why there is none.

    In this order: CUDA_HOME or CUDA_PATH (same major version is enough: whoever sets it means it), NVIDIA's
    compiler from the package index under `paths`, then the machine's own (same major and minor version).
    """
    major = cuda.split(".")[0]
    reasons = []
    explicit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if explicit:
        found = inspect_toolkit(Path(explicit), full=False)
        if isinstance(found, CudaToolkit) and found.version.split(".")[0] == major:
            return found
        reasons.append(
            found if isinstance(found, str) else f"{explicit} holds CUDA {found.version}"
        )
    candidates = [(Path(path, "nvidia", f"cu{major}"), False) for path in paths]
    candidates += [(home, True) for home in _machine_toolkits(cuda)]
    for home, full in candidates:
        if not (home / "bin" / "nvcc").exists():
            continue
        found = inspect_toolkit(home, full=full)
        if isinstance(found, CudaToolkit) and found.version == cuda:
            return found
        reasons.append(found if isinstance(found, str) else f"{home} holds CUDA {found.version}")
    detail = f" ({'; '.join(reasons)})" if reasons else ""
    return f"no CUDA {cuda} compiler was found{detail}"


def _machine_toolkits(cuda: str) -> list[Path]:
    homes = [Path(f"/usr/local/cuda-{cuda}"), Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    return list(dict.fromkeys(homes))


def plan_cuda(torch: Torch, paths: Iterable[str]) -> CudaToolkit | str:
    """The toolkit for the CUDA library, or why that library is left out.

    Raises BuildError where PYEXT_CUDA=1 asks for it and it cannot be built.
    """
    switch = cuda_switch()
    if switch == "0":
        return "PYEXT_CUDA=0"
    if torch.cuda is None:
        kind = "ROCm" if torch.hip else "CPU-only"
        found: CudaToolkit | str = f"PyTorch {torch.version} is a {kind} build"
    else:
        found = find_cuda_toolkit(torch.cuda, paths)
    if switch == "1" and isinstance(found, str):
        raise BuildError(f"PYEXT_CUDA=1, but the CUDA kernels cannot be built: {found}.")
    return found


def cuda_architectures(cuda: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or the default list as far as the compiler of CUDA `cuda` knows it."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    return DEFAULT_CUDA_ARCHITECTURES if release(cuda) >= (12, 8) else "8.0 9.0+PTX"


def first_line(command: list[str]) -> str | None:
    """The first line that `command` prints, or None if it does not run."""
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.partition("\n")[0]


def dependencies() -> list[str]:
    """What the installed package needs at run time."""
    return [f"torch>={OLDEST_TORCH}"]
