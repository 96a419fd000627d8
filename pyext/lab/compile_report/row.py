"""One row of the compile report, and how it is held to the kernel's limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pyext.lab.compile_report.machine_code import MachineCode, capability
from pyext.lab.compile_report.occupancy import occupancy


@dataclass(frozen=True)
class Row:
    """A kernel's instantiation on one architecture; ``docs/compile-report.md`` has the fields."""

    kernel: str
    language: str
    instantiation: str
    arch: str
    threads_per_block: int | None
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int | None
    tensor_memory_columns: int
    blocks_per_sm: int | None
    occupancy: float | None
    limited_by: str | None
    code_bytes: int
    widest_load_bytes: int | None
    widest_store_bytes: int | None
    matrix_instructions: list[str]
    instruction_counts: dict[str, int]
    limits: dict[str, int] | None
    violations: list[str]
    example: str | None

    def to_json(self) -> dict[str, Any]:
        """The row as the JSON file has it."""
        return asdict(self)


def make_row(
    kernel: str,
    language: str,
    instantiation: str,
    arch: str,
    code: MachineCode,
    *,
    threads: int | None,
    dynamic_shared_bytes: int | None,
    limits: dict[str, int] | None,
    tensor_memory_columns: int = 0,
    example: str | None = None,
) -> Row:
    """A row from a kernel's machine code and what its source says of it.

    Args:
        threads, dynamic_shared_bytes: of a launch; None where no source says it.
        limits: the kernel's, by the names ``registers``, ``spill_bytes``, ``shared_bytes``,
            ``load_bytes`` and ``store_bytes``; None if it states none.
        example: a call that launches this instantiation.
    """
    room = None
    if threads is not None and dynamic_shared_bytes is not None:
        shared = code.shared_bytes + dynamic_shared_bytes
        room = occupancy(capability(arch), threads, code.registers, shared, tensor_memory_columns)
    return Row(
        kernel=kernel,
        language=language,
        instantiation=instantiation,
        arch=arch,
        threads_per_block=threads,
        registers=code.registers,
        spill_bytes=code.local_bytes,
        static_shared_bytes=code.shared_bytes,
        dynamic_shared_bytes=dynamic_shared_bytes,
        tensor_memory_columns=tensor_memory_columns,
        blocks_per_sm=room and room.blocks,
        occupancy=room and room.occupancy,
        limited_by=room and room.limited_by,
        code_bytes=code.code_bytes,
        widest_load_bytes=code.widest_load_bytes,
        widest_store_bytes=code.widest_store_bytes,
        matrix_instructions=list(code.matrix_instructions),
        instruction_counts=code.counted_instructions,
        limits=limits,
        violations=violations(code, dynamic_shared_bytes, limits),
        example=example,
    )


def violations(
    code: MachineCode, dynamic_shared_bytes: int | None, limits: dict[str, int] | None
) -> list[str]:
    """What in a kernel's machine code is against its limits, one sentence each."""
    if limits is None:
        return ["states no limits"]
    shared_bytes = code.shared_bytes + (dynamic_shared_bytes or 0)
    most = (
        (code.registers, limits["registers"], "registers"),
        (code.local_bytes, limits["spill_bytes"], "bytes of local memory (spilled registers)"),
        (shared_bytes, limits["shared_bytes"], "bytes of shared memory"),
    )
    least = (
        (code.widest_load_bytes or 0, limits["load_bytes"], "bytes in the widest global load"),
        (code.widest_store_bytes or 0, limits["store_bytes"], "bytes in the widest global store"),
    )
    return [
        *(f"{value} {what}, at most {limit}" for value, limit, what in most if value > limit),
        *(f"{value} {what}, at least {limit}" for value, limit, what in least if value < limit),
    ]
