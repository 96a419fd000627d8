"""Finds what the extension is built with: the target environment's PyTorch and NVIDIA's compiler.

Used by the build backend, by setup.py, by CMake and by `python -m pyext.doctor`. Imports neither
torch nor pyext, so that it can look at an environment whose PyTorch is absent or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EDITABLE = "_PYEXT_EDITABLE"  # set by the build backend: setup.py cannot tell from its arguments
OLDEST_TORCH = "2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"  # OLDEST_TORCH, as torch/headeronly/version.h counts
# A bare environment gets the newest of these. pip hands a backend's requirements to its resolver in no
# fixed order, and takes up those with `==` first. Without one, the compiler's turn may come first: its
# newest version fits no PyTorch, so pip falls back to one that needs no CUDA, an old or a CPU-only one.
TESTED_TORCH = f">={OLDEST_TORCH},<2.16,==2.*"
TESTED_CUDA = "13.2"  # what the newest one's Linux wheels are built with
TRITON_OF_TORCH = {
    (2, 11): "3.6",
    (2, 12): "3.7",
    (2, 13): "3.7",
    (2, 14): "3.8",
    (2, 15): "3.9",
}
DEFAULT_CUDA_ARCHITECTURES = "8.0 9.0 10.0+PTX"
# NVIDIA's wheels hold nvcc itself only since CUDA 13; those of CUDA 12 stop at ptxas.
FIRST_CUDA_WITH_NVCC_WHEELS = 13
NVCC_PARTS = ("nvidia-nvvm", "nvidia-cuda-crt")
HAS_TRITON_WHEELS = (
    "platform_system == 'Linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
)
RUN_TIME_DEPENDENCIES = (
    "expecttest",
    "hypothesis",
    "matplotlib",
    "ninja",
    "pooch",
    "pybind11",
    "pytest>=8",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "rich",
    "scikit-learn",
    "setuptools",
)

CXX_FLAGS = (
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fvisibility=hidden",
)
NVCC_FLAGS = (
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DUSE_CUDA",  # declares the CUDA half of the stable ABI
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
)
# For what compiles csrc/cuda with the host compiler. The option that makes the compiler announce every
# access is for the kernels alone: csrc/emulator answers the calls.
EMULATOR_FLAGS = (
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-std=c++20",
    "-O2",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
)
EMULATED_KERNEL_FLAGS = (*EMULATOR_FLAGS, "-fsanitize=thread")


class BuildError(RuntimeError):
    """Something that was asked for cannot be built here; the message says what to do."""


def cuda_switch() -> str:
    """The value of PYEXT_CUDA: "auto" (the default), "1" or "0"."""
    value = os.environ.get("PYEXT_CUDA") or "auto"
    if value not in ("auto", "1", "0"):
        raise BuildError(f"PYEXT_CUDA is {value!r}; it must be auto, 1 or 0.")
    return value


def target_paths() -> list[str]:
    """Package folders of the environment that the build is for, the most specific first.

    In pip's build environment `sys.path` leads elsewhere, but sysconfig still describes the
    target. A virtual environment made with --system-site-packages also sees its base
    interpreter's packages, and an interpreter outside any virtual environment also the user's.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        paths += [site.getusersitepackages(), *site.getsitepackages()]
    elif _sees_system_packages(Path(sys.prefix)):
        paths += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
    return [path for path in dict.fromkeys(paths) if os.path.isdir(path)]


def _sees_system_packages(prefix: Path) -> bool:
    try:
        text = (prefix / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"(?im)^include-system-site-packages\s*=\s*true", text) is not None


def search_paths() -> list[str]:
    """The target's package folders, then the build environment's own."""
    return list(dict.fromkeys([*target_paths(), *filter(None, sys.path)]))


def installed_version(name: str, paths: Iterable[str]) -> str | None:
    """The version of the distribution `name` under `paths`, or None."""
    found = importlib.metadata.distributions(name=name, path=list(paths))
    return next((distribution.version for distribution in found), None)


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "2.15.0+cu132"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise BuildError(f"{version!r} is not a version number.")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Torch:
    """A PyTorch that was found, described without importing it.

    version: what torch.__version__ says, such as "2.15.0+cu132"; distribution: what its package
    says ("2.15.0"), which is what a requirement must name; cuda: torch.version.cuda; hip: likewise
    for ROCm; folder: the package's; requires: what its package depends on.
    """

    version: str
    distribution: str
    cuda: str | None
    hip: str | None
    folder: Path
    requires: tuple[str, ...]

    @property
    def is_supported(self) -> bool:
        return release(self.version) >= release(OLDEST_TORCH)

    def required(self, name: str) -> str | None:
        """The exact version of `name` that this PyTorch depends on, or None."""
        pattern = rf"{re.escape(name)}(\[[^\]]*\])?\s*\(?==\s*([0-9.]+)"
        found = filter(None, (re.match(pattern, requirement) for requirement in self.requires))
        return next((match[2] for match in found), None)

    @property
    def brings_triton(self) -> bool:
        return any(re.match(r"(pytorch-)?triton\b", item) for item in self.requires)


