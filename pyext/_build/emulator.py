"""Compiles the CUDA kernels for the emulator, when they are first needed and whenever they changed.

About 20 s on two cores, which is why `pip install` leaves it out. Objects and the library stay in
the ignored folder build/emulator, and only what changed is compiled again.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pyext._build import toolchain
from pyext._build.toolchain import BuildError, Torch

LIBRARY = "_C_emulated.so"


def why_not(root: Path) -> str | None:
    """What building the sources under ``root`` lacks, in a sentence; None if it can be tried."""
    if not (root / "csrc" / "emulator").is_dir():
        return "its sources are not there: it is compiled from a clone of the repository"
    if shutil.which(_compiler()[0]) is None:
        return f"it needs a C++ compiler, and {_compiler()[0]!r} is not there; CXX names another"
    if _ninja() is None:
        return "it needs ninja; `pip install ninja`"
    return None


def build(root: Path, torch: Torch) -> Path:
    """Brings the library of emulated kernels up to date and returns its path.

    Args:
        root: the repository, or a copy of its ``csrc`` folder's parent. A copy that includes
            ``build/emulator`` compiles only what differs from the original.
        torch: the PyTorch that will load it.

    Raises:
        BuildError: something is missing, or a source does not compile; the message says what.
    """
    if reason := why_not(root):
        raise BuildError(f"the emulator cannot be built: {reason}.")
    # Relative, so that the build files are good in a copy of the folder as well.
    folder = Path("build", "emulator", f"torch-{torch.version}")
    try:
        (root / folder).mkdir(parents=True, exist_ok=True)
        with open(root / folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait
            return _build_locked(root, folder, torch)
    except OSError as error:
        raise BuildError(f"the emulator cannot be built: {error}.") from error


def _build_locked(root: Path, folder: Path, torch: Torch) -> Path:
    library = folder / LIBRARY
    plan = "\n".join(_plan(root, folder, torch)) + "\n"
    file = root / folder / "build.ninja"
    if not file.exists() or file.read_text() != plan:
        file.write_text(plan)
    if not (root / library).exists():
        print("pyext: compiling the CUDA kernels for the emulator, once (20 s)", file=sys.stderr)
    command = [_ninja(), "-f", str(folder / "build.ninja"), str(library)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        output = done.stdout + done.stderr
        (root / folder / "log").write_text(output)
        errors = (line for line in output.splitlines() if "error" in line.lower())
        raise BuildError(
            f"the CUDA kernels do not compile for the emulator: {next(errors, 'ninja failed')} "
            f"(all of it is in {root / folder / 'log'})"
        )
    return root / library


def _plan(root: Path, folder: Path, torch: Torch) -> Iterator[str]:
    """The lines of a build.ninja, with the sources that the folders hold now."""
    compiler = shlex.join(_compiler())
    include = f"-isystem {shlex.quote(f'{torch.folder}/include')} -Icsrc/emulator/include"
    yield "ninja_required_version = 1.5"
    yield f"builddir = {_escape(folder)}"
    for rule, flags in (
        ("emulator", toolchain.EMULATOR_FLAGS),
        ("kernels", (*toolchain.EMULATED_KERNEL_FLAGS, "-x", "c++")),
    ):
        yield f"rule {rule}"
        yield (
            f"  command = {compiler} -MMD -MF $out.d -fPIC {shlex.join(flags)} {include} "
            "-c $in -o $out"
        )
        yield "  depfile = $out.d"
        yield "  deps = gcc"
    yield "rule link"
    yield (
        f"  command = {compiler} -shared -Wl,-z,defs -o $out $in "
        f"-L{shlex.quote(f'{torch.folder}/lib')} -ltorch_cpu -lc10 -ldl"
    )
    objects = []
    for rule, pattern in (("emulator", "csrc/emulator/*.cpp"), ("kernels", "csrc/cuda/*.cu")):
        for source in sorted(path.relative_to(root) for path in root.glob(pattern)):
            objects.append(_escape(folder / f"{source.name}.o"))
            yield f"build {objects[-1]}: {rule} {_escape(source)}"
    yield f"build {_escape(folder / LIBRARY)}: link {' '.join(objects)}"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _ninja() -> str | None:
    """ninja on the PATH, or beside this Python, where an environment was not activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
