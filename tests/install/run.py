"""Tries every way to install the package for real, each in a virtual environment of its own.

    python tests/install/run.py                 all of them
    python tests/install/run.py --only bare,uv  some of them
    python tests/install/run.py --list

Needs the package index and, at a time, about 12 GB of disk; takes some minutes for each situation.
Ends with a table. Exit code 0: all work; 1: one does not; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDER_TORCH = "2.11.0"  # the oldest that is supported, for the situations that must keep it
OLDER_TORCH_CUDA = "13.0"
CPU_TORCH = "2.13.0+cpu"
NOT_COPIED = (".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", "results", ".*_cache")
# What would change the outcome if it leaked in from the caller's shell.
HIDDEN_VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "PYEXT_CUDA",
    "PYTHONPATH",
    "TORCH_CUDA_ARCH_LIST",
    "VIRTUAL_ENV",
)
UV_OF_PIP = {
    "UV_INDEX_URL": "global.index-url",
    "UV_EXTRA_INDEX_URL": "global.extra-index-url",
    "UV_FIND_LINKS": "global.find-links",
    "SSL_CERT_FILE": "global.cert",
}


class Failed(Exception):
    """A situation does not work; the message says what differed."""


class Environment:
    """A fresh virtual environment with a fresh copy of the sources, in a folder that is deleted."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.sources = folder / "sources"
        self.python = folder / "venv" / "bin" / "python"
        shutil.copytree(ROOT, self.sources, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.run(sys.executable, "-m", "venv", folder / "venv")

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """Runs `command`, which must succeed, and returns what it printed."""
        environment = {k: v for k, v in os.environ.items() if k not in HIDDEN_VARIABLES}
        finished = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.sources,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{finished.stdout}\n")
        if finished.returncode != 0:
            tail = "\n".join(finished.stdout.splitlines()[-15:])
            raise Failed(
                f"exit code {finished.returncode} from {' '.join(map(str, command))}\n{tail}"
            )
        return finished.stdout

    def pip(self, *arguments: object, **variables: str) -> str:
        return self.run(self.python, "-m", "pip", *arguments, **variables)

    def uv(self, *arguments: object) -> str:
        """uv, looking where pip does: it does not read pip's configuration."""
        configuration = self.pip("config", "list")
        variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
        for name, option in UV_OF_PIP.items():
            if found := re.search(rf"(?m)^{option}='(.*)'$", configuration):
                variables[name] = found[1]
        return self.run(self.python.with_name("uv"), *arguments, **variables)

    def probe(self) -> dict:
        """What tests/install/probe.py says, from a folder where only the installation is found."""
        script = ROOT / "tests" / "install" / "probe.py"
        text = self.run(self.python, script, cwd=self.folder)
        found = json.loads(text.splitlines()[-1])
        expect("relu", found["relu"], [0.0, 0.0, 2.0])
        expect("extension is available", "extension" in found["backends"], True)
        return found


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r} instead of {wanted!r}")


def expect_cuda(found: dict) -> None:
    """The CUDA kernels were built, with a compiler that fits PyTorch and for the default GPUs."""
    major = found["torch_cuda"].partition(".")[0]
    expect("CUDA library", f"_C_cuda{major}.so" in found["libraries"], True)
    expect("CUDA compiler", found["build"]["cuda"], found["torch_cuda"])
    expect("architectures", found["build"]["cuda_architectures"], "8.0 9.0 10.0+PTX")


def expect_no_cuda(found: dict, reason: str) -> None:
    cuda = [name for name in found["libraries"] if name.startswith("_C_cuda")]
    expect("CUDA libraries", cuda, [])
    if reason not in found["build"]["cuda_left_out"]:
        raise Failed(f"the reason {found['build']['cuda_left_out']!r} does not name {reason!r}")


