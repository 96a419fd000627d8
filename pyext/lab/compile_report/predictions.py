"""What a call should take on a GPU at best, from its cost and its launches; nothing is measured.

``max(bytes / bandwidth, flops / rate) + launches * launch``: the floor of a result file, but at
assumed ceilings, and with every launch of the call instead of one. What a kernel waits for within
itself (memory, other blocks) is left out, which is most of the time of a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyext import registry
from pyext.lab.compile_report.calls import Call
from pyext.lab.compile_report.row import Row


@dataclass(frozen=True)
class Gpu:
    """Assumed ceilings: what is reached in practice, not a data sheet's."""

    name: str
    arch: str
    multiprocessors: int
    copy_bytes_per_s: float
    """Read plus written, device memory."""
    fma_flops_per_s: float
    """float32, outside tensor cores; 16-bit operands are widened there."""
    tensor_core_flops_per_s: float
    """bfloat16 and float16."""
    launch_s: float
    """From one kernel's end to the next one's beginning, both queued."""


H200 = Gpu(
    name="H200",
    arch="sm_90",
    multiprocessors=132,
    copy_bytes_per_s=4.3e12,
    fma_flops_per_s=57e12,
    tensor_core_flops_per_s=790e12,
    launch_s=2e-6,
)
DTYPES = ("float32", "bfloat16")
"""Those that ``Gpu`` has a rate for."""

_TENSOR_CORES = {"HMMA", "WGMMA", "UTCHMMA"}
_ELEMENT = {
    ("cuda", "float32"): "float",
    ("cuda", "bfloat16"): "__nv_bfloat16",
    ("triton", "float32"): "fp32",
    ("triton", "bfloat16"): "bf16",
}
"""How the instantiation of a kernel for a dtype begins."""


@dataclass(frozen=True)
class Prediction:
    """One call's least time; ``docs/compile-report.md`` has the fields."""

    op: str
    direction: str
    shape: list[int]
    dtype: str
    language: str
    gpu: str
    kernels: dict[str, int]
    launches: int
    bytes: int
    flops: int
    unit: str
    bound: str
    predicted_us: float

    def to_json(self) -> dict[str, Any]:
        """The prediction as the JSON file has it."""
        return asdict(self)


def predict(call: Call, rows: Sequence[Row], gpu: Gpu = H200) -> Prediction:
    """The least time of ``call`` on ``gpu``.

    Args:
        call: its dtype is one of ``DTYPES``.
        rows: of the kernels' machine code, which says whether they use tensor cores.
    """
    cost = registry.get(call.op).cost(
        call.direction, tuple(call.shape), getattr(torch, call.dtype).itemsize
    )
    uses_tensor_cores = any(
        row.kernel in call.kernels
        and row.language == call.language
        and row.arch == gpu.arch
        and row.instantiation.startswith(_ELEMENT[call.language, call.dtype])
        and _TENSOR_CORES & set(row.matrix_instructions)
        for row in rows
    )
    rate = gpu.tensor_core_flops_per_s if uses_tensor_cores else gpu.fma_flops_per_s
    launches = sum(call.kernels.values())
    seconds = {
        "memory": cost.bytes / gpu.copy_bytes_per_s,
        "arithmetic": cost.flops / rate,
        "launches": launches * gpu.launch_s,
    }
    work = max(seconds["memory"], seconds["arithmetic"])
    return Prediction(
        op=call.op,
        direction=call.direction,
        shape=call.shape,
        dtype=call.dtype,
        language=call.language,
        gpu=gpu.name,
        kernels=call.kernels,
        launches=launches,
        bytes=cost.bytes,
        flops=cost.flops,
        unit="tensor cores" if uses_tensor_cores else "FMA",
        bound=max(seconds, key=seconds.get),
        predicted_us=round(1e6 * (work + seconds["launches"]), 2),
    )
