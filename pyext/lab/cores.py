"""Whether a fixed product takes longer now than it once did: a watch for disturbances.

A virtual machine's processors are threads of the host's, and the host moves them. While two of them
share a core, work that keeps a core busy takes twice its time, and work that waits for memory
hardly longer, so that even ratios of interleaved times are off. Nothing inside the machine says so
(steal time stays 0). So a product which has nothing to do with what is timed is timed in between.
(Seen on two processors of an AMD EPYC, by a scratch program: of 2451 products in a minute the
median took 1.2 times the least time, and a tenth 1.8 times or more, for up to 1.2 s on end.)
"""

from __future__ import annotations

import time

import torch

# 34 MFLOP in caches: 0.2 ms on two cores, of which little is overhead.
_SIZE = 256
DISTURBED = 1.3
"""How many times its least time the product takes at least when it counts as disturbed: above what
clocks vary by, below two threads on one core."""
# With more the product is so short that it times the threads' wake-up.
_MOST_THREADS = 8
_CALIBRATIONS = 50

_fastest_s: dict[int, float] = {}
"""Number of threads -> what the product takes at least."""


def known() -> dict[str, float]:
    """What this process has found out, for another one's :func:`learn`."""
    return {str(threads): seconds for threads, seconds in _fastest_s.items()}


def learn(of_another: dict[str, float]) -> None:
    """Takes over what another process on this machine has found out: it may have seen a better
    moment than this one's first."""
    for threads, seconds in of_another.items():
        _fastest_s[int(threads)] = min(seconds, _fastest_s.get(int(threads), seconds))


class CoreWatch:
    """Times the product with the threads that PyTorch has when it is made."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
        self._out = torch.empty(_SIZE, _SIZE)
        self._threads = torch.get_num_threads()
        for _ in range(_CALIBRATIONS):
            self._seconds()

    def slowdown(self) -> float:
        """How many times its least time so far the product takes now, in less than a millisecond;
        1 where there are too many threads to tell."""
        if self._threads > _MOST_THREADS:
            return 1.0
        return min(self._seconds() for _ in range(3)) / _fastest_s[self._threads]

    def _seconds(self) -> float:
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._out)
        seconds = time.perf_counter() - start
        _fastest_s[self._threads] = min(seconds, _fastest_s.get(self._threads, seconds))
        return seconds