def expect_incremental(environment: Environment) -> None:
    """Once installed, a second build with nothing changed compiles nothing."""
    command = ("install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")
    environment.pip(*command)
    compiled = re.findall(r"^.*(?: -c .*\.cpp|nvcc .*\.cu) .*$", environment.pip(*command), re.M)
    expect("compilations in a rebuild with nothing changed", len(compiled), 0)


def bare(environment: Environment) -> str:
    """(a) (d) (e) an empty environment, no CUDA toolkit, no GPU and no architecture list"""
    environment.pip("install", "-e", ".")
    found = environment.probe()
    expect_cuda(found)
    environment.pip("check")
    nvcc = environment.folder.glob("venv/lib/*/site-packages/nvidia/cu*/bin/nvcc")
    expect("the compiler stays installed", len(list(nvcc)), 1)
    expect_incremental(environment)
    return describe(found)


def existing(environment: Environment) -> str:
    """(b) a PyTorch is there: it is built against, and stays"""
    environment.pip("install", f"torch=={OLDER_TORCH}")
    output = environment.pip("install", "-e", ".")
    expect("PyTorch was fetched again", bool(re.search(r"(?m)Downloading torch-", output)), False)
    found = environment.probe()
    expect("PyTorch", found["torch"], OLDER_TORCH)
    expect_cuda(found)
    environment.pip("check")
    return describe(found)


def offline(environment: Environment) -> str:
    """(c) no index at all, everything needed is there"""
    environment.pip(
        "install", f"torch=={CPU_TORCH}", "setuptools>=77.0.3,<82", "ninja", "pybind11", "numpy"
    )
    unreachable = "http://127.0.0.1:9"
    environment.pip(
        *("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."),
        HTTP_PROXY=unreachable,
        HTTPS_PROXY=unreachable,
    )
    found = environment.probe()
    expect_incremental(environment)
    return describe(found)


def cpu_only(environment: Environment) -> str:
    """(f) a CPU-only PyTorch: C++ kernels only, and it says so; PYEXT_CUDA=1 is refused"""
    environment.pip("install", f"torch=={CPU_TORCH}")
    environment.pip("install", "-e", ".")
    found = environment.probe()
    expect("PyTorch", found["torch"], CPU_TORCH)
    expect_no_cuda(found, "CPU-only")
    environment.pip("check")
    try:
        environment.pip("install", "-e", ".", PYEXT_CUDA="1")
    except Failed as error:
        if "PYEXT_CUDA=1" not in str(error):
            raise
    else:
        raise Failed("PYEXT_CUDA=1 did not fail")
    return describe(found)


def uv(environment: Environment) -> str:
    """(g) uv, with the constraint that keeps the CPU-only PyTorch that is there"""
    environment.pip("install", "uv")
    install = ("pip", "install", "--python", environment.python)
    environment.uv(*install, f"torch=={CPU_TORCH}")
    constraint = environment.folder / "torch.txt"
    constraint.write_text(f"torch=={CPU_TORCH}\n")
    environment.uv(*install, "--build-constraints", constraint, "-e", ".")
    found = environment.probe()
    expect("PyTorch", found["torch"], CPU_TORCH)
    return describe(found)


def uv_existing(environment: Environment) -> str:
    """(g) uv, likewise with an older CUDA build, whose compiler needs its parts named too"""
    environment.pip("install", "uv")
    install = ("pip", "install", "--python", environment.python)
    environment.uv(*install, f"torch=={OLDER_TORCH}")
    constraint = environment.folder / "torch.txt"
    parts = (f"{part}=={OLDER_TORCH_CUDA}.*" for part in ("nvidia-nvvm", "nvidia-cuda-crt"))
    constraint.write_text("\n".join((f"torch=={OLDER_TORCH}", *parts)) + "\n")
    environment.uv(*install, "--build-constraints", constraint, "-e", ".")
    found = environment.probe()
    expect("PyTorch", found["torch"], OLDER_TORCH)
    expect_cuda(found)
    return describe(found)


