"""A scratch copy of the project, in which one mutant at a time is built."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pyext._build import toolchain
from pyext.lab.mutants.patches import Mutant
from pyext.lab.mutants.witness import sha256

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("csrc", "kernels", "pyext", "tests", "pyproject.toml")
"""What building and testing need."""


class BuildFailed(RuntimeError):
    """The compiler's or the linker's first complaint."""


@dataclass(frozen=True)
class Library:
    """How one library of ops is built; all paths are relative to the copy."""

    file: str
    sources: str
    flags: tuple[str, ...]


LIBRARIES = {
    "cpp": Library(
        "pyext/_C_cpu.so",
        "csrc/cpu/*.cpp",
        (*toolchain.CXX_FLAGS, "-g0", "-Icsrc/cpu"),
    ),
}
"""Way -> the library that its mutants are in."""


@dataclass
class Built:
    """A library as it was last linked."""

    sha256: str
    objects: dict[str, Path]
    dependencies: set[str]
    """Every file of the project that went into it."""


@dataclass
class Scratch:
    """A copy of the project's sources below ``folder``, and what was built there.

    The compiler runs in the copy with relative paths, so that a copy of the copy needs no rebuild.
    An object is named after a hash of what went into it: after a mutant, the originals are back.
    """

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
        original = path.read_bytes()
        path.write_bytes(mutant.apply(original.decode()).encode())
        try:
            yield
        finally:
            path.write_bytes(original)

    def library(self, name: str) -> str:
        """The file of a library, relative to the copy."""
        return LIBRARIES[name].file

    def build_all(self, names: Iterable[str]) -> None:
        """Brings these libraries up to date with the sources; raises ``BuildFailed``."""
        for name in names:
            self.build(name)

    def build(self, name: str) -> Built:
        """Brings a library up to date with the sources.

        Raises:
            BuildFailed: the sources do not compile.
        """
        library, last = LIBRARIES[name], self.built.get(name)
        sources = sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.glob(library.sources)
        )
        with ThreadPoolExecutor(self.jobs) as pool:
            compiled = list(pool.map(lambda source: self._compile(library, source), sources))
        objects = {source: path for source, (path, _) in zip(sources, compiled, strict=True)}
        if last is None or last.objects != objects:
            self._link(library, list(objects.values()))
            dependencies = set().union(*(found for _, found in compiled))
            file = self.folder / library.file
            self.built[name] = Built(sha256(file), objects, dependencies)
        return self.built[name]

    def _compile(self, library: Library, source: str) -> tuple[Path, set[str]]:
        """The object (relative) of a source and the files that it was made of."""
        folder = Path("build", Path(library.file).stem)
        (self.folder / folder).mkdir(parents=True, exist_ok=True)
        depfile = self.folder / folder / f"{Path(source).stem}.d"
        command = [*_compiler(), *library.flags, *_torch_includes(), "-fPIC", "-x", "c++"]
        if depfile.exists():  # an include is in no mutant, so the files are the same ones
            dependencies = _read_depfile(depfile)
        else:
            dependencies = self._dependencies([*command, "-MM", source], depfile)
        key = hashlib.sha256(shlex.join(command).encode())
        for each in sorted(dependencies):
            key.update(each.encode() + (self.folder / each).read_bytes())
        object_file = folder / f"{Path(source).stem}-{key.hexdigest()[:16]}.o"
        if not (self.folder / object_file).exists():
            self._run([*command, "-c", source, "-o", str(object_file)])
        return object_file, dependencies

    def _dependencies(self, command: list[str], depfile: Path) -> set[str]:
        self._run([*command, "-MF", str(depfile)])
        return _read_depfile(depfile)

    def _link(self, library: Library, objects: list[Path]) -> None:
        torch = toolchain.find_torch(toolchain.search_paths())
        new = f"{library.file}.new"
        folder = f"{torch.folder}/lib"
        self._run(
            [*_compiler(), "-shared", *map(str, objects), f"-L{folder}", f"-Wl,-rpath,{folder}"]
            + ["-lc10", "-ltorch", "-ltorch_cpu", "-o", new]
        )
        (self.folder / new).replace(self.folder / library.file)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise BuildFailed((errors or done.stderr.splitlines() or ["no message"])[0])


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def _torch_includes() -> list[str]:
    torch = toolchain.find_torch(toolchain.search_paths())
    return ["-isystem", f"{torch.folder}/include"]


def _read_depfile(path: Path) -> set[str]:
    """The project's files in a depfile: those with a relative path."""
    words = path.read_text().partition(":")[2].replace("\\\n", " ").split()
    return {os.path.normpath(word) for word in words if not os.path.isabs(word)}
