"""What the build takes from an environment, what it asks for and what it refuses; compiles nothing.

tests/install/run.py tries the same for real, with pip and uv.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from pyext._build import toolchain

ROOT = Path(__file__).resolve().parents[1]
BUILD_FOLDER = ROOT / "pyext" / "_build"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the sources, and this is an installed package"
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No variable of the caller's shell, no toolkit of this machine: a Linux PC without CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "PYEXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_machine_toolkits", lambda cuda: [])
    monkeypatch.setattr(toolchain.platform, "system", lambda: "Linux")
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """An empty folder that stands for the target environment's packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(toolchain, "target_paths", lambda: [str(folder)])
    monkeypatch.setattr(toolchain, "search_paths", lambda: [str(folder)])
    return folder


def add_distribution(folder, name, version, requires=()):
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (information / "METADATA").write_text("\n".join(lines) + "\n")


def add_torch(folder, version, distribution=None, cuda=None, requires=()):
    """A PyTorch as its wheels lay it out, as far as the build looks at it."""
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(
        "from typing import Optional\n"
        f"__version__ = '{version}'\n"
        f"cuda: Optional[str] = {cuda!r}\n"
        "hip: Optional[str] = None\n"
    )
    add_distribution(folder, "torch", distribution or version, requires)


def add_toolkit(home, version, *, whole=True):
    """A CUDA toolkit whose nvcc only knows its version."""
    headers = ["cuda_runtime.h", "crt/host_defines.h"]
    headers += ["cublas_v2.h", "cusparse.h"] if whole else []
    for name in ("bin/nvcc", "lib/libcudart.so.13", *(f"include/{header}" for header in headers)):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V'\n"
        )
    (home / "bin/nvcc").chmod(0o755)
    return home


CUDA_TORCH = {
    "version": "2.11.0+cu130",
    "distribution": "2.11.0",
    "cuda": "13.0",
    "requires": (
        'cuda-toolkit[cublas,cudart]==13.0.2; platform_system == "Linux"',
        'triton==3.6.0; platform_system == "Linux"',
    ),
}
CUDA_13_0_COMPILER = {
    "cuda-toolkit[nvcc,cudart,cccl]==13.0.2",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
}


# `==`, which pip takes up first: otherwise the compiler's newest version may come first and fit no
# PyTorch with CUDA, and pip falls back to a CPU-only one.
TORCH = "torch>=2.11,<2.16,==2.*"


def test_a_bare_environment_gets_the_tested_versions(site_packages):
    assert set(toolchain.build_requirements()) == {
        TORCH,
        "ninja",
        "pybind11",
        "cuda-toolkit[nvcc,cudart,cccl]",  # the version comes from PyTorch, whichever is taken
    }


def test_an_existing_pytorch_is_not_asked_for_again(site_packages):
    add_torch(site_packages, **CUDA_TORCH)
    assert set(toolchain.build_requirements()) == {"ninja", "pybind11", *CUDA_13_0_COMPILER}


def test_nothing_is_asked_for_where_everything_is_there(site_packages):
    add_torch(site_packages, **CUDA_TORCH)
    add_toolkit(site_packages / "nvidia" / "cu13", "13.0", whole=False)
    add_distribution(site_packages, "ninja", "1.13")
    add_distribution(site_packages, "pybind11", "3.1")
    assert toolchain.build_requirements() == []


def test_an_older_pytorch_than_the_oldest_supported_counts_as_none(site_packages):
    add_torch(site_packages, "2.10.0+cu128", "2.10.0", "12.8")
    assert TORCH in toolchain.build_requirements()


@pytest.mark.parametrize("switch", ["auto", "0"])
def test_a_cpu_only_pytorch_needs_no_cuda_compiler(site_packages, monkeypatch, switch):
    monkeypatch.setenv("PYEXT_CUDA", switch)
    add_torch(site_packages, "2.13.0+cpu")
    assert set(toolchain.build_requirements()) == {"ninja", "pybind11"}


def test_the_switch_leaves_the_cuda_compiler_out(site_packages, monkeypatch):
    monkeypatch.setenv("PYEXT_CUDA", "0")
    assert set(toolchain.build_requirements()) == {TORCH, "ninja", "pybind11"}
    add_torch(site_packages, **CUDA_TORCH)
    found = toolchain.find_torch([str(site_packages)])
    assert toolchain.plan_cuda(found, [str(site_packages)]) == "PYEXT_CUDA=0"


def test_there_are_no_compiler_wheels_for_cuda_12(site_packages):
    add_torch(site_packages, "2.11.0+cu128", "2.11.0", "12.8")
    assert set(toolchain.build_requirements()) == {"ninja", "pybind11"}


def test_there_are_no_compiler_wheels_outside_linux(site_packages, monkeypatch):
    monkeypatch.setattr(toolchain.platform, "system", lambda: "Darwin")
    assert set(toolchain.build_requirements()) == {TORCH, "ninja", "pybind11"}