def uv_bare(environment: Environment) -> str:
    """(g) uv in an empty environment"""
    environment.pip("install", "uv")
    environment.uv("pip", "install", "--python", environment.python, "-e", ".")
    found = environment.probe()
    expect_cuda(found)
    return describe(found)


def system_packages(environment: Environment) -> str:
    """(b) a virtual environment that sees a base environment's PyTorch"""
    base = environment.folder / "base"
    # A relocated interpreter stands in for a system Python with PyTorch, as in many images.
    shutil.copytree(sys.base_prefix, base, symlinks=True)
    python = base / "bin" / Path(sys.executable).resolve().name
    environment.run(python, "-m", "pip", "install", f"torch=={CPU_TORCH}")
    shutil.rmtree(environment.folder / "venv")
    environment.run(python, "-m", "venv", "--system-site-packages", environment.folder / "venv")
    environment.pip("install", "-e", ".")
    found = environment.probe()
    expect("PyTorch", found["torch"], CPU_TORCH)
    copies = list(environment.folder.glob("venv/lib/*/site-packages/torch"))
    expect("second copies of PyTorch", copies, [])
    return describe(found)


def distributions(environment: Environment) -> str:
    """sdist and wheel: the sdist installs by itself, the wheel without a compiler"""
    environment.pip("install", f"torch=={CPU_TORCH}", "build")
    environment.run(environment.python, "-m", "build", "--sdist", "--outdir", "dist")
    (sdist,) = (environment.sources / "dist").glob("*.tar.gz")
    environment.pip("wheel", "--no-deps", "--wheel-dir", "dist", sdist)
    (wheel,) = (environment.sources / "dist").glob("*.whl")
    environment.pip("install", sdist)
    environment.probe()
    environment.pip("uninstall", "-y", "pyext-lab")
    environment.pip("install", wheel, PATH=str(environment.python.parent))
    return describe(environment.probe())


SITUATIONS: dict[str, Callable[[Environment], str]] = {
    situation.__name__.replace("_", "-"): situation
    for situation in (
        bare,
        existing,
        offline,
        cpu_only,
        uv,
        uv_existing,
        uv_bare,
        system_packages,
        distributions,
    )
}


def describe(found: dict) -> str:
    cuda = found["build"]["cuda"]
    return f"PyTorch {found['build']['torch']}, CUDA kernels {f'by nvcc {cuda}' if cuda else 'no'}"


def attempt(name: str, log: Path) -> tuple[str, float, str]:
    """Tries one situation: "works" or "FAILS", the seconds it took, and a detail."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"pyext-install-{name}-") as folder:
        try:
            detail = SITUATIONS[name](Environment(Path(folder), log))
            outcome = "works"
        except Failed as error:
            outcome, detail = "FAILS", str(error)
    return outcome, time.monotonic() - start, detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(SITUATIONS), help="names, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the situations and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for name, situation in SITUATIONS.items():
            print(f"{name:17} {situation.__doc__}")
        return 0
    names = arguments.only.split(",")
    unknown = sorted(set(names) - set(SITUATIONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SITUATIONS)}")

    log = Path(tempfile.mkdtemp(prefix="pyext-install-log-")) / "log.txt"
    print(f"The commands' output is in {log}", flush=True)
    rows = []
    for name in names:
        print(f"{name}: {SITUATIONS[name].__doc__} ...", flush=True)
        outcome, seconds, detail = attempt(name, log)
        print(f"  {outcome} after {seconds:.0f} s: {detail}", flush=True)
        rows.append((name, outcome, f"{seconds:.0f} s", detail.partition("\n")[0]))

    print()
    for row in [("situation", "outcome", "time", "detail"), *rows]:
        print(f"{row[0]:17} {row[1]:8} {row[2]:>7}  {row[3]}")
    return 1 if any(row[1] == "FAILS" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
