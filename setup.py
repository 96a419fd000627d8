"""Builds the compiled half: a CPU library, a CUDA library and the introspection module.

Sources are taken by folder, so a new op needs no edit here. What is built with what is decided in
pyext/_build/toolchain.py; docs/build.md tells the story.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "pyext" / "_build"))

import toolchain  # noqa: E402
from toolchain import CudaToolkit, Torch  # noqa: E402

# Commands that compile nothing, for which PyTorch need not be there.
METADATA_COMMANDS = {"dist_info", "egg_info", "sdist"}


def sources(pattern: str) -> list[str]:
    """Paths relative to the root, as setuptools wants them.

    Those of the two-layer ops come first: they take longest, and of what starts last the end is
    waited for with cores idle.
    """
    return sorted((str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)), reverse=True)


def compiled_parts() -> tuple[list[Extension], dict[str, type]]:
    """The extension modules and the command that builds them."""
    paths = toolchain.search_paths()
    torch = toolchain.find_torch(paths)
    if torch is None or not torch.is_supported:
        found = f"PyTorch {torch.version}" if torch else "no PyTorch"
        raise toolchain.BuildError(
            f"building needs PyTorch {toolchain.OLDEST_TORCH} or newer, and there is {found}. "
            "Install one first, or leave out --no-build-isolation."
        )
    # At the end, so that the build environment's own packages win.
    sys.path += [path for path in paths if path not in sys.path]

    toolchain.check_cxx_compiler()
    toolkit, nvcc_flags = toolchain.plan_cuda(torch, paths), []
    if isinstance(toolkit, CudaToolkit):
        # torch.utils.cpp_extension reads both; the second where no option names an architecture.
        os.environ["CUDA_HOME"] = str(toolkit.home)
        nvcc_flags = toolchain.nvcc_flags(toolkit.version)
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolchain.cuda_architectures(toolkit.version)
    else:
        print(f"pyext: the CUDA kernels are left out: {toolkit}", file=sys.stderr)
    # For ninja, where the environment was not activated.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    folder = ROOT / "build" / "setuptools" / f"{sys.implementation.cache_tag}-torch-{torch.version}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise toolchain.BuildError(
            f"cannot write to {folder} ({error.strerror}): the build keeps its objects there. "
            "Build from a copy of the sources that you may write to."
        ) from None
    extensions = []
    if sources("csrc/cpu/*.cpp"):
        extensions.append(
            CppExtension(
                "pyext._C_cpu",
                sources("csrc/cpu/*.cpp"),
                include_dirs=[str(ROOT / "csrc" / "cpu")],
                # Python's own flags ask for debug information; CMake's build is there for that.
                extra_compile_args={"cxx": [*toolchain.CXX_FLAGS, "-g0"]},
                py_limited_api=True,
            )
        )
    if isinstance(toolkit, CudaToolkit) and sources("csrc/cuda/*.cu"):
        extensions.append(
            CUDAExtension(
                f"pyext._C_cuda{toolkit.version.partition('.')[0]}",
                sources("csrc/cuda/*.cu"),
                include_dirs=[
                    str(ROOT / "csrc" / "cuda"),
                    str(ROOT / "csrc" / "cuda" / "without_thrust"),
                ],
                extra_compile_args={"nvcc": nvcc_flags},
                library_dirs=[str(link_cuda_runtime(toolkit, folder))],
                py_limited_api=True,
            )
        )
    write_build_info(folder / "include" / "build_info.h", torch, toolkit, nvcc_flags)
    extensions.append(
        Extension(
            "pyext._introspect",
            sources("csrc/introspect.cpp"),
            include_dirs=[pybind11.get_include(), str(folder / "include")],
            extra_compile_args={"cxx": ["-std=c++20", "-O1", "-g0", "-fvisibility=hidden"]},
            language="c++",
        )
    )

    class BuildExtensions(BuildExtension):
        """Keeps objects in a fixed folder, so that a rebuild compiles only what changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(folder)

        def get_ext_filename(self, name: str) -> str:
            """The libraries of ops use no Python ABI, so their names carry none."""
            if name.rpartition(".")[2].startswith("_C_"):
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def run(self) -> None:
            super().run()
            if self.inplace:
                self.remove_stale_libraries()

        def remove_stale_libraries(self) -> None:
            """What lies beside the package is what was built last, and nothing older."""
            built = {Path(self.get_ext_filename(item.name)).name for item in self.extensions}
            for library in (ROOT / "pyext").glob("_C_*.so"):
                if library.name not in built:
                    library.unlink()

    return extensions, {"build_ext": BuildExtensions}


def link_cuda_runtime(toolkit: CudaToolkit, folder: Path) -> Path:
    """A folder with a libcudart.so: the package index has only one with a version in its name."""
    link = folder / "lib" / "libcudart.so"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(toolkit.runtime)
    return link.parent


def write_build_info(
    header: Path, torch: Torch, toolkit: CudaToolkit | str, nvcc_flags: list[str]
) -> None:
    """What `pyext._introspect` reports; written only where it changed, or it would recompile."""
    compiler = toolchain.cxx_compiler()
    version = toolchain.output_of([compiler, "--version"]) or compiler
    with_cuda = isinstance(toolkit, CudaToolkit)
    info = {
        "compiler": version.partition("\n")[0],
        "flags": " ".join(toolchain.CXX_FLAGS),
        "python": sys.version.split()[0],
        "torch": torch.version,
        "torch_cuda": torch.cuda,
        "torch_abi_target": toolchain.OLDEST_TORCH,
        "cuda": toolkit.version if with_cuda else None,
        "cuda_left_out": None if with_cuda else toolkit,
        "cuda_architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else None,
        "nvcc_flags": " ".join(nvcc_flags) if with_cuda else None,
    }
    text = f'constexpr char kBuildInfo[] = R"json({json.dumps(info, indent=1)})json";\n'
    header.parent.mkdir(exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


class CleanBuild(build):
    """Empties the folder that wheels are made from: an earlier build's files would be packaged."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


try:
    if METADATA_COMMANDS & set(sys.argv):
        extensions, commands = [], {}
    else:
        extensions, commands = compiled_parts()
except toolchain.BuildError as error:
    raise SystemExit(f"pyext: {error}") from None

setup(
    packages=[*find_packages(include=["pyext", "pyext.*"]), "pyext.kernels"],
    package_dir={"pyext": "pyext", "pyext.kernels": "kernels"},
    install_requires=toolchain.dependencies(),
    ext_modules=extensions,
    cmdclass={"build": CleanBuild, **commands},
)