def test_an_editable_install_pins_a_cpu_only_pytorch_and_its_triton(site_packages):
    add_torch(site_packages, "2.13.0+cpu")
    dependencies = toolchain.editable_dependencies()
    assert "torch==2.13.0+cpu" in dependencies
    assert f"triton==3.7.*; {toolchain.HAS_TRITON_WHEELS}" in dependencies
    assert "numpy" in dependencies
    assert not [item for item in dependencies if item.startswith(("cuda", "nvidia"))]


def test_an_editable_install_pins_pytorch_by_its_package_and_keeps_the_compiler(site_packages):
    add_torch(site_packages, **CUDA_TORCH)
    add_toolkit(site_packages / "nvidia" / "cu13", "13.0", whole=False)
    dependencies = toolchain.editable_dependencies()
    assert "torch==2.11.0" in dependencies  # not 2.11.0+cu130, which pip would not find installed
    assert CUDA_13_0_COMPILER <= set(dependencies)
    assert not [item for item in dependencies if item.startswith("triton")]  # PyTorch's own pin
    assert "numpy<2.4" in dependencies  # for Triton 3.6


def test_an_editable_install_needs_no_compiler_package_beside_the_machines(
    site_packages, monkeypatch, tmp_path
):
    add_torch(site_packages, **CUDA_TORCH)
    home = add_toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setattr(toolchain, "_machine_toolkits", lambda cuda: [home])
    assert not [item for item in toolchain.editable_dependencies() if item.startswith("cuda")]
    assert set(toolchain.build_requirements()) == {"ninja", "pybind11"}


def test_a_wheel_runs_with_any_supported_pytorch_and_needs_no_compiler(site_packages, monkeypatch):
    add_torch(site_packages, **CUDA_TORCH)
    monkeypatch.delenv(toolchain.EDITABLE, raising=False)
    dependencies = toolchain.dependencies()
    assert "torch>=2.11" in dependencies
    assert not [item for item in dependencies if item.startswith(("cuda", "nvidia"))]
    monkeypatch.setenv(toolchain.EDITABLE, "1")
    assert "torch==2.11.0" in toolchain.dependencies()


def test_cuda_on_request_fails_loudly_with_a_cpu_only_pytorch(site_packages, monkeypatch):
    monkeypatch.setenv("PYEXT_CUDA", "1")
    add_torch(site_packages, "2.13.0+cpu")
    found = toolchain.find_torch([str(site_packages)])
    with pytest.raises(toolchain.BuildError, match="PYEXT_CUDA=1.*CPU-only"):
        toolchain.plan_cuda(found, [str(site_packages)])


def test_cuda_on_request_fails_loudly_without_a_compiler(site_packages, monkeypatch):
    monkeypatch.setenv("PYEXT_CUDA", "1")
    add_torch(site_packages, **CUDA_TORCH)
    found = toolchain.find_torch([str(site_packages)])
    with pytest.raises(toolchain.BuildError, match="PYEXT_CUDA=1.*no CUDA 13.0 compiler"):
        toolchain.plan_cuda(found, [str(site_packages)])


def test_the_switch_has_three_values(monkeypatch):
    monkeypatch.setenv("PYEXT_CUDA", "yes")
    with pytest.raises(toolchain.BuildError, match="'yes'; it must be auto, 1 or 0"):
        toolchain.cuda_switch()


def test_setup_says_in_a_sentence_that_cuda_was_asked_for_in_vain():
    refuse = "toolchain.find_cuda_toolkit = lambda cuda, paths: 'no compiler in this test'"
    finished = run_setup(refuse, PYEXT_CUDA="1")
    assert finished.returncode == 1
    assert finished.stderr.startswith("pyext: PYEXT_CUDA=1, but the CUDA kernels cannot be built")
    assert finished.stderr.count("\n") == 1


def run_setup(preparation="", **variables):
    """setup.py's in-place build, after some preparation; it must end before it compiles."""
    program = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(BUILD_FOLDER)!r})\n"
        f"import toolchain\n{preparation}\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**toolchain.os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_setup_says_in_a_sentence_that_there_is_no_compiler():
    finished = run_setup(CXX="no-such-compiler -O2")
    assert finished.returncode == 1
    assert finished.stderr.startswith("pyext: no C++ compiler was found (no-such-compiler).")
    assert finished.stderr.count("\n") == 1


def test_setup_says_in_a_sentence_that_the_sources_are_read_only():
    # Not by permissions: the superuser may write anywhere.
    refuse = (
        "import pathlib\n"
        "def mkdir(self, *a, **k): raise OSError(30, 'Read-only file system')\n"
        "pathlib.Path.mkdir = mkdir\n"
    )
    finished = run_setup(refuse, PYEXT_CUDA="0")
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("pyext: cannot write to ") and "(Read-only file system)" in last
    assert "Traceback" not in finished.stderr


def test_a_fragment_of_a_toolkit_on_the_machine_is_not_taken(monkeypatch, tmp_path):
    home = add_toolkit(tmp_path / "cuda-13.0", "13.0", whole=False)
    monkeypatch.setattr(toolchain, "_machine_toolkits", lambda cuda: [home])
    found = toolchain.find_cuda_toolkit("13.0", [])
    assert found == f"no CUDA 13.0 compiler was found ({home} lacks include/cublas_v2.h)"


