"""The table of ``run.py`` under pytest-benchmark: ``pytest benchmarks``.

Same cases, same variants, same check before and after; what differs is the clock, which is
pytest-benchmark's. So ``--benchmark-save`` and ``--benchmark-compare`` work across commits. The
smallest shape of each op unless ``--all-shapes`` is given; ``--peers`` picks the peers.
"""

from __future__ import annotations

import time

import pytest

from pyext.lab.cases import Case, Inputs, Variant
from pyext.lab.measure import Subject
from pyext.lab.peers import Peers
from pyext.lab.timing import build

_ROUND_S = 0.5e-3
_ROUNDS = 40


@pytest.fixture(scope="module")
def peers() -> Peers:
    """Keeps what was compiled while cases of one op and shape follow one another."""
    return Peers()


def test_speed(case: Case, variant_name: str, inputs: Inputs, peers: Peers, benchmark) -> None:
    variant = build(variant_name, inputs, case, peers)
    if not isinstance(variant, Variant):
        pytest.skip(variant.reason if variant else f"{variant_name} has no {case.direction}")
    before = variant.verify(inputs)
    assert before, before.detail
    subject = variant.subject

    def call() -> None:
        subject.call()
        subject.synchronize()

    def prepare() -> None:
        subject.prepare(1)
        subject.synchronize()

    benchmark.group = case.label
    benchmark.extra_info |= {
        "variant": variant.name,
        "kind": variant.kind,
        "rel_err": before.rel_err,
        "case": case.to_json(),
    }
    if case.direction in ("backward", "step"):
        # Each call needs its own forward, or fresh weights, which are made outside the clock.
        benchmark.pedantic(call, setup=prepare, rounds=_ROUNDS, warmup_rounds=3)
    else:
        calls = _calls_per_round(subject)
        benchmark.pedantic(call, iterations=calls, rounds=_ROUNDS, warmup_rounds=1)
    after = variant.verify(inputs)
    assert after, f"right before the timing, not after it: {after.detail}"


def _calls_per_round(subject: Subject) -> int:
    """How many calls last long enough for the timer's resolution not to matter."""
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            subject.call()
        subject.synchronize()
        if time.perf_counter() - start > _ROUND_S:
            return calls
        calls *= 2
