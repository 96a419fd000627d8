"""Reads machine code with cuobjdump: registers, local and shared memory, instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pyext.lab.compile_report.occupancy import RESERVED_SHARED_BYTES

INSTRUCTION_BYTES = 16  # from sm_70 on
LOADS = ("LDG", "LD", "LDGSTS")  # LDGSTS: cp.async, from global to shared memory
STORES = ("STG", "ST")
OTHER_MEMORY_INSTRUCTIONS = ("LDS", "LDSM", "STS", "STSM", "LDL", "STL", "LDTM", "STTM")
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

MATRIX_INSTRUCTION = re.compile(r"FFMA2?|DFMA|[HDIQO]MMA|[HIQB]GMMA|UTC\w*MMA")
WARPGROUP_INSTRUCTION = re.compile(r"[HIQB]GMMA")

_RESOURCES_OF = re.compile(r"\s*Function (\S+):$")
_CODE_OF = re.compile(r"\s*Function : (\S+)$")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass
class MachineCode:
    """One kernel's code for one architecture.

    registers: per thread; local_bytes: of local memory per thread (stack and local variables),
    which is where registers are spilled to; shared_bytes: static, without the system's part;
    instructions: how many of each, with their modifiers, such as ``LDG.E.128``.
    """

    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def code_bytes(self) -> int:
        """The size of the code, with the padding at its end."""
        return INSTRUCTION_BYTES * self.instructions.total()

    @property
    def widest_load_bytes(self) -> int | None:
        """Bytes per thread of the widest load from global memory; None if there is none."""
        return self._widest(LOADS)

    @property
    def widest_store_bytes(self) -> int | None:
        """Likewise of the widest store."""
        return self._widest(STORES)

    @property
    def matrix_instructions(self) -> dict[str, int]:
        """How many of each instruction that matrices are multiplied with, by base name.

        Names are those of the machine code, but for the warpgroup's (``HGMMA`` and its kin), which
        are ``WGMMA`` as in PTX.
        """
        found: Counter[str] = Counter()
        for name, count in self.instructions.items():
            base = name.partition(".")[0]
            if MATRIX_INSTRUCTION.fullmatch(base):
                found["WGMMA" if WARPGROUP_INSTRUCTION.fullmatch(base) else base] += count
        return dict(sorted(found.items()))

    @property
    def counted_instructions(self) -> dict[str, int]:
        """How many of each memory access, with its modifiers, and of each matrix instruction."""
        accesses = self._of((*LOADS, *STORES, *OTHER_MEMORY_INSTRUCTIONS))
        return dict(sorted(accesses.items())) | self.matrix_instructions

    def _widest(self, bases: tuple[str, ...]) -> int | None:
        return max(map(access_bytes, self._of(bases)), default=None)

    def _of(self, bases: tuple[str, ...]) -> dict[str, int]:
        named = self.instructions.items()
        return {name: count for name, count in named if name.partition(".")[0] in bases}


def access_bytes(name: str) -> int:
    """Bytes per thread of a memory access such as ``LDG.E.128``: 4 where no modifier says more."""
    sizes = (ACCESS_BYTES.get(modifier) for modifier in name.split(".")[1:])
    return next(filter(None, sizes), 4)


def find_cuobjdump(toolkit: Path | None = None) -> str | None:
    """NVIDIA's disassembler: the toolkit's, the one that Triton brings, or the one on the PATH."""
    candidates = [toolkit / "bin"] if toolkit else []
    if spec := importlib.util.find_spec("triton"):
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    for folder in candidates:
        if (folder / "cuobjdump").exists():
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def architectures(cuobjdump: str, library: Path) -> list[str]:
    """The architectures that a library holds machine code for, such as ``["sm_80", "sm_90"]``."""
    listed = _output([cuobjdump, "-lelf", str(library)])
    found = set(re.findall(r"\.(sm_\d+[a-z]?)\.cubin", listed))
    return sorted(found, key=lambda name: (capability(name), name))


def capability(architecture: str) -> int:
    """90 for ``sm_90`` and ``sm_90a``."""
    return int(re.fullmatch(r"sm_(\d+)[a-z]?", architecture)[1])


def read(cuobjdump: str, file: Path, architecture: str) -> dict[str, MachineCode]:
    """Mangled name -> machine code of every kernel in a library or cubin, in one pass.

    Raises:
        RuntimeError: cuobjdump fails; the message is its own.
    """
    command = [cuobjdump, "-res-usage", "-sass", "-arch", architecture, str(file)]
    kernels: dict[str, MachineCode] = {}
    current = MachineCode()
    for line in _lines(command):
        # Most lines by far are instructions, each with the bits of its encoding on a second line.
        if found := _INSTRUCTION.match(line):
            current.instructions[found[1]] += 1
        elif found := _CODE_OF.match(line) or _RESOURCES_OF.match(line):
            current = kernels.setdefault(found[1], MachineCode())
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            # From sm_90 on, a kernel with any shared memory has the system's part among its own.
            system = RESERVED_SHARED_BYTES if capability(architecture) >= 90 else 0
            current.registers = numbers["REG"]
            current.local_bytes = numbers["STACK"] + numbers["LOCAL"]
            current.shared_bytes = max(numbers["SHARED"] - system, 0)
    return kernels


def _output(command: list[str]) -> str:
    return "".join(_lines(command))


def _lines(command: list[str]) -> Iterator[str]:
    """What a command prints, line by line: a library's code is tens of megabytes of text."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            yield line
    if process.returncode != 0:
        raise RuntimeError(f"cuobjdump failed: {last}")
