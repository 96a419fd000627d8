"""What a result file must say about where it was measured: hardware, versions, commit, flags.

Nothing here identifies a person or a machine: no host names, no paths.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("numpy", "triton", "jax", "jaxlib", "torchvision", "scikit-learn", "matplotlib")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "KMP_BLOCKTIME",
    "ATEN_CPU_CAPABILITY",
    "MALLOC_MMAP_THRESHOLD_",
    "GLIBC_TUNABLES",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING",
    "TRITON_INTERPRET",
    "PYEXT_TUNED",
)
"""Environment variables that change timings and whose values name no path."""


def describe(device: torch.device | str, seed: int, command: str = "") -> dict[str, Any]:
    """The whole environment of a run, ready for JSON.

    Args:
        device: where the run's tensors are.
        seed: the run's seed.
        command: the command line that started the run.

    Returns:
        The ``environment`` object of a result file; ``docs/results.md`` lists its fields.
    """
    device = torch.device(device)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "command": command,
        "cpu": _cpu(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "versions": _versions(),
        "commit": _commit(),
        "flags": _flags(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "seed": seed,
    }


def device_name(device: torch.device | str) -> str:
    """The marketing name of the processor that does the work, such as ``AMD EPYC 9454P``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def tuned_products(device: torch.device | str) -> int | None:
    """How many Triton products have tiles of their own there (``python -m pyext.lab tune``); None
    where there is no Triton."""
    from pyext.backends import BACKENDS  # here, so that a broken extension cannot break the import

    if BACKENDS["triton"].unavailable(device):
        return None
    from pyext.kernels import _tuned

    return _tuned.count(torch.device(device))


def slug(name: str) -> str:
    """``name`` in lower case with everything but letters and digits replaced by single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def use_full_precision() -> None:
    """Turns TF32 off for products and convolutions, so that float32 means float32 everywhere."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _cpu_info() -> dict[str, str]:
    """The first processor's entry in ``/proc/cpuinfo``; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    entry = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in entry.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu() -> dict[str, Any]:
    info = _cpu_info()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [info.get(k) for k in ("cpu family", "model", "stepping")],
        "architecture": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": _usable_cpus(),
        "clock_mhz_at_start": _float(info.get("cpu MHz")),
        "clock_max_mhz": _max_clock_mhz(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "virtualised": "hypervisor" in info.get("flags", "").split() if info else None,
    }


def _usable_cpus() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _caches() -> dict[str, str]:
    """Level and type -> size as the kernel prints it, for the first processor."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and kind and size:
            caches[f"L{level} {kind.lower()}"] = size
    return caches


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _max_clock_mhz() -> float | None:
    kilohertz = _float(_read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"))
    return None if kilohertz is None else kilohertz / 1000


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
        "tuned_products": tuned_products(device),
        **_nvidia_smi(device),
    }


def _nvidia_smi(device: torch.device) -> dict[str, str | None]:
    """Driver, clocks and limits as the driver's own tool reports them; None where it does not."""
    names = {
        "driver": "driver_version",
        "clock_sm_mhz": "clocks.sm",
        "clock_sm_max_mhz": "clocks.max.sm",
        "clock_memory_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
        "persistence_mode": "persistence_mode",
    }
    identifier = str(torch.cuda.get_device_properties(device).uuid)
    command = [
        "nvidia-smi",
        f"--id=GPU-{identifier.removeprefix('GPU-')}",
        f"--query-gpu={','.join(names.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names)
    return dict(zip(names, (each.strip() for each in done.stdout.split(",")), strict=False))


def _versions() -> dict[str, str | None]:
    from pyext.backends import BACKENDS  # here, so that a broken extension cannot break the import

    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "libc": " ".join(platform.libc_ver()) or None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "pyext-lab": _version("pyext-lab"),
        **{name: _version(name) for name in _PACKAGES},
    }
    versions["extension"] = "built" if BACKENDS["extension"].unavailable("cpu") is None else None
    return versions


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checked-out commit and whether anything differs from it; both None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"hash": None, "dirty": None}
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    return {"hash": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _flags() -> dict[str, Any]:
    return {
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "mkl": torch.backends.mkl.is_available(),
        "flush_denormal": _flushes_denormals(),
    }


def _flushes_denormals() -> bool:
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return bool(smallest / 2 == 0)


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _float(text: str | None) -> float | None:
    return None if text is None else float(text)