def test_a_toolkit_of_another_version_on_the_machine_is_not_taken(monkeypatch, tmp_path):
    home = add_toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setattr(toolchain, "_machine_toolkits", lambda cuda: [home])
    found = toolchain.find_cuda_toolkit("13.2", [])
    assert found == f"no CUDA 13.2 compiler was found ({home} holds CUDA 13.0)"


@pytest.mark.parametrize("version", ["13.0.88", "13.4.1"])
def test_a_compiler_whose_parts_are_of_another_version_is_not_taken(site_packages, version):
    home = add_toolkit(site_packages / "nvidia" / "cu13", "13.0", whole=False)
    add_distribution(site_packages, "nvidia-cuda-crt", version)
    found = toolchain.find_cuda_toolkit("13.0", [str(site_packages)])
    if version.startswith("13.0."):
        assert found.home == home
    else:
        assert "nvidia-cuda-crt 13.4.1 does not fit nvcc 13.0" in found


def test_cuda_home_wins_if_its_major_version_fits(site_packages, monkeypatch, tmp_path):
    packaged = add_toolkit(site_packages / "nvidia" / "cu13", "13.2", whole=False)
    monkeypatch.setenv("CUDA_HOME", str(add_toolkit(tmp_path / "cuda", "13.0")))
    found = toolchain.find_cuda_toolkit("13.2", [str(site_packages)])
    assert (found.home, found.packaged) == (tmp_path / "cuda", False)

    monkeypatch.setenv("CUDA_HOME", str(add_toolkit(tmp_path / "old", "12.8")))
    found = toolchain.find_cuda_toolkit("13.2", [str(site_packages)])
    assert (found.home, found.packaged) == (packaged, True)
    assert found.runtime == packaged / "lib" / "libcudart.so.13"


def test_a_virtual_environment_may_see_its_base_packages(monkeypatch, tmp_path):
    base = tmp_path / "base"
    packages = base / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(base))
    monkeypatch.setattr(sys, "base_exec_prefix", str(base))
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    assert str(packages) not in toolchain.target_paths()
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    assert str(packages) in toolchain.target_paths()


def test_architectures_have_a_default_and_the_variable_wins(monkeypatch):
    assert toolchain.cuda_architectures("13.2") == "8.0 9.0 10.0+PTX"
    assert toolchain.cuda_architectures("12.6") == "8.0 9.0+PTX"  # its nvcc does not know 10.0
    codes = {"sm_80": 80, "sm_90": 90, "sm_100": 90, "compute_90": 90}
    flags = [f"-gencode=arch=compute_{ptx},code={code}" for code, ptx in codes.items()]
    assert toolchain.nvcc_flags("13.2") == [*toolchain.NVCC_FLAGS, *flags]
    assert toolchain.nvcc_flags("12.6") == [*toolchain.NVCC_FLAGS, *flags[:2], flags[3]]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert toolchain.cuda_architectures("13.2") == "9.0a"
    assert toolchain.nvcc_flags("13.2") == list(toolchain.NVCC_FLAGS)


@pytest.fixture
def build_modules(monkeypatch):
    """Imports a module as the build does: from its folder, not from the package."""
    monkeypatch.syspath_prepend(str(BUILD_FOLDER))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    for name in ("backend", "cmake", "toolchain"):
        sys.modules.pop(name, None)


def test_cmake_gets_the_same_architectures_in_its_own_words(build_modules):
    architectures = build_modules("cmake").architectures
    assert architectures("8.0 9.0 10.0+PTX") == ["80-real", "90-real", "100"]
    assert architectures("9.0a;12.0") == ["90a-real", "120-real"]


def test_cmake_gets_the_same_flags(build_modules, monkeypatch, site_packages):
    add_torch(site_packages, **CUDA_TORCH)
    home = add_toolkit(site_packages / "nvidia" / "cu13", "13.0", whole=False)
    cmake = build_modules("cmake")
    monkeypatch.setattr(cmake.toolchain, "search_paths", lambda: [str(site_packages)])
    settings = cmake.settings()
    assert settings["PYEXT_CXX_FLAGS"] == list(toolchain.CXX_FLAGS)
    assert settings["PYEXT_NVCC_FLAGS"] == toolchain.nvcc_flags("13.0")
    assert settings["PYEXT_CUDA_ARCHITECTURES"] == ["OFF"]  # the flags name them
    assert settings["PYEXT_NVCC"] == [f"{home}/bin/nvcc"]
    assert settings["PYEXT_TORCH_LIBRARIES"] == [f"{site_packages}/torch/lib"]


def test_the_backend_refuses_a_setuptools_that_is_too_old(build_modules, monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    with pytest.raises(SystemExit, match="needs setuptools 77.0.3 or newer, and this is 65.5.0"):
        build_modules("backend")


def test_the_backend_offers_every_hook(build_modules):
    backend = build_modules("backend")
    hooks = {"build_wheel", "build_sdist", "build_editable", "get_requires_for_build_editable"}
    assert hooks <= set(backend.__all__)
    assert all(callable(getattr(backend, name)) for name in backend.__all__)
