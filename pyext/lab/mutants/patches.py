"""A mutant: one file of the project with a bug in it, by hand (a patch) or made automatically."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = "tests/mutants"

Lines = tuple[str, ...]


class PatchError(ValueError):
    """A mutant does not fit the sources; the message says which part of it."""


@dataclass(frozen=True)
class Edit:
    """Replaces the lines ``old``, which begin at or near line ``line`` (from 0), by ``new``."""

    line: int
    old: Lines
    new: Lines

    def place(self, source: list[str]) -> int:
        """Where ``old`` begins in ``source``: the nearest place to ``line``.

        Raises:
            PatchError: it is nowhere.
        """
        length = len(self.old)
        found = [
            at
            for at in range(len(source) - length + 1)
            if tuple(source[at : at + length]) == self.old
        ]
        if not found:
            raise PatchError(f"these lines are not there any more:\n{''.join(self.old)}")
        return min(found, key=lambda at: abs(at - self.line))


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    description: str
    path: str
    """The file that it changes, relative to the project's root."""
    edits: tuple[Edit, ...]
    by_hand: bool = True

    @property
    def way(self) -> str:
        """Which half of the project it is in: ``cpp``, ``cuda``, ``triton`` or ``python``."""
        for folder, way in WAYS.items():
            if self.path.startswith(folder):
                return way
        raise PatchError(f"{self.name}: {self.path} is in none of {', '.join(WAYS)}")

    def apply(self, source: str) -> str:
        """``source`` with the bug in it.

        Raises:
            PatchError: an edit does not fit.
        """
        lines = source.splitlines(keepends=True)
        for edit in reversed(self.edits):
            at = edit.place(lines)
            lines[at : at + len(edit.old)] = edit.new
        return "".join(lines)


WAYS = {
    "csrc/cpu/": "cpp",
    "csrc/common/": "cpp",  # of both; the C++ tests are the faster ones
    "csrc/cuda/": "cuda",
    "kernels/": "triton",
    "pyext/": "python",
}


def read_all(root: Path) -> list[Mutant]:
    """The mutants made by hand, sorted by name: every patch of ``tests/mutants``."""
    return [read(path) for path in sorted((root / FOLDER).glob("*.patch"))]


def read(path: Path) -> Mutant:
    """A patch: one line that says what is wrong, then a unified diff of one file.

    Raises:
        PatchError: it is no such thing.
    """
    description, *lines = path.read_text().splitlines(keepends=True)
    targets = [line[6:].strip() for line in lines if line.startswith("+++ b/")]
    if len(targets) != 1:
        raise PatchError(f"{path.name} changes {len(targets)} files instead of one")
    starts = [i for i, line in enumerate(lines) if line.startswith("@@ ")]
    hunks = [lines[a:b] for a, b in itertools.pairwise([*starts, len(lines)])]
    edits = tuple(_edit(path, hunk) for hunk in hunks)
    if not edits or any(edit.old == edit.new for edit in edits):
        raise PatchError(f"{path.name} changes nothing")
    return Mutant(path.stem, description.strip(), targets[0], edits)


def _edit(path: Path, hunk: list[str]) -> Edit:
    header = re.match(r"@@ -(\d+)(,\d+)? \+\d+(,\d+)? @@", hunk[0])
    if header is None or not all(line[0] in " +-" for line in hunk[1:]):
        raise PatchError(f"{path.name}: {hunk[0].strip()!r} begins no hunk of a unified diff")
    return Edit(
        line=int(header[1]) - 1,
        old=tuple(line[1:] for line in hunk[1:] if line[0] in " -"),
        new=tuple(line[1:] for line in hunk[1:] if line[0] in " +"),
    )