def find_torch(paths: Iterable[str]) -> Torch | None:
    """The first PyTorch under `paths`, or None."""
    for path in paths:
        try:
            text = Path(path, "torch", "version.py").read_text()
        except OSError:
            continue

        def value(name: str, text: str = text) -> str | None:
            match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
            return match and match[1]

        version = value("__version__")
        if version is None:
            continue
        found = next(iter(importlib.metadata.distributions(name="torch", path=[path])), None)
        return Torch(
            version=version,
            distribution=found.version if found else version.partition("+")[0],
            cuda=value("cuda"),
            hip=value("hip"),
            folder=Path(path, "torch"),
            requires=tuple(found.requires or ()) if found else (),
        )
    return None


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA compiler with the headers and libraries that a build needs.

    home: the folder that holds bin/nvcc; version: such as "13.2"; runtime: the runtime library;
    packaged: whether it came from the package index.
    """

    home: Path
    version: str
    runtime: Path
    packaged: bool


def find_cuda_toolkit(cuda: str, paths: Iterable[str]) -> CudaToolkit | str:
    """A toolkit that fits a PyTorch built with CUDA `cuda`, or why there is none.

    In this order: CUDA_HOME or CUDA_PATH (the same major version is enough: whoever sets it means
    it), NVIDIA's compiler from the package index under `paths`, then the machine's own.
    """
    major = cuda.partition(".")[0]
    reasons = []

    def take(home: Path, *, packaged: bool = False, explicit: bool = False) -> CudaToolkit | None:
        found = _inspect_toolkit(home, packaged=packaged, whole=not (packaged or explicit))
        if isinstance(found, str):
            reasons.append(found)
        elif found.version == cuda or (explicit and found.version.partition(".")[0] == major):
            return found
        else:
            reasons.append(f"{home} holds CUDA {found.version}")
        return None

    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and (toolkit := take(Path(named), explicit=True)):
        return toolkit
    for path in paths:
        home = Path(path, "nvidia", f"cu{major}")
        if (home / "bin" / "nvcc").exists() and (toolkit := take(home, packaged=True)):
            return toolkit
    for home in _machine_toolkits(cuda):
        if (home / "bin" / "nvcc").exists() and (toolkit := take(home)):
            return toolkit
    detail = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    return f"no CUDA {cuda} compiler was found{detail}"


def _machine_toolkits(cuda: str) -> list[Path]:
    homes = [Path(f"/usr/local/cuda-{cuda}"), Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    return list(dict.fromkeys(homes))


def _inspect_toolkit(home: Path, *, packaged: bool, whole: bool) -> CudaToolkit | str:
    """The toolkit at `home`, or why it cannot be used.

    whole: also require the headers of NVIDIA's libraries. A toolkit of the machine's that lacks
    them is a fragment (some images carry one) and fails with PyTorch's own CUDA headers.
    """
    needed = ["bin/nvcc", "include/cuda_runtime.h", "include/crt/host_defines.h"]
    if whole:
        needed += ["include/cublas_v2.h", "include/cusparse.h"]
    missing = [name for name in needed if not (home / name).exists()]
    runtimes = sorted((home / "lib64").glob("libcudart.so*")) or sorted(
        (home / "lib").glob("libcudart.so*")
    )
    if not runtimes:
        missing.append("lib64/libcudart.so")
    if missing:
        return f"{home} lacks {missing[0]}"
    version = nvcc_version(home / "bin" / "nvcc")
    if version is None:
        return f"{home}/bin/nvcc does not run"
    for part in NVCC_PARTS if packaged else ():
        found = installed_version(part, [str(home.parents[1])])
        if found and release(found) != release(version):
            return f"{part} {found} does not fit nvcc {version}"
    return CudaToolkit(home, version, runtimes[0], packaged)


def nvcc_version(nvcc: Path) -> str | None:
    """The release that `nvcc --version` names, such as "13.2", or None if it does not run."""
    found = re.search(r"release (\d+\.\d+)", output_of([str(nvcc), "--version"]) or "")
    return found and found[1]


def output_of(command: list[str]) -> str | None:
    """What `command` prints, or None if it fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def cxx_compiler() -> str:
    """The C++ compiler's program: CXX, or the one that Python was built with."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return command.split()[0]


def check_cxx_compiler() -> None:
    """Raises BuildError where there is no C++ compiler."""
    compiler = cxx_compiler()
    if shutil.which(compiler) is None:
        raise BuildError(
            f"no C++ compiler was found ({compiler}). Install one (such as the package g++ or "
            "gcc-c++), or name it in CXX."
        )


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
    """TORCH_CUDA_ARCH_LIST, or the default list as far as the compiler of CUDA `cuda` knows it.

    PyTorch's builder derives a missing list from the GPUs that it sees, and fails if there is none.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    return DEFAULT_CUDA_ARCHITECTURES if release(cuda) >= (12, 8) else "8.0 9.0+PTX"


