"""The lab's clocks, statistics, floors and result files, on made-up numbers and tiny subjects."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.profiler import profile

from pyext import registry
from pyext.backends import backends
from pyext.lab import check, cores, measure, report, results, roofline
from pyext.lab.cases import Case, Inputs, backend_variant
from pyext.lab.measure import Effort, Samples, Subject, speedup
from pyext.lab.peers import Peers
from pyext.registry import Cost

CPU = torch.device("cpu")
TINY = Effort(warmup_s=0.0, measure_s=0.0, blocks=4)


def made_up(median: float, *, blocks: int = 20, seed: int = 0, drift=None) -> Samples:
    """Samples with 5 % of noise, times a drift per block that variants may share."""
    noise = np.random.default_rng(seed).normal(1.0, 0.05, size=(blocks, 5))
    drift = np.ones(blocks) if drift is None else drift
    return Samples(median * noise * drift[:, None], calls_per_sample=1)


class TestRatio:
    @pytest.mark.parametrize("paired", [True, False])
    def test_contains_the_true_ratio(self, paired):
        ratio = speedup(made_up(2e-3), made_up(1e-3, seed=1), paired=paired, seed=0)
        assert ratio.low < 2 < ratio.high
        assert ratio.low < ratio.value < ratio.high
        assert ratio.high / ratio.low < 1.2
        assert ratio.verdict == "faster"

    def test_below_one_is_slower(self):
        ratio = speedup(made_up(1e-3), made_up(2e-3, seed=1), paired=True, seed=0)
        assert ratio.high < 1
        assert ratio.verdict == "slower"

    def test_equal_times_are_no_difference(self):
        verdicts = [
            speedup(
                made_up(1e-3, seed=2 * i), made_up(1e-3, seed=2 * i + 1), paired=True, seed=i
            ).verdict
            for i in range(20)
        ]
        # At 95 % one of twenty may miss; three would be a faulty interval.
        assert verdicts.count("no difference") >= 18

    @pytest.mark.parametrize(
        "drift",
        [np.linspace(1, 3, 20), np.repeat([1, 1.14], 10), np.tile([1, 1.14], 10)],
        ids=["slower all the time", "slower from the middle on", "slower every other block"],
    )
    def test_pairing_cancels_a_common_drift(self, drift):
        """Whatever the drift, the interval is as wide as without, and as often right."""

        def paired(drift, seed):
            baseline = made_up(2e-3, seed=2 * seed, drift=drift)
            variant = made_up(1e-3, seed=2 * seed + 1, drift=drift)
            ratio = speedup(baseline, variant, paired=True, seed=seed, resamples=500)
            return ratio.value, ratio.low, ratio.high

        drifting, steady = ([paired(each, i) for i in range(100)] for each in (drift, None))
        np.testing.assert_allclose(drifting, steady)
        # At 95 % five of a hundred may miss.
        assert sum(low < 2 < high for _, low, high in drifting) >= 88

    def test_the_seed_decides(self):
        baseline, variant = made_up(2e-3), made_up(1e-3, seed=1)
        first, again, other = (
            speedup(baseline, variant, paired=True, seed=seed) for seed in (3, 3, 4)
        )
        assert first == again != other

    def test_paired_samples_need_equally_many_blocks(self):
        with pytest.raises(ValueError, match="equally many blocks, got 20 and 19"):
            speedup(made_up(1), made_up(1, blocks=19), paired=True, seed=0)


class Watch:
    """Disturbed as told, and not when there are no more answers."""

    def __init__(self, answers):
        self.answers, self.asked, self.last = iter(answers), 0, False

    def slowdown(self):
        self.asked += 1
        self.last = next(self.answers, False)
        return 2.0 if self.last else 1.2


class TestMeasure:
    def test_interleaves_in_blocks_and_prepares_every_batch(self):
        log: list[tuple[str, str, int]] = []

        def subject(name: str) -> Subject:
            return Subject(
                name,
                call=lambda: log.append((name, "call", 1)),
                prepare=lambda calls: log.append((name, "prepare", calls)),
                max_batch=3,
            )

        timed = measure.measure([subject("a"), subject("b")], "host", TINY, device=CPU, seed=0)
        assert set(timed) == {"a", "b"}
        for samples in timed.values():
            assert samples.seconds.shape[0] == TINY.blocks
            assert samples.calls_per_sample <= 3
            assert (samples.seconds > 0).all()
        batches = [entry for entry in log if entry[1] == "prepare"]
        for name in "ab":
            prepared = sum(calls for who, _, calls in batches if who == name)
            assert prepared == sum(1 for who, what, _ in log if (who, what) == (name, "call"))
        turns = [who for i, (who, _, _) in enumerate(batches) if i == 0 or batches[i - 1][0] != who]
        assert len(turns) >= 2 * TINY.blocks - TINY.blocks // 2, "they took turns"

    def test_a_run_has_a_name_of_its_own(self):
        subjects = [Subject(name, lambda: None) for name in "ab"]
        first, second = (
            measure.measure(subjects, "host", TINY, device=CPU, seed=0) for _ in range(2)
        )
        assert first["a"].run == first["b"].run != second["a"].run == second["b"].run
        assert Samples.from_json(json.loads(json.dumps(first["a"].to_json()))).run == first["a"].run

    def test_a_slow_moment_does_not_cut_the_samples(self):
        """A batch counts as long as it takes at its fastest."""
        seconds = itertools.chain([1e-3], itertools.repeat(9e-3))
        subject = Subject("a", lambda: None)
        assert measure._warm_up(subject, lambda *_: next(seconds), 0.01) == (1, 1e-3)

    def test_disturbed_blocks_are_taken_anew_for_all(self, monkeypatch):
        """Two subjects: the watch is asked before each and at the end of a block."""
        watch = Watch([False] * 3 + [False, True, False] + [False] * 6 + [True])
        monkeypatch.setattr(measure, "CoreWatch", lambda: watch)
        slow_while_disturbed = [
            Subject(name, lambda: time.sleep(0.05 * watch.last), max_batch=1) for name in "ab"
        ]
        patient = dataclasses.replace(TINY, patience_s=60.0)
        timed = measure.measure(slow_while_disturbed, "host", patient, device=CPU, seed=0)
        assert watch.asked == (TINY.blocks + 2) * 3
        for samples in timed.values():
            assert (samples.disturbed_blocks, samples.retaken_blocks) == (0, 2)
            assert samples.seconds.shape[0] == TINY.blocks
            assert samples.seconds.max() < 0.05

    def test_patience_ends_and_what_is_kept_is_counted(self, monkeypatch):
        monkeypatch.setattr(measure, "CoreWatch", lambda: Watch(itertools.repeat(True)))
        subject = Subject("a", lambda: None, max_batch=1)
        for patience_s in (0.0, 0.05):
            effort = dataclasses.replace(TINY, patience_s=patience_s)
            timed = measure.measure([subject], "host", effort, device=CPU, seed=0)
            assert timed["a"].disturbed_blocks == TINY.blocks
            assert timed["a"].seconds.shape[0] == TINY.blocks
            assert (timed["a"].retaken_blocks > 0) == (patience_s > 0)

    def test_a_block_that_takes_longer_than_the_patience_is_kept(self, monkeypatch):
        monkeypatch.setattr(measure, "CoreWatch", lambda: Watch(itertools.repeat(True)))
        subject = Subject("a", lambda: time.sleep(0.1), max_batch=1)
        effort = dataclasses.replace(TINY, patience_s=0.05)
        timed = measure.measure([subject], "host", effort, device=CPU, seed=0)
        assert timed["a"].retaken_blocks == 0

    def test_threads_fall_asleep_before_the_watch_and_before_each_turn(self, monkeypatch):
        events = []
        watch = Watch([])
        slowdown = watch.slowdown
        monkeypatch.setattr(watch, "slowdown", lambda: events.append("watch") or slowdown())
        monkeypatch.setattr(measure, "CoreWatch", lambda: watch)
        monkeypatch.setattr(measure.time, "sleep", lambda seconds: events.append(seconds))
        subject = Subject("a", lambda: events.append("call"), max_batch=1)
        measure.measure([subject], "host", TINY, device=CPU, seed=0)
        pause = measure._SETTLE_S
        watched = [at for at, event in enumerate(events) if event == "watch"]
        assert len(watched) == 2 * TINY.blocks
        for at in watched:
            assert events[at - 1] == events[at + 1] == pause

    def test_a_watch_compares_with_the_least_time_that_any_process_knows(self, monkeypatch):
        monkeypatch.setattr(cores, "_fastest_s", {})
        watch = cores.CoreWatch()
        threads = str(torch.get_num_threads())
        assert set(cores.known()) == {threads}
        least = cores.known()[threads]
        cores.learn({threads: 2 * least, "77": 1.0})
        assert cores.known() == {threads: least, "77": 1.0}
        cores.learn({threads: least / 100})
        assert watch.slowdown() > cores.DISTURBED
        monkeypatch.setattr(watch, "_seconds", lambda: 1.2 * least / 100)
        assert watch.slowdown() == pytest.approx(1.2)
        monkeypatch.setattr(cores, "_MOST_THREADS", 0)
        assert watch.slowdown() == 1

    def test_the_garbage_collector_rests_and_comes_back(self):
        seen = []
        subject = Subject("a", call=lambda: seen.append(gc.isenabled()))
        assert gc.isenabled()
        measure.measure([subject], "host", TINY, device=CPU, seed=0)
        assert not any(seen)
        assert gc.isenabled()

    def test_waits_before_each_batch_and_at_its_end(self):
        events: list[str] = []
        subject = Subject(
            "a",
            lambda: events.append("call"),
            prepare=lambda calls: events.append("prepare"),
            synchronize=lambda: events.append("wait"),
        )
        measure.measure([subject], "host", TINY, device=CPU, seed=0)
        _, *batches = " ".join(events).split("prepare ")
        for batch in batches:
            first, *calls, last = batch.split()
            assert first == last == "wait"
            assert calls and set(calls) == {"call"}

    def test_refuses_a_clock_that_the_device_lacks(self):
        with pytest.raises(ValueError, match="'device_cold' does not exist on 'cpu'"):
            measure.measure([], "device_cold", TINY, device=CPU, seed=0)

    @pytest.mark.skipif(not measure.can_recycle_memory(), reason="needs glibc's malloc")
    def test_recycled_memory_costs_no_page_faults(self):
        program = (
            "import resource, torch\n"
            "from pyext.lab import measure\n"
            "def faults():\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    torch.empty(2**24).fill_(1)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "measure.map_memory()\n"
            "print(max(faults() for _ in range(9)))"
        )
        fresh, recycled = (
            float(
                subprocess.run(
                    [sys.executable, "-c", program],
                    env=os.environ | variables,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for variables in ({}, measure.RECYCLED_MEMORY)
        )
        assert recycled < fresh / 10


def ceilings() -> roofline.Ceilings:
    """1 GB/s, 10 GFLOP/s outside matrix units, 100 (float32: 5) inside, 1 µs a launch."""
    flops = "FLOP/s"
    return roofline.Ceilings(
        copy=roofline.Ceiling(1e9, "B/s", "copy"),
        fma={name: roofline.Ceiling(1e10, flops, "fma") for name in ("float32", "bfloat16")},
        matrix={
            "float32": roofline.Ceiling(5e9, flops, "mm"),
            "bfloat16": roofline.Ceiling(1e11, flops, "mm"),
        },
        launch={"host": roofline.Ceiling(1e-6, "s", "launch")},
    )


class TestFloor:
    @pytest.mark.parametrize(
        ("cost", "dtype", "expected_s"),
        [
            (Cost(bytes=10**6, flops=10, unit="elementwise"), "float32", 1e-3 + 1e-6),
            (Cost(bytes=10, flops=10**8, unit="elementwise"), "bfloat16", 1e-2 + 1e-6),
            (Cost(bytes=10, flops=10**8, unit="matmul"), "bfloat16", 1e-3 + 1e-6),
            # The FMA units bound a product that no library runs as fast.
            (Cost(bytes=10, flops=10**8, unit="matmul"), "float32", 1e-2 + 1e-6),
        ],
    )
    def test_is_the_larger_of_both_plus_a_launch(self, cost, dtype, expected_s):
        assert roofline.floor(cost, dtype, "host", ceilings()) == pytest.approx(expected_s)

    def test_pct_of_floor(self):
        assert roofline.pct_of_floor(1e-3, 4e-3) == pytest.approx(25)

    def test_ceilings_survive_json(self):
        there = json.loads(json.dumps(ceilings().to_json()))
        assert roofline.Ceilings.from_json(there) == ceilings()

    def test_the_better_of_two_measurements_counts(self):
        first = ceilings()
        slower = roofline.Ceiling(1e8, "B/s", "a busy machine")
        faster = roofline.Ceiling(2e10, "FLOP/s", "an idle one")
        quicker = {"host": roofline.Ceiling(5e-7, "s", "an idle one")}
        second = dataclasses.replace(
            first, copy=slower, fma=first.fma | {"float32": faster}, launch=quicker
        )
        for both in (first.with_better(second), second.with_better(first)):
            assert both.copy == first.copy
            assert both.fma == second.fma
            assert both.matrix == first.matrix
            assert both.launch == quicker

    def test_this_machine_has_ceilings(self):
        *steps, (last, measured) = roofline.measure_ceilings(CPU, [torch.float32], ["host"])
        assert all(each is None for _, each in steps)
        assert last == "done"
        assert 1e8 < measured.copy.value < 1e13
        assert 1e8 < measured.fma["float32"].value < 1e14
        assert 1e-8 < measured.launch["host"].value < 1e-2


CASE = Case("relu", "both", (4096,), "float32", "cpu")


class TestRows:
    def test_a_peer_counts_with_its_better_time(self):
        slow, fast, eager = made_up(4e-3), made_up(1e-3, seed=1), made_up(2e-3, seed=2)
        row = results.new_row(CASE, "compile", "peer", "host", "ok")
        results.fill_times(row, slow, fast, eager, None, seed=0)
        assert row["median_s"] == row["alone_median_s"] == fast.median
        assert row["interleaved_median_s"] == slow.median
        assert row["ratio_vs_eager"] == pytest.approx(2, rel=0.1)
        assert row["verdict"] == "faster"
        results.fill_times(row, fast, slow, eager, None, seed=0)
        assert row["median_s"] == row["interleaved_median_s"] == fast.median

    def test_the_baseline_counts_with_its_better_time_too(self):
        row = results.new_row(CASE, "extension", "backend", "host", "ok")
        results.fill_times(row, made_up(1e-3), None, made_up(4e-3), made_up(2e-3), seed=0)
        assert row["ratio_vs_eager"] == pytest.approx(2, rel=0.1)

    def test_blocks_pair_where_both_were_measured_in_one_run(self):
        drift = np.linspace(1, 3, 20)  # of the machine, which both see block by block

        def measured(run):
            taken = made_up(1e-3, drift=drift), made_up(2e-3, seed=1, drift=drift)
            return [dataclasses.replace(each, run=run) for each in taken]

        def width(variant, baseline):
            row = results.new_row(CASE, "extension", "backend", "host", "ok")
            slow = made_up(9e-3)
            results.fill_times(row, slow, variant, slow, baseline, seed=0)
            low, high = row["ratio_ci"]
            return high / low - 1

        fast, slow = measured("apart")
        paired = width(fast, slow)
        assert width(fast, dataclasses.replace(slow, run="another")) > 3 * paired
        assert width(*measured(None)) > 3 * paired
        row = results.new_row(CASE, "extension", "backend", "host", "ok")
        results.fill_times(row, fast, None, slow, None, seed=0)
        assert row["paired"] is True

    def test_faster_than_the_floor_is_flagged(self):
        row = results.new_row(CASE, "extension", "backend", "host", "ok")
        results.fill_times(row, made_up(1e-6), None, None, None, seed=0)
        results.fill_floor(row, CASE, ceilings())
        assert row["floor_s"] == pytest.approx(CASE.cost.bytes / 1e9 + 1e-6)
        assert row["pct_of_floor"] > 100
        assert row["above_ceiling"] is True

    def test_files_are_replaced_whole_and_hold_no_nan(self, tmp_path):
        found = results.Results(tmp_path / "new", {"device_type": "cpu"}, {})
        row = results.new_row(CASE, "extension", "backend", None, "wrong")
        found.rows.append(row | {"rel_err": float("nan"), "ratio_ci": (0.5, 2.0)})
        found.save()
        found.save()
        names = {path.name for path in (tmp_path / "new").iterdir()}
        assert names == {"results.json", "results.csv"}
        (loaded,) = results.load(tmp_path / "new")["rows"]
        assert loaded["rel_err"] is None
        assert loaded["shape"] == [4096]
        with (tmp_path / "new" / "results.csv").open() as file:
            (line,) = csv.DictReader(file)
        assert (line["ratio_low"], line["ratio_high"], line["median_s"]) == ("0.5", "2.0", "")

    def test_a_file_of_another_schema_is_refused(self, tmp_path):
        (tmp_path / "results.json").write_text('{"schema": "other/9"}')
        with pytest.raises(ValueError, match="schema 'other/9'"):
            results.load(tmp_path)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "–"),
            (1.234, "1.23 s"),
            (0.0123, "12.3 ms"),
            (123.4e-6, "123 µs"),
            (1e-6, "1.00 µs"),
            (5e-9, "5.00 ns"),
        ],
    )
    def test_seconds_read_well(self, value, text):
        assert report.seconds(value) == text


class TestCompare:
    """A comparison goes piece by piece; each piece counts."""

    @pytest.mark.parametrize("place", [0, check._PART - 1, check._PART, 2 * check._PART + 4])
    @pytest.mark.parametrize("value", [7.0, torch.nan, torch.inf])
    def test_one_wrong_element_is_found_wherever_it_is(self, place, value):
        expected = torch.randn(2 * check._PART + 5, dtype=torch.float64).clamp(-4, 4)
        actual = expected.float()
        assert check.compare({"out": actual}, {"out": expected}, 1)
        actual[place] = value
        found = check.compare({"out": actual}, {"out": expected}, 1)
        assert not found and "out: " in found.detail

    def test_an_update_is_compared_wherever_it_is(self):
        before = torch.zeros(check._PART + 3, dtype=torch.float64)
        expected = before.clone()
        expected[-1] = 1.0
        off = check.compare({"w": before.float()}, {"w": expected}, 1, {"w": before})
        assert not off and off.rel_err == 1.0


class TestTimedEager:
    """What is timed as dropout's ``eager`` is PyTorch's, which drops other elements."""

    @pytest.mark.parametrize("direction", ["forward", "backward", "both"])
    def test_it_is_pytorchs_and_verified_by_its_own_mask(self, direction):
        case = Case("dropout", direction, (5000,), "float32", "cpu")
        inputs = Inputs(registry.get("dropout"), case, seed=0)
        variants = [backend_variant(name, inputs, case) for name in backends()]
        variants += filter(None, [Peers().variant("eager-inplace", inputs, case)])
        for variant in variants:
            result = variant.verify(inputs)
            assert result, (variant.name, result.detail)
        with profile() as profiler:
            backend_variant("eager", inputs, case).results()
        assert "aten::dropout" in {event.name for event in profiler.events()}

    @pytest.mark.parametrize(
        ("function", "detail"),
        [
            (lambda x: F.dropout(x, 0.4), "off by"),
            (lambda x: F.dropout(x) * (1 + 1e-4), "off by"),
            (lambda x: 2 * x, "0.0000 zeros, not 0.5 ± 0.0424"),
            (lambda x: 2 * x * (torch.rand_like(x) < 0.6), "zeros, not 0.5"),
            (lambda x: F.dropout(x) + (x - x.detach()), "off by"),
        ],
    )
    def test_a_wrong_one_is_found(self, function, detail):
        op = registry.get("dropout")
        timed = dataclasses.replace(op.timed_eager, function=function)
        case = Case("dropout", "both", (5000,), "float32", "cpu")
        inputs = Inputs(dataclasses.replace(op, timed_eager=timed), case, seed=0)
        result = backend_variant("eager", inputs, case).verify(inputs)
        assert not result and detail in result.detail

    def test_the_labs_own_are_compared_with_the_reference(self):
        op = registry.get("dropout")
        other = dataclasses.replace(op, function=lambda x, backend: F.dropout(x))
        case = Case("dropout", "both", (5000,), "float32", "cpu")
        inputs = Inputs(other, case, seed=0)
        assert not backend_variant("extension", inputs, case).verify(inputs)


def test_a_markdown_cell_above_its_floor_is_marked():
    row = {"kind": "backend", "verdict": "baseline", "median_s": 1e-3, "pct_of_floor": 120.0}
    assert report._markdown_cell(row, False) == "1.00 ms, 120 % of floor (in the caches?)"
    row["pct_of_floor"] = 99.0
    assert report._markdown_cell(row, False) == "1.00 ms, 99 % of floor"


def test_a_peer_has_its_share_of_the_floor_too():
    row = {"kind": "peer", "verdict": "faster", "median_s": 1e-3, "pct_of_floor": 50.0}
    row |= {"ratio_vs_eager": 2.0, "ratio_ci": [1.9, 2.1]}
    cell = report._markdown_cell(row, False)
    assert cell == "1.00 ms, **2.00×** (1.90 – 2.10), 50 % of floor"


def test_the_last_table_has_times_and_intervals_where_there_is_room():
    row = dict.fromkeys(results.COLUMNS) | {"op": "relu", "direction": "both", "shape": [64]}
    row |= {"suite": "relu", "dtype": "float32", "outputs": "allocated", "clock": "host"}
    row |= {"status": "ok", "median_s": 1e-3, "pct_of_floor": 50.0, "above_ceiling": False}
    eager = row | {"variant": "eager", "verdict": "baseline", "ratio_vs_eager": 1.0}
    other = row | {"variant": "jax", "verdict": "faster", "ratio_vs_eager": 2.0}
    other["ratio_ci"] = [1.9, 2.1]
    environment = {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    data = {"rows": [eager, other], "mnist": None, "notes": [], "environment": environment}
    last = []
    for width in (150, 30):
        console = Console(width=width, file=io.StringIO())
        report.show(data, console)
        last.append(console.file.getvalue().split("At a glance")[1])
    assert "2.00× 1.90–2.10" in last[0] and "1.00 ms [50 %]" in last[0]
    assert "2.00×" in last[1] and "1.90" not in last[1]


def test_a_gain_beyond_the_bound_is_explained():
    row = {"op": "mnist_cnn", "variant": "extension", "status": "ok", "ratio_ci": [1.6, 1.7]}
    speed = [
        {"workload": "mnist_cnn", "backend": "eager", "page_faults_per_step": 10_000.0},
        {"workload": "mnist_cnn", "backend": "extension", "page_faults_per_step": 2_000.0},
    ]
    section = {"shares": [{"workload": "mnist_cnn", "bound": 1.5}], "speed": speed}
    sentence = report._gains_beyond(row, section)
    assert "a step meets 2,000 page faults, eager's 10,000" in sentence
    assert report._gains_beyond(row | {"ratio_ci": [1.4, 1.7]}, section) is None
    # A gain that comes from something else must not be put down to memory.
    speed[1]["page_faults_per_step"] = 10_000.0
    assert "memory" not in report._gains_beyond(row, section)
