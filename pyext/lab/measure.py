"""Three clocks, interleaved timing and the statistics of a ratio.

What is timed is a list of subjects, the variants of one case. They take turns in blocks within one
run, so that drift (clock frequency, temperature, a busy neighbour) meets all of them alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyext.lab.cores import DISTURBED, CoreWatch

CLOCKS = {"cpu": ("host",), "cuda": ("device_cold", "device_warm", "host")}
"""Device type -> the clocks that exist there."""

# A batch this long makes the timer's resolution (about 50 ns on the host, 500 ns for events) a
# matter of parts in ten thousand.
_BATCH_S = 0.5e-3
# libgomp's workers spin up to about 5 ms after a parallel region; let them fall asleep, so that one
# variant's idle threads do not take the next one's cores.
_SETTLE_S = 5e-3
# A batch this long brings its own data back within its first part, and would take twice its time if
# it were also called once before it counts.
_LONG_S = 20e-3
_MIN_SAMPLES, _MAX_SAMPLES = 10, 120
# Something that takes seconds a call is worth three samples, not ten.
_PATIENCE_S = 3.0
_MAX_BATCH = 10_000
_RESAMPLES = 2000


@dataclass(frozen=True)
class Effort:
    """How long to measure, in seconds for each variant of a case."""

    warmup_s: float
    measure_s: float
    blocks: int = 10
    patience_s: float = 0.0
    """On a CPU: for how long, for all variants of a case together, disturbed blocks (``cores``) are
    taken anew."""


@dataclass
class Subject:
    """One variant of one case, ready to be timed."""

    name: str
    call: Callable[[], Any]
    """One call; all that it does is inside the clock."""
    prepare: Callable[[int], None] = lambda calls: None
    """Makes the next ``calls`` calls possible; outside the clock."""
    synchronize: Callable[[], None] = lambda: None
    """Waits until every call has finished; once per batch, inside the ``host`` clock."""
    max_batch: int = _MAX_BATCH
    """How many calls may follow one ``prepare``."""
    capturable: Callable[[], Callable[[], Any]] | None = None
    """Makes, on the stream that will capture it, a call that needs no ``prepare``; None where a
    CUDA graph cannot hold the variant."""
    why_not_capturable: str = "it cannot be captured in a CUDA graph"
    on_stream: bool = True
    """Whether the work runs on PyTorch's current CUDA stream, where events can time it."""


