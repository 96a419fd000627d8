"""The machine's ceilings, measured in the same run as everything else, and the floors they give.

No data sheet is trusted. Each ceiling is the best of what PyTorch's library and kernels of our own
reach here; a floor is the time that a call needs at these ceilings: ``max(bytes / bandwidth,
flops / rate) + launch``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyext.backends import BACKENDS, backends
from pyext.lab import measure
from pyext.registry import Cost

# Far beyond any last-level cache: twice this much moves in one copy.
_COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
_MATRIX_SIZES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
# A product that already takes this long is not repeated at eight times the work. (float16 on a CPU
# without such instructions runs at a few GFLOP/s.)
_MATRIX_PATIENCE_S = {"cpu": 0.02, "cuda": 0.05}

# Twelve independent chains of one fused multiply-add per vector: enough to hide a latency of four
# or five cycles on two or three FMA units. GCC's vector types need no intrinsics.
_FMA_SOURCE = r"""
#define CHAINS 12
#define LANES (WIDTH / (int)sizeof(T))
typedef T vec __attribute__((vector_size(WIDTH)));

T fma_chains(long steps, T factor) {
  vec chain[CHAINS], a, b;
  for (int lane = 0; lane < LANES; ++lane) { a[lane] = factor; b[lane] = (T)1e-3; }
  for (int i = 0; i < CHAINS; ++i)
    for (int lane = 0; lane < LANES; ++lane) chain[i][lane] = (T)(i + lane);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) chain[i] = chain[i] * a + b;
  }
  T sum = 0;
  for (int i = 0; i < CHAINS; ++i)
    for (int lane = 0; lane < LANES; ++lane) sum += chain[i][lane];
  return sum;
}
"""
_FMA_CHAINS = 12
_FMA_STEPS = 500_000


@dataclass(frozen=True)
class Ceiling:
    """The best rate that was reached, and by what."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, as measured."""

    copy: Ceiling
    """Bytes read plus bytes written per second, far beyond the caches."""
    fma: dict[str, Ceiling]
    """dtype -> floating-point operations per second outside matrix units."""
    matrix: dict[str, Ceiling]
    """dtype -> floating-point operations per second of a matrix product."""
    launch: dict[str, Ceiling]
    """clock -> seconds of the cheapest call on one element."""

    def to_json(self) -> dict[str, Any]:
        """The ``ceilings`` object of a result file."""
        return asdict(self)

    def with_better(self, other: Ceilings) -> Ceilings:
        """The higher of both rates each, and the lower of both launches."""

        def higher(name: str) -> dict[str, Ceiling]:
            mine, others = getattr(self, name), getattr(other, name)
            return {key: max(mine[key], others[key], key=_value) for key in mine}

        return Ceilings(
            copy=max(self.copy, other.copy, key=_value),
            fma=higher("fma"),
            matrix=higher("matrix"),
            launch={
                clock: min(each, other.launch[clock], key=_value)
                for clock, each in self.launch.items()
            },
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ceilings:
        """The inverse of :meth:`to_json`."""
        return cls(
            copy=Ceiling(**data["copy"]),
            **{
                name: {key: Ceiling(**each) for key, each in data[name].items()}
                for name in ("fma", "matrix", "launch")
            },
        )


def _value(ceiling: Ceiling) -> float:
    return ceiling.value


def floor(cost: Cost, dtype: str, clock: str, ceilings: Ceilings) -> float:
    """The seconds that ``cost`` takes at the ceilings, plus one launch.

    Args:
        cost: what the call must move and do.
        dtype: such as ``"float32"``; picks the rate.
        clock: picks the launch.
        ceilings: as measured.
    """
    rates = ceilings.matrix if cost.unit == "matmul" else ceilings.fma
    # A product may also run on the FMA units, and where those are faster than any library's
    # product they are the ceiling.
    rate = max(table[dtype].value for table in (rates, ceilings.fma) if dtype in table)
    return max(cost.bytes / ceilings.copy.value, cost.flops / rate) + ceilings.launch[clock].value


def pct_of_floor(floor_s: float, median_s: float) -> float:
    """100 means as fast as the ceilings allow; more means cache-resident, or wrong."""
    return 100 * floor_s / median_s


def measure_ceilings(
    device: torch.device, dtypes: Sequence[torch.dtype], clocks: Sequence[str]
) -> Iterator[tuple[str, Ceilings | None]]:
    """Measures every ceiling, saying what it is at before each step.

    Args:
        device: CPU or CUDA.
        dtypes: the floating dtypes of the run.
        clocks: the clocks of the run.

    Yields:
        ``(what is measured next, None)``, and at last ``("done", ceilings)``.
    """
    yield "copy bandwidth", None
    copy = _copy(device)
    matrix, fma = {}, {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        yield f"matrix rate in {name}", None
        matrix[name] = _matrix(device, dtype)
        yield f"FMA rate in {name}", None
        fma[name] = _fma(device, dtype, matrix[name])
    yield "launch latency", None
    launch = {clock: _launch(device, clock) for clock in clocks}
    yield "done", Ceilings(copy, fma, matrix, launch)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def _best(candidates: dict[str, float], unit: str) -> Ceiling:
    source = max(candidates, key=candidates.__getitem__)
    return Ceiling(candidates[source], unit, source)


def _fastest(call: Callable[[], Any], device: torch.device, seconds: float = 0.25) -> float:
    """The least time of a call in seconds, in ``seconds`` or one call: what was reached once."""
    if device.type == "cuda":
        return _fastest_on_device(call, device, seconds)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _fastest_on_device(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
        for event in events[:-1]:
            event.record()
            call()
        events[-1].record()
        torch.cuda.synchronize(device)
        pairs = zip(events, events[1:], strict=False)
        best = min(best, *(start.elapsed_time(stop) * 1e-3 for start, stop in pairs))
    return best


def _copy(device: torch.device) -> Ceiling:
    """Large copies: the library's ``copy_``, and our ``relu``, which moves the same bytes."""
    size = _COPY_BYTES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = {"torch.Tensor.copy_": _fastest(lambda: target.copy_(source), device)}
    for name in backends(device):
        if name == "eager" or BACKENDS[name].unavailable(device, "relu"):
            continue
        raw = BACKENDS[name].raw
        seconds[f"relu_forward ({name})"] = _fastest(
            lambda raw=raw: raw.relu_forward(source), device
        )
    return _best({name: 2 * size / time for name, time in seconds.items()}, "B/s")


def _matrix(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """The best square product: the library's, and our two-layer network's pair of them."""
    products: dict[str, tuple[int, Callable[..., Any]]] = {
        "torch.mm": (1, lambda a, b, out: torch.mm(a, b, out=out))
    }
    for name in backends(device):
        if name == "eager" or BACKENDS[name].unavailable(device, "two_layer"):
            continue
        raw = BACKENDS[name].raw
        products[f"two_layer_forward ({name})"] = (
            2,
            lambda a, b, _, raw=raw: raw.two_layer_forward(a, b, b, None, None),
        )
    rates = {}
    for what, (count, product) in products.items():
        for n in _MATRIX_SIZES[device.type]:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = _fastest(partial(product, a, b, out), device, 0.15)
            rates[f"{what} {n}x{n}x{n}"] = count * 2 * n**3 / seconds
            if seconds > _MATRIX_PATIENCE_S[device.type]:
                break
    return _best(rates, "FLOP/s")


def _fma(device: torch.device, dtype: torch.dtype, matrix: Ceiling) -> Ceiling:
    """Chains of multiply-adds in registers; where none can be compiled, the product's rate.

    Low precision is computed in float32 (design: accumulation in at least float32), so its rate
    outside matrix units is float32's.
    """
    if device.type == "cuda":
        wide = dtype if dtype == torch.float64 else torch.float32
        product = matrix if wide == dtype else _matrix(device, wide)
        return Ceiling(product.value, product.unit, f"{product.source} in {dtype_name(wide)}")
    candidates = {}
    if dtype in (torch.float32, torch.float64):
        candidates[matrix.source] = matrix.value
    double = dtype == torch.float64
    if rate := _cpu_fma_rate("double" if double else "float", torch.get_num_threads()):
        candidates["chains of fused multiply-adds"] = rate
    if not candidates:
        wide = _matrix(device, torch.float32)
        candidates[f"{wide.source} in float32"] = wide.value
    return _best(candidates, "FLOP/s")


def _cpu_fma_rate(c_type: str, threads: int) -> float | None:
    """FLOP/s of register-resident FMA chains on ``threads`` threads; None without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    width = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "fma.c", Path(folder) / "fma.so"
        source.write_text(_FMA_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        defines = [f"-DT={c_type}", f"-DWIDTH={width}"]
        command = [*compiler.split(), *flags, *defines, str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            chains = ctypes.CDLL(str(library)).fma_chains
        except (OSError, subprocess.SubprocessError):
            return None
        scalar = ctypes.c_double if c_type == "double" else ctypes.c_float
        chains.argtypes, chains.restype = (ctypes.c_long, scalar), scalar
        seconds = min(_run_on_threads(chains, threads) for _ in range(8))
    lanes = width // ctypes.sizeof(scalar)
    return 2 * lanes * _FMA_CHAINS * _FMA_STEPS * threads / seconds


def _run_on_threads(chains: Callable, threads: int) -> float:
    """Seconds until all threads have done ``_FMA_STEPS`` (ctypes lets go of the interpreter)."""
    workers = [threading.Thread(target=chains, args=(_FMA_STEPS, 0.999)) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def _launch(device: torch.device, clock: str) -> Ceiling:
    """The cheapest call on one element: the library's in place, and our ``relu``."""
    element = torch.ones(1, device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def subject(name: str, call: Callable[[], Any]) -> measure.Subject:
        return measure.Subject(name, call, synchronize=synchronize, capturable=lambda: call)

    subjects = [subject("torch.Tensor.neg_", element.neg_)]
    for name in backends(device):
        if name == "eager" or BACKENDS[name].unavailable(device, "relu"):
            continue
        raw = BACKENDS[name].raw
        subjects.append(
            subject(f"relu_forward ({name})", lambda raw=raw: raw.relu_forward(element))
        )
    effort = measure.Effort(warmup_s=0.05, measure_s=0.05)
    if clock == "host":
        # One call and one wait, as for any other row of this clock.
        for each in subjects:
            each.max_batch = 1 if device.type == "cuda" else each.max_batch
    timed = measure.measure(subjects, clock, effort, device=device, seed=0)
    medians = {
        name: each.median for name, each in timed.items() if isinstance(each, measure.Samples)
    }
    source = min(medians, key=medians.__getitem__)
    return Ceiling(medians[source], "s", source)