def nvcc_flags(cuda: str) -> list[str]:
    """NVCC_FLAGS and, unless TORCH_CUDA_ARCH_LIST is set, those for the default architectures.

    Their machine code is made of two PTX, that of 8.0 and, from 9.0 on, that of 9.0, whose launches
    may overlap (csrc/cuda/common/platform.cuh); nothing else in csrc/cuda asks for which architecture
    it is compiled, and the way to the PTX is the longest part of a compilation (two_layer.cu, once
    for all: 33 s of CPU time, once for each of three: 51). The last PTX serves whatever comes after,
    as "+PTX" says.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return [*NVCC_FLAGS]
    names = cuda_architectures(cuda).removesuffix("+PTX").split()
    numbers = [int(name.replace(".", "")) for name in names]
    flags = [f"-gencode=arch=compute_{_ptx_of(each)},code=sm_{each}" for each in numbers]
    last = _ptx_of(numbers[-1])
    return [*NVCC_FLAGS, *flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def _ptx_of(architecture: int) -> int:
    return 90 if architecture >= 90 else 80


def _compiler_requirements(torch: Torch | None) -> list[str]:
    """NVIDIA's compiler from the package index for `torch`; empty where that has none.

    torch: None for one that is still to be chosen; its dependencies then say which version fits.
    """
    machine = (platform.system(), platform.machine())
    if machine not in (("Linux", "x86_64"), ("Linux", "aarch64")):
        return []
    toolkit = "cuda-toolkit[nvcc,cudart,cccl]"
    if torch is None:
        return [toolkit]
    if torch.cuda is None or release(torch.cuda)[0] < FIRST_CUDA_WITH_NVCC_WHEELS:
        return []
    return [
        f"{toolkit}=={torch.required('cuda-toolkit') or f'{torch.cuda}.*'}",
        # Before 13.2 nvcc's package takes any version of its parts, and newer parts fail with it:
        # "ptxas fatal: Unsupported .version 9.5; current version is '9.0'".
        *(f"{part}=={torch.cuda}.*" for part in NVCC_PARTS),
    ]


def build_requirements() -> list[str]:
    """What a wheel or an editable install needs in its build environment beyond what is there."""
    paths = target_paths()
    torch = find_torch(paths)
    if torch and not torch.is_supported:
        torch = None
    needed = [name for name in ("ninja", "pybind11") if not installed_version(name, paths)]
    if torch is None:
        needed.append(f"torch{TESTED_TORCH}")
    if cuda_switch() == "0":
        return needed
    cuda = torch.cuda if torch else TESTED_CUDA
    if cuda and isinstance(find_cuda_toolkit(cuda, paths), str):
        needed += _compiler_requirements(torch)
    return needed


def wheel_dependencies() -> list[str]:
    """What an installed wheel needs: any supported PyTorch, and no compiler."""
    return [
        f"torch>={OLDEST_TORCH}",
        "numpy",
        f"triton; {HAS_TRITON_WHEELS}",
        *RUN_TIME_DEPENDENCIES,
    ]


def editable_dependencies() -> list[str]:
    """What an editable install needs: the very PyTorch that it is built against, and what fits it.

    Without the pin, another package's dependency (torchvision's, say) makes pip replace a CPU-only
    or an older PyTorch. The compiler stays, for rebuilds and for the compile report.
    """
    paths = search_paths()
    torch = find_torch(paths)
    if torch is None or not torch.is_supported:
        return wheel_dependencies()
    dependencies = [f"torch=={torch.distribution}", *RUN_TIME_DEPENDENCIES]
    triton = TRITON_OF_TORCH.get(release(torch.version))
    if not torch.brings_triton:
        dependencies.append(f"triton{f'=={triton}.*' if triton else ''}; {HAS_TRITON_WHEELS}")
    # The interpreter of Triton 3.6 fails with NumPy 2.4 in a loop over a run-time range.
    dependencies.append("numpy<2.4" if triton == "3.6" else "numpy")
    toolkit = plan_cuda(torch, paths)
    if isinstance(toolkit, CudaToolkit) and toolkit.packaged:
        dependencies += _compiler_requirements(torch)
    return dependencies


def dependencies() -> list[str]:
    """The dependencies to write into the package's metadata."""
    return editable_dependencies() if os.environ.get(EDITABLE) else wheel_dependencies()