@dataclass(frozen=True)
class Samples:
    """Times of one call in seconds: ``seconds[block, sample]``, each the mean of a batch."""

    seconds: np.ndarray
    calls_per_sample: int
    disturbed_blocks: int = 0
    """How many of the blocks were kept, for want of time, although they were disturbed."""
    retaken_blocks: int = 0
    """How many others were disturbed, and are not among ``seconds``."""
    run: str | None = None
    """Equal where samples come from one call of :func:`measure`: their blocks are interleaved. None
    where that is not known; it equals nothing."""

    @property
    def median(self) -> float:
        """The median of all samples, in seconds."""
        return float(np.median(self.seconds))

    def quantile(self, q: float) -> float:
        """The ``q`` quantile of all samples, in seconds."""
        return float(np.quantile(self.seconds, q))

    def to_json(self) -> dict[str, Any]:
        """For another process; :meth:`from_json` reads it."""
        return {**vars(self), "seconds": self.seconds.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Samples:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "seconds": np.array(data["seconds"])})


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` than the baseline, or ``no difference`` where 1 is inside."""
        if self.low > 1:
            return "faster"
        if self.high < 1:
            return "slower"
        return "no difference"


def speedup(
    baseline: Samples, variant: Samples, *, paired: bool, seed: int, resamples: int = _RESAMPLES
) -> Ratio:
    """``baseline``'s time over ``variant``'s: above 1, the variant is the faster one.

    Paired, it is the median of what each block says by itself, so that a machine that is slower by
    the minute leaves no trace; else the ratio of the medians of all samples. Whole blocks are drawn
    with replacement, because samples within a block share their moment.

    Args:
        baseline: times of the reference.
        variant: times of the variant.
        paired: both were interleaved in one run, so that block i is the same moment in both.
        seed: of the bootstrap; equal seeds give equal intervals.
        resamples: how many times to draw.

    Raises:
        ValueError: ``paired``, and one has more blocks than the other.
    """
    generator = np.random.default_rng(seed)
    blocks, own = len(baseline.seconds), len(variant.seconds)
    draws = generator.integers(blocks, size=(resamples, blocks))
    if paired:
        if blocks != own:
            raise ValueError(f"paired samples need equally many blocks, got {blocks} and {own}")
        each = np.median(baseline.seconds, axis=1) / np.median(variant.seconds, axis=1)
        value, ratios = np.median(each), np.median(each[draws], axis=1)
    else:
        variant_draws = generator.integers(own, size=(resamples, own))
        value = baseline.median / variant.median
        ratios = _medians(baseline.seconds, draws) / _medians(variant.seconds, variant_draws)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(value), float(low), float(high))


def _medians(seconds: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The pooled median of each row of drawn blocks."""
    pooled = seconds[draws]
    return np.median(pooled.reshape(len(draws), -1), axis=1)


def measure(
    subjects: Sequence[Subject], clock: str, effort: Effort, *, device: torch.device, seed: int
) -> dict[str, Samples | str]:
    """Times all subjects, interleaved in blocks, by one clock.

    Args:
        subjects: what to time; names must differ.
        clock: ``"host"`` (end to end, as the caller waits), ``"device_cold"`` (a launch with
            nothing in the L2 cache) or ``"device_warm"`` (replayed from a CUDA graph).
        effort: how long.
        device: where the work is done.
        seed: of the order within each block.

    Returns:
        Name -> samples, or the reason why this clock cannot time the subject.
    """
    sample, results = _sampler(clock, subjects, device)
    ready = [subject for subject in subjects if subject.name not in results]
    watch = CoreWatch() if device.type == "cpu" else None
    with _no_garbage_collection():
        calls, batch_s = {}, {}
        for each in ready:
            calls[each.name], batch_s[each.name] = _warm_up(each, sample, effort.warmup_s)
        counts = {name: _sample_count(each, effort) for name, each in batch_s.items()}
        # Equally many blocks for all, so that blocks pair; the slow ones then have one sample each.
        blocks = min([effort.blocks, *counts.values()])
        seconds = {s.name: [] for s in ready}
        slowdowns, retaken = [], 0
        order = np.random.default_rng(seed)
        patience_s = effort.patience_s
        for _ in range(blocks):
            while True:
                start, slowdown, block = time.perf_counter(), 1.0, {}
                for index in order.permutation(len(ready)):
                    subject = ready[index]
                    n = calls[subject.name]
                    slowdown = max(slowdown, _settled(watch))
                    if batch_s[subject.name] < _LONG_S:
                        sample(subject, n)  # brings this one's data and threads back
                    repeats = max(1, counts[subject.name] // blocks)
                    block[subject.name] = [sample(subject, n) for _ in range(repeats)]
                slowdown = max(slowdown, _settled(watch))
                took_s = time.perf_counter() - start
                if slowdown <= DISTURBED or took_s > patience_s:
                    break
                patience_s -= took_s
                retaken += 1
            slowdowns.append(slowdown)
            for name, times in block.items():
                seconds[name].append(times)
    disturbed = sum(each > DISTURBED for each in slowdowns)
    run = uuid.uuid4().hex
    for name, each in seconds.items():
        batch = sample.batch(name, calls[name])
        results[name] = Samples(np.array(each), batch, disturbed, retaken, run)
    return results


def _settled(watch: CoreWatch | None) -> float:
    """Lets the threads of the previous subject, and the watch's own, fall asleep; the slowdown that
    the watch saw in between."""
    if watch is None:
        return 1.0
    time.sleep(_SETTLE_S)
    slowdown = watch.slowdown()
    time.sleep(_SETTLE_S)
    return slowdown


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(subject: Subject, sample: Callable, seconds: float) -> tuple[int, float]:
    """Runs for ``seconds`` at least and returns how many calls make a batch of ``_BATCH_S``, and
    how long a batch takes at its fastest."""
    calls, fastest = 1, math.inf
    end = time.perf_counter() + seconds
    while True:
        # The fastest so far: one interruption must not make the batches too short.
        fastest = min(fastest, sample(subject, calls))
        wanted = math.ceil(_BATCH_S / max(fastest, 1e-9))
        # At most fourfold at once: the first calls are slow and would mislead.
        calls = max(1, min(wanted, 4 * calls, subject.max_batch))
        if time.perf_counter() > end and calls >= min(wanted, subject.max_batch):
            return calls, calls * fastest


def _sample_count(batch_s: float, effort: Effort) -> int:
    batch_s = max(batch_s, 1e-9)
    least = min(_MIN_SAMPLES, max(3, int(_PATIENCE_S / batch_s)))
    return min(max(int(effort.measure_s / batch_s), least), _MAX_SAMPLES)


# --- clocks --------------------------------------------------------------------------------------


def _sampler(
    clock: str, subjects: Sequence[Subject], device: torch.device
) -> tuple[_Host | _DeviceCold | _DeviceWarm, dict[str, Samples | str]]:
    """``sample(subject, calls)`` -> seconds per call, and those that this clock cannot time."""
    if clock not in CLOCKS.get(device.type, ()):
        raise ValueError(f"clock {clock!r} does not exist on {device.type!r}")
    if clock == "host":
        return _Host(), {}
    foreign = "it does not run on PyTorch's CUDA stream, which this clock watches"
    unavailable: dict[str, Samples | str] = {s.name: foreign for s in subjects if not s.on_stream}
    if clock == "device_cold":
        return _DeviceCold(device), unavailable
    warm = _DeviceWarm(device)
    for subject in subjects:
        if subject.name not in unavailable and (reason := warm.capture(subject)):
            unavailable[subject.name] = reason
    return warm, unavailable


class _Host:
    """End to end, as a caller who waits for the result sees it."""

    def __call__(self, subject: Subject, calls: int) -> float:
        call = subject.call
        subject.prepare(calls)
        subject.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        subject.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / calls

    def batch(self, name: str, calls: int) -> int:
        """How many calls a sample really held when it was asked for ``calls``."""
        return calls


class _DeviceCold:
    """Device time of ordinary launches, each after the L2 cache was overwritten.

    The device first spins, so that the host has enqueued the whole call before the first event
    fires: what is timed is the device's work and not the host's.
    """

    def __init__(self, device: torch.device):
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, 2**26), dtype=torch.int8, device=device)
        self._spin_cycles: dict[str, int] = {}

    def __call__(self, subject: Subject, calls: int) -> float:
        if subject.name not in self._spin_cycles:
            self._spin_cycles[subject.name] = self._cycles(subject)
        calls = self.batch(subject.name, calls)
        pairs = []
        subject.prepare(calls)
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(self._spin_cycles[subject.name])
            start.record()
            subject.call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return float(np.median([start.elapsed_time(end) for start, end in pairs])) * 1e-3

    def batch(self, name: str, calls: int) -> int:
        """Each call flushes, so that a long batch would gain nothing."""
        return min(calls, 16)

    def _cycles(self, subject: Subject) -> int:
        """Spinning for twice the host's time at 2 GHz covers the enqueuing of one call."""
        subject.prepare(1)
        subject.call()
        torch.cuda.synchronize()
        subject.prepare(1)
        start = time.perf_counter()
        subject.call()
        return int(max(2 * (time.perf_counter() - start), 20e-6) * 2e9)


class _DeviceWarm:
    """Device time of a call replayed from a CUDA graph, many calls in a graph; L2 stays warm."""

    def __init__(self, device: torch.device):
        self._device = device
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}

    def capture(self, subject: Subject) -> str | None:
        """Records ``subject``'s graph; the reason if that is not possible."""
        if subject.capturable is None:
            return subject.why_not_capturable
        try:
            per_call = self._replay(self._record(subject, 1), 1)
            calls = max(1, min(math.ceil(_BATCH_S / max(per_call, 1e-7)), 256))
            self._graphs[subject.name] = self._record(subject, calls), calls
        except RuntimeError as error:
            torch.cuda.synchronize()
            return f"it cannot be captured in a CUDA graph ({str(error).splitlines()[0]})"
        return None

    def _record(self, subject: Subject, calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            call = subject.capturable()
            for _ in range(3):
                call()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def __call__(self, subject: Subject, calls: int) -> float:
        graph, captured = self._graphs[subject.name]
        return self._replay(graph, captured)

    def batch(self, name: str, calls: int) -> int:
        """The graph holds its own number."""
        return self._graphs[name][1]


# --- memory --------------------------------------------------------------------------------------

RECYCLED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
"""Environment variables that make glibc keep freed memory, for every variant of a process alike.

A large output is otherwise fresh pages from the kernel at every call, and on the CPU the page
faults cost several times the arithmetic (relu at 2^24: 19 ms fresh, 3 ms recycled, 2 x Zen 5).
With these, outputs lie in memory that is mapped already, as if preallocated. They hold for a whole
process: what is measured beside it must not have its memory handled otherwise than a user's.
"""
# Eight of the largest outputs that are timed (2^24 float32), for a call holds several at once.
_MAPPED_BYTES = 2**29


def map_memory() -> None:
    """Under ``RECYCLED_MEMORY``: gives the heap a stretch of mapped memory to hand out.

    A hole that one aligned block leaves is too small for the next of the same size (glibc asks for
    the alignment on top), so otherwise the first half dozen outputs are fresh pages after all.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if stretch := libc.malloc(_MAPPED_BYTES):
        ctypes.memset(stretch, 0, _MAPPED_BYTES)
        libc.free(stretch)


def can_recycle_memory() -> bool:
    """Whether this C library heeds ``RECYCLED_MEMORY`` (glibc)."""
    return platform.libc_ver()[0] == "glibc"
