"""A scratch copy of the project, in which one mutant at a time is built."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pyext._build import emulator, toolchain
from pyext.lab.mutants.patches import Mutant
from pyext.lab.mutants.witness import sha256

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("csrc", "kernels", "pyext", "tests", "pyproject.toml")
"""What building and testing need."""


class BuildFailed(RuntimeError):
    """The compiler's or the linker's first complaint."""


@dataclass(frozen=True)
class Built:
    """A library as it was last built."""

    file: str
    """Relative to the copy."""
    sha256: str
    compiled: frozenset[str]
    """Every file of the project that went into objects which are newer than it."""


class Library(Protocol):
    """How one library of ops is built in a scratch copy."""

    def build(self, root: Path, jobs: int) -> Built:
        """Brings it up to date with the sources; raises ``BuildFailed``."""

    def restore(self, root: Path) -> None:
        """Called when a mutated source is as it was."""


@dataclass
class Scratch:
    """A copy of the project's sources below ``folder``, and what was built there."""

    folder: Path
    jobs: int = 1
    built: dict[str, Built] = field(default_factory=dict)

    @classmethod
    def of_project(cls, folder: Path, jobs: int) -> Scratch:
        """Copies the project to ``folder``, which must not exist."""
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.py[co]", ".*")
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=ignore)
            else:
                shutil.copy2(source, folder / part)
        # As an editable install maps it. Without the link a copy would import the original.
        (folder / "pyext" / "kernels").symlink_to("../kernels")
        return cls(folder, jobs)

    def clone(self, folder: Path) -> Scratch:
        """A second copy, with everything that was built in this one."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Scratch(folder, self.jobs, dict(self.built))

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Within the ``with`` block the mutant's file has the bug in it."""
        path = self.folder / mutant.path
        original, times = path.read_bytes(), path.stat()
        path.write_bytes(mutant.apply(original.decode()).encode())
        try:
            yield
        finally:
            path.write_bytes(original)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if mutant.way in self.built:
                LIBRARIES[mutant.way].restore(self.folder)

    def build(self, names: Iterable[str]) -> None:
        """Brings these libraries up to date with the sources.

        Raises:
            BuildFailed: the sources do not compile.
        """
        for name in names:
            self.built[name] = LIBRARIES[name].build(self.folder, self.jobs)


class CpuLibrary:
    """The C++ kernels, with the flags of setup.py but without its start-up time.

    The compiler runs in the copy with relative paths, and an object is named after a hash of all
    that went into it. So every copy, and the next run, finds what was compiled before.
    """

    OBJECTS = ROOT / "build" / "mutants"

    FILE = "pyext/_C_cpu.so"
    FLAGS = (*toolchain.CXX_FLAGS, "-g0", "-fPIC", "-Icsrc/cpu")

    def build(self, root: Path, jobs: int) -> Built:
        sources = sorted(path.relative_to(root).as_posix() for path in root.glob("csrc/cpu/*.cpp"))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda source: self._compile(root, source), sources))
        self._link(root, [name for name, _ in objects])
        files = frozenset().union(*(dependencies for _, dependencies in objects))
        return Built(self.FILE, sha256(root / self.FILE), files)

    def restore(self, root: Path) -> None:
        """Nothing to do: the next build finds the objects of the original."""

    def _compile(self, root: Path, source: str) -> tuple[str, frozenset[str]]:
        """The object of a source and the project's files that it was made of."""
        folder = Path("build", "cpu")
        (root / folder).mkdir(parents=True, exist_ok=True)
        depfile = folder / f"{Path(source).stem}.d"
        command = [*_compiler(), *self.FLAGS, "-isystem", f"{_torch().folder}/include"]
        if not (root / depfile).exists():  # no mutant changes an include
            _run([*command, "-MM", source, "-MF", str(depfile)], root)
        dependencies = _read_depfile(root / depfile)
        key = hashlib.sha256(shlex.join([*command, _compiler_version()]).encode())
        for each in sorted(dependencies):
            key.update(each.encode() + (root / each).read_bytes())
        self.OBJECTS.mkdir(parents=True, exist_ok=True)
        object_file = self.OBJECTS / f"{Path(source).stem}-{key.hexdigest()[:24]}.o"
        if not object_file.exists():
            new = object_file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            _run([*command, "-c", source, "-o", str(new)], root)
            new.replace(object_file)
        return str(object_file), dependencies

    def _link(self, root: Path, objects: list[str]) -> None:
        new, folder = f"{self.FILE}.new", f"{_torch().folder}/lib"
        libraries = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch", "-ltorch_cpu"]
        _run([*_compiler(), "-shared", *objects, *libraries, "-o", new], root)
        (root / new).replace(root / self.FILE)


class EmulatedLibrary:
    """The CUDA kernels in the emulator, built as the backend ``extension-emulated`` builds them.

    ninja goes by times, so the folder of the original's objects is kept and put back.
    """

    FOLDER, ORIGINAL = Path("build", "emulator"), Path("build", "emulator-original")

    def build(self, root: Path, jobs: int) -> Built:
        try:
            library = emulator.build(root, _torch())
        except toolchain.BuildError as error:
            raise BuildFailed(str(error)) from None
        if not (root / self.ORIGINAL).exists():
            shutil.copytree(root / self.FOLDER, root / self.ORIGINAL)
        built_at = max(path.stat().st_mtime_ns for path in library.parent.glob("*.o"))
        files = frozenset(
            path.relative_to(root).as_posix()
            for path in root.glob("csrc/**/*")
            if path.stat().st_mtime_ns < built_at
        )
        return Built(library.relative_to(root).as_posix(), sha256(library), files)

    def restore(self, root: Path) -> None:
        shutil.rmtree(root / self.FOLDER)
        shutil.copytree(root / self.ORIGINAL, root / self.FOLDER)


LIBRARIES: dict[str, Library] = {"cpp": CpuLibrary(), "cuda": EmulatedLibrary()}
"""Way -> the library that its mutants are in."""


def _run(command: list[str], root: Path) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise BuildFailed((errors or done.stderr.splitlines() or ["no message"])[0])


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


@functools.cache
def _compiler_version() -> str:
    return toolchain.output_of([*_compiler(), "--version"]) or ""


@functools.cache
def _torch() -> toolchain.Torch:
    found = toolchain.find_torch(toolchain.search_paths())
    assert found is not None
    return found


def _read_depfile(path: Path) -> frozenset[str]:
    """The project's files in a depfile: those with a relative path."""
    words = path.read_text().partition(":")[2].replace("\\\n", " ").split()
    return frozenset(os.path.normpath(word) for word in words if not os.path.isabs(word))
