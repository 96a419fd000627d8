"""The tuner of Triton's tiles without a GPU: real kernels in the interpreter, a made-up clock.

What a GPU would say is the clock's business; what is done with it is tested here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from support import dtype_id

from pyext import doctor, registry
from pyext.backends import BACKENDS
from pyext.lab import __main__ as lab
from pyext.lab import environment, tune
from pyext.lab.cases import Case, Variant
from pyext.lab.check import CheckResult
from pyext.lab.measure import Ratio, Samples

pytest.importorskip("triton", reason="Triton is not installed")
interpreted = pytest.mark.skipif(
    not BACKENDS["triton"].interpreted, reason="this process compiles Triton kernels"
)

# Small for the interpreter's sake; K of the first product is just long enough for two parts.
CASE = Case("two_layer_sgd_step", "step", (8, 140, 20, 6), "float32", "cpu")


@pytest.fixture
def tiling(monkeypatch):
    """The module of the rule, as it is for a GPU."""
    BACKENDS["triton"].raw  # noqa: B018  imports the kernels
    from pyext.kernels import _tiling

    monkeypatch.setattr(_tiling, "INTERPRETED", False)
    return _tiling


def seconds_by(monkeypatch, cost, last_word=None):
    """Replaces the clock: a call takes ``cost(its tiling)`` seconds; in the last measurement, of
    two tilings, ``last_word(its tiling)``. Returns what was measured together, and for each tiling
    that was timed what its call launched: (m, n, k) -> tiling."""
    measured, launched = [], []

    def measure(subjects, clock, effort, *, device, seed):
        measured.append([subject.name for subject in subjects])
        samples = {}
        for subject in subjects:
            with launches() as tilings:
                subject.capturable()()
            launched.append((subject.name, tilings))
            seconds = (last_word if effort is tune._LAST_WORD and last_word else cost)(subject.name)
            blocks = seconds * np.random.default_rng(len(samples)).normal(1, 1e-4, (10, 3))
            samples[subject.name] = Samples(blocks, 1, run=uuid.uuid4().hex)
        return samples

    monkeypatch.setattr(tune, "measure", measure)
    return measured, launched


@contextlib.contextmanager
def launches():
    """The tilings with which products are launched while it lasts: (m, n, k) -> tiling."""
    from pyext.kernels import _matmul, _tiling

    tilings = {}

    class Listening:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                if self.kernel is _matmul._matmul_kernel:
                    sides = (options[f"BLOCK_{side}"] for side in "MNK")
                    how = grid[1], options["num_warps"], options["num_stages"]
                    tilings[args[4:7]] = _tiling.Tiling(*sides, *how)
                return self.kernel[grid](*args, **options)

            return launch

    with mock.patch.object(_matmul, "wrap_triton", Listening):
        yield tilings


def sides(name):
    """Of a tiling, from its text."""
    return tuple(map(int, re.match(r"(\d+)x(\d+)x(\d+), ", name).groups()))


class TestNeighbours:
    @pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(
        "mnk", [(1, 1, 1), (64, 100, 1000), (1000, 100, 64), (8192, 4096, 4096)]
    )
    def test_of_the_rule(self, tiling, mnk, dtype):
        product = tiling.Product(dtype, *mnk, "nn", "")
        rule = tiling.choose_tiling(*mnk, dtype.itemsize)
        assert tiling.fits(rule, product)
        others = tiling.neighbours(rule, product)
        assert len(set(others)) == len(others) >= 2
        for other in others:
            assert tiling.fits(other, product), other
            changed = [a != b for a, b in zip(rule, other, strict=True)]
            assert 1 <= sum(changed) <= 2, other

    @pytest.mark.parametrize(
        "change",
        [
            {"block_m": 8},
            {"block_m": 48},
            {"block_m": 128},  # more than 64 rows
            {"block_n": 512},
            {"splits": 0},
            {"splits": 16},  # parts of 62
            {"warps": 3},
            {"warps": 0},
            {"stages": 0},
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, tiling, change):
        product = tiling.Product(torch.float32, 64, 100, 1000, "nn", "")
        rule = tiling.choose_tiling(64, 100, 1000, 4)
        assert not tiling.fits(rule._replace(**change), product)

    @pytest.mark.parametrize(
        ("dtype", "room", "change"),
        [
            # Operands of all stages: 192 KiB and 256.
            (torch.bfloat16, (128, 128, 128, 1, 8, 3), {"stages": 4}),
            # Sums: 128 registers a thread and 256.
            (torch.bfloat16, (128, 128, 32, 1, 4, 2), {"warps": 2}),
            (torch.float64, (64, 128, 16, 1, 4, 2), {"warps": 2}),
            # Multiply-adds without tensor cores: 2048 a thread and step, and 4096.
            (torch.float32, (64, 64, 32, 1, 2, 2), {"block_k": 64}),
        ],
    )
    def test_what_there_is_no_room_for(self, tiling, dtype, room, change):
        product = tiling.Product(dtype, 512, 512, 512, "nn", "")
        most = tiling.Tiling(*room)
        assert tiling.fits(most, product)
        assert not tiling.fits(most._replace(**change), product)


@interpreted
class TestSearch:
    def test_finds_the_fastest_of_many_steps_away(self, tiling, monkeypatch):
        """A clock that likes one tiling of the first product best, and each step towards it."""
        target = (16, 16, 128)

        def cost(name):
            return 1 + sum(abs(np.log2(a / b)) for a, b in zip(sides(name), target, strict=True))

        measured, launched = seconds_by(monkeypatch, cost)
        first, second = itertools.islice(tune.tune(CASE, lambda product: False), 2)
        assert first.product[1:4] == (8, 20, 140) and first.product.epilogue == "relu"
        assert first.best[:3] == target and first.rule[:3] == (16, 32, 32)
        assert first.ratio.value == pytest.approx(cost(str(first.rule)), rel=1e-3)
        assert first.tried > 10 and first.refused == 0
        # The rule is measured against the best once more, by themselves.
        assert [str(first.rule), str(first.best)] in measured
        # Each is launched as its name says, and what was found stays while the next is tuned.
        beginning = next(i for i, names in enumerate(measured) if names[0] == str(second.rule))
        count = sum(map(len, measured[:beginning]))
        for i, (name, tilings) in enumerate(launched):
            assert str(tilings[(8, 20, 140) if i < count else (8, 6, 20)]) == name
            assert i < count or tilings[8, 20, 140] == first.best

    @pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
    def test_the_rule_stays_where_nothing_is_faster(self, tiling, monkeypatch, dtype):
        """And every tiling that is tried is right, K in parts among them, or this would raise."""
        measured, _ = seconds_by(monkeypatch, lambda name: 1.0)
        case = replace(CASE, op="two_layer_mse_loss", direction="both", dtype=dtype_id(dtype))
        found = list(tune.tune(case, lambda product: False))
        assert [each.product[1:] for each in found] == [
            (8, 20, 140, "nn", "relu"),  # hidden
            (8, 6, 20, "nn", "subtract loss"),  # the error
            (8, 20, 6, "nt", "mask"),  # hidden's gradient
            (140, 20, 8, "tn", ""),  # w1's
            (20, 6, 8, "tn", ""),  # w2's
        ]
        for each in found:
            assert (each.best, each.ratio) == (each.rule, None)
            assert each.tried >= 5
            assert "stays" in each.outcome
        assert len(measured) == len(found)  # one round for each product, and no last word

    def test_a_lucky_one_is_not_kept(self, tiling, monkeypatch):
        measured, _ = seconds_by(
            monkeypatch, lambda name: 1 / sides(name)[2], last_word=lambda name: 1.0
        )
        first = next(tune.tune(CASE, lambda product: False))
        assert len(measured) > 2 and (first.best, first.ratio) == (first.rule, None)

    def test_what_is_decided_is_left(self, tiling, monkeypatch):
        seconds_by(monkeypatch, lambda name: 1.0)
        found = list(tune.tune(CASE, lambda product: product.epilogue != "update"))
        assert [each.product.epilogue for each in found] == ["update", "update"]

    @pytest.mark.parametrize("kind", ["resources", "compiler", "pass"])
    def test_a_tiling_that_is_refused_is_left_out(self, tiling, monkeypatch, kind):
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        refusal = {
            "resources": OutOfResources(300_000, 232_448, "shared memory"),
            "compiler": CompilationError("", None, "no"),
            "pass": RuntimeError("PassManager::run failed"),
        }[kind]
        seconds_by(monkeypatch, lambda name: 1 / sides(name)[2])
        results = Variant.verify

        def verify(variant, inputs):
            from pyext.kernels import _tuned

            products = tune._launched(variant)
            for product in products:
                if _tuned.tiling_of(product, torch.device("cpu")).block_k == 64:
                    raise refusal
            return results(variant, inputs)

        monkeypatch.setattr(Variant, "verify", verify)
        first = next(tune.tune(CASE, lambda product: False))
        assert first.refused and first.best.block_k < 64

    def test_a_case_that_cannot_be_launched_is_one_sentence(self, tiling, monkeypatch):
        from triton.runtime.errors import OutOfResources

        def refuse(variant):
            raise OutOfResources(300_000, 232_448, "shared memory")

        monkeypatch.setattr(tune, "_launched", refuse)
        with pytest.raises(tune.CannotTune, match=f"{CASE.label} cannot be launched here"):
            next(tune.tune(CASE, lambda product: False))

    def test_a_tiling_is_counted_once(self, tiling, monkeypatch):
        """However often it is verified: the winner is once more, after the timing."""
        seconds_by(monkeypatch, lambda name: 1 / sides(name)[2])
        verified, verify = [], Variant.verify

        def counting(variant, inputs):
            verified.append(1)
            return verify(variant, inputs)

        monkeypatch.setattr(Variant, "verify", counting)
        first = next(tune.tune(CASE, lambda product: False))
        assert first.ratio and first.tried == len(verified) - 1

    def test_a_rule_that_is_refused_is_one_sentence(self, tiling, monkeypatch):
        from triton.runtime.errors import OutOfResources

        def refuse(*_):
            raise OutOfResources(300_000, 232_448, "shared memory")

        monkeypatch.setattr(Variant, "verify", refuse)
        with pytest.raises(tune.CannotTune, match="does not take the rule's tiles"):
            next(tune.tune(CASE, lambda product: False))

    def test_what_is_kept_is_verified_after_the_timing_too(self, tiling, monkeypatch):
        measured, _ = seconds_by(monkeypatch, lambda name: 1 / sides(name)[2])
        verify = Variant.verify

        def wrong_after_the_last_word(variant, inputs):
            if len(measured) > tune._LAST_WORDS and len(set(map(len, measured[-5:]))) == 1:
                return CheckResult(False, 1.0, "updated_0: off by 1")
            return verify(variant, inputs)

        monkeypatch.setattr(Variant, "verify", wrong_after_the_last_word)
        with pytest.raises(tune.WrongResult):
            next(tune.tune(CASE, lambda product: False))

    def test_a_fast_one_whose_interval_says_nothing_is_passed_over(self, tiling, monkeypatch):
        """The fastest is noise; the next is sure."""
        measured, _ = seconds_by(monkeypatch, lambda name: 1.0)
        speedups = {64: Ratio(2.0, 0.5, 4.0), 16: Ratio(1.5, 1.4, 1.6)}

        def speedup(baseline, variant, *, paired, seed):
            return speedups.get(variant, Ratio(1.0, 1.0, 1.0))

        def measure(subjects, *_, **__):
            return {subject.name: sides(subject.name)[2] for subject in subjects}

        monkeypatch.setattr(tune, "measure", measure)
        monkeypatch.setattr(tune, "speedup", speedup)
        monkeypatch.setattr(tune, "_MOST_STEPS", 1)
        first = next(tune.tune(CASE, lambda product: False))
        assert first.rule.block_k == 32 and first.best.block_k == 16
        assert first.ratio == speedups[16]

    def test_a_rule_that_wins_again_is_what_later_products_are_tuned_beside(
        self, tiling, monkeypatch
    ):
        """With --again: not what was tuned before."""
        from pyext.kernels import _tuned

        _, launched = seconds_by(monkeypatch, lambda name: 1.0)
        rule_of = _tuned.tiling_of

        def tuned_before(product, device):
            return rule_of(product, device)._replace(block_k=64)

        monkeypatch.setattr(_tuned, "tiling_of", tuned_before)
        first, _ = itertools.islice(tune.tune(CASE, lambda product: False), 2)
        assert first.best == first.rule
        assert launched[-1][1][8, 20, 140] == first.rule

    def test_a_wrong_result_ends_it(self, tiling, monkeypatch):
        seconds_by(monkeypatch, lambda name: 1.0)
        wrong = CheckResult(False, 1.0, "updated_0: off by 1")
        monkeypatch.setattr(Variant, "verify", lambda variant, inputs: wrong)
        with pytest.raises(tune.WrongResult, match="float32 8x20x140 nn .* updated_0: off by 1"):
            next(tune.tune(CASE, lambda product: False))


STORE = """
import contextlib, json, sys, types, warnings
from pathlib import Path
import torch, triton
from pyext.backends import BACKENDS
BACKENDS["triton"].raw
from pyext.kernels import _matmul, _tiling, _tuned

kernel = _matmul._matmul_kernel
gpu = types.SimpleNamespace(name="A GPU", major=9, minor=0)
torch.cuda.get_device_properties = lambda device: gpu
device = torch.device("cuda", 0)
product = _tiling.Product(torch.float32, 64, 100, 1000, "nn", "bias relu")
tiling = _tiling.Tiling(16, 32, 64, 2, 2, 4)
rule = _tiling.choose_tiling(64, 100, 1000, 4)
"""
SAVE = """
assert _tuned.tiling_of(product, device) == rule
_tuned.save(product, tiling, device)
print(_tuned.tiling_of(product, device) == tiling, _tuned.count(device))
"""
FOUND = "print(_tuned.tiling_of(product, device) == tiling, _tuned.count(device))"


def in_another_process(cache, code, **variables):
    """It compiles, so that the kernels have a source to be named after; what ``code`` prints."""
    environment = {"TRITON_INTERPRET": "0", "XDG_CACHE_HOME": str(cache), "PYEXT_TUNED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STORE + code],
        env=os.environ | environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestStore:
    @pytest.fixture(scope="class")
    def cache(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("cache")
        assert in_another_process(folder, SAVE) == "True 1\n"
        return folder

    def test_another_process_finds_it(self, cache):
        assert in_another_process(cache, FOUND) == "True 1\n"

    def test_can_be_left_unread(self, cache):
        assert in_another_process(cache, FOUND, PYEXT_TUNED="0") == "False 0\n"

    def test_no_folder_is_no_error_and_is_not_made(self, tmp_path):
        assert in_another_process(tmp_path / "none", FOUND) == "False 0\n"
        assert not (tmp_path / "none").exists()
        (tmp_path / "file").write_text("")
        assert in_another_process(tmp_path / "file", FOUND) == "False 0\n"

    def test_torch_compile_moves_tritons_folder_and_not_this_one(self, cache, tmp_path):
        """It sets this variable within a process, where the user has not."""
        code = f"import os; os.environ['TRITON_CACHE_DIR'] = {str(tmp_path)!r}\n{FOUND}"
        assert in_another_process(cache, code) == "True 1\n"

    def test_the_interpreter_reads_none(self, cache):
        assert in_another_process(cache, FOUND, TRITON_INTERPRET="1") == "False 0\n"

    def test_an_interrupted_save_leaves_the_old_file(self, tmp_path):
        code = f"""
import os
_tuned.save(product, tiling, device)
def interrupted(*_):
    raise KeyboardInterrupt
os.replace = interrupted
with contextlib.suppress(KeyboardInterrupt):
    _tuned.save(product, rule, device)
{FOUND}
"""
        assert in_another_process(tmp_path, code) == "True 1\n"

    def test_only_the_same_product_on_the_same_gpu_finds_it(self, cache):
        code = """
others = [
    (product._replace(m=65), device),
    (product._replace(dtype=torch.bfloat16), device),
    (product._replace(layout="nt"), device),
    (product._replace(epilogue="bias"), device),
    (product, torch.device("cpu")),
]
print([_tuned.tiling_of(*other) == tiling for other in others])
changes = [
    lambda: None,
    lambda: setattr(gpu, "name", "Another GPU"),
    lambda: (setattr(gpu, "name", "A GPU"), setattr(gpu, "major", 10)),
    lambda: (setattr(gpu, "major", 9), setattr(triton, "__version__", "0.0")),
    lambda: setattr(triton, "__version__", version),
    lambda: kernel._unsafe_update_src(kernel.src.replace("acc", "total")),
]
version, found = triton.__version__, []
for change in changes:
    change()
    found.append(_tuned.load(product, device) == tiling)
print(found)
"""
        others, changes = in_another_process(cache, code).splitlines()
        assert others == str([False] * 5)
        assert changes == str([True, False, False, False, True, False])

    def test_a_damaged_file_is_ignored_with_a_sentence(self, tmp_path):
        texts = [
            "",
            "{",
            "[1, 2]",
            '{"block_m": 16}',
            json.dumps(dict(block_m=16, block_n=32, block_k=64, splits=2, warps=3, stages=4)),
            json.dumps(dict(block_m=16, block_n=32, block_k=64, splits=2, warps=2, stages=4.0)),
        ]
        code = f"""
_tuned.save(product, tiling, device)
(file,) = Path({str(tmp_path)!r}).rglob("*-relu.json")
for text in {texts!r}:
    file.write_text(text)
    _tuned._tiling_of.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _tuned.tiling_of(product, device)
    print(found == rule, str(caught[0].message).removeprefix(str(file)))
"""
        sentence = " is damaged and ignored; `python -m pyext.lab tune --again` writes it anew"
        assert in_another_process(tmp_path, code) == f"True {sentence}\n" * 6


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--suite", "relu"], "--suite does not know 'relu'; it accepts two_layer,"),
            (["--dtype", "int8"], "--dtype does not know 'int8'; it accepts float64,"),
            (["--shape", "4096"], "--shape 4096 fits none of the chosen suites"),
            (["--shape", "0x1"], "--shape does not understand '0x1'"),
            (["--shape", "64x1000x100x10x10", "--suite", "two_layer"], "fits none of the chosen"),
            (["--minutes", "0"], "--minutes"),
            (
                ["--suite", "two_layer_sgd_steps", "--dtype", "bfloat16"],
                "nothing to tune: two_layer_sgd_steps is not measured in bfloat16",
            ),
        ],
    )
    def test_wrong_usage(self, arguments, sentence, capsys):
        with pytest.raises(SystemExit) as end:
            lab.main(["tune", *arguments])
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_no_gpu(self, capsys):
        assert lab.main(["tune"]) == 3
        assert "tune needs an NVIDIA GPU and Triton: " in capsys.readouterr().out

    @pytest.fixture
    def on_the_cpu(self, tiling, monkeypatch):
        """What the command saved, on CPU tensors and by a clock that says 1 s."""
        from pyext.kernels import _tuned

        saved = {}
        monkeypatch.setattr(_tuned, "save", lambda product, best, _: saved.update({product: best}))
        monkeypatch.setattr(_tuned, "load", lambda product, _: saved.get(product))
        monkeypatch.setattr(_tuned, "count", lambda _: len(saved))
        seconds_by(monkeypatch, lambda name: 1.0)
        return saved

    def run(self, *arguments):
        parser = lab.argparse.ArgumentParser()
        tune.add_arguments(parser)
        console = tune.Console(width=150, highlight=False)
        return tune._tune_all([CASE, CASE], parser.parse_args(arguments), console)

    @interpreted
    def test_ctrl_c_keeps_what_was_tuned_and_the_next_run_goes_on(
        self, on_the_cpu, monkeypatch, capsys
    ):
        run = tune._Search.run
        left = iter([True, True])

        def interrupted(search):
            if not next(left, False):
                raise KeyboardInterrupt
            return run(search)

        monkeypatch.setattr(tune._Search, "run", interrupted)
        assert self.run() == 130
        assert len(on_the_cpu) == 2
        assert "Interrupted; the same command goes on where" in capsys.readouterr().out
        monkeypatch.setattr(tune._Search, "run", run)
        assert self.run() == 0
        assert len(on_the_cpu) == 5
        assert "Products tuned: 3, 0 of them faster" in capsys.readouterr().out
        assert self.run("--again") == 0
        assert "Products tuned: 5" in capsys.readouterr().out  # not ten: both cases are the same

    @interpreted
    def test_time_is_up(self, on_the_cpu, monkeypatch, capsys):
        """Nothing is begun, and the next run does the rest; afterwards nothing is left to say."""
        clock = itertools.count()
        monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: 60 * next(clock)))
        assert self.run("--minutes", "2") == 0
        assert len(on_the_cpu) == 2
        assert "The time was used up; the same command goes on" in capsys.readouterr().out
        assert self.run("--minutes", "0.1", "--again") == 0
        assert "The time was used up." in capsys.readouterr().out
        assert self.run("--minutes", "5") == 0
        assert len(on_the_cpu) == 5
        assert self.run("--minutes", "0.1") == 0
        assert "used up" not in capsys.readouterr().out

    @interpreted
    def test_a_wrong_result_is_a_failure(self, on_the_cpu, monkeypatch, capsys):
        wrong = CheckResult(False, 1.0, "updated_0: off by 1")
        monkeypatch.setattr(Variant, "verify", lambda variant, inputs: wrong)
        assert self.run() == 1
        assert "WrongResult: float32 8x20x140 nn" in capsys.readouterr().out
        assert not on_the_cpu

    @interpreted
    @pytest.mark.parametrize(
        ("where", "error", "code", "sentence"),
        [
            ("save", OSError("read-only file system"), 3, "cannot be kept: read-only file system."),
            ("verify", torch.OutOfMemoryError("CUDA out of memory."), 3, "out of memory.\n"),
            ("verify", RuntimeError("illegal access"), 1, "RuntimeError: illegal access"),
            ("measure", None, 3, "two_layer_sgd_step step 8x140x20x6 float32: not captured."),
        ],
    )
    def test_what_ends_it(self, on_the_cpu, monkeypatch, capsys, where, error, code, sentence):
        from pyext.kernels import _tuned

        def fail(*_):
            raise error

        def cannot_time(subjects, *_, **__):
            return {subject.name: "not captured" for subject in subjects}

        if where == "measure":
            monkeypatch.setattr(tune, "measure", cannot_time)
        else:
            monkeypatch.setattr(*((_tuned, "save") if where == "save" else (Variant, where)), fail)
        assert self.run() == code
        assert sentence in capsys.readouterr().out
        assert not on_the_cpu

    def test_ops_that_no_given_shape_fits_are_left_out(self, tiling, monkeypatch):
        from pyext.kernels import _tuned

        monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda device, op=None: None)
        monkeypatch.setattr(type(BACKENDS["triton"]), "interpreted", False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(_tuned, "enabled", lambda device: True)
        wanted = []
        monkeypatch.setattr(tune, "_tune_all", lambda cases, *_: wanted.extend(cases) or 0)
        assert lab.main(["tune", "--shape", "8x16x4x2", "--dtype", "float32,bfloat16"]) == 0
        assert {each.label for each in wanted} == {
            f"{op} {direction} 8x16x4x2 {dtype}"
            for op, direction in (
                ("two_layer", "both"),
                ("two_layer_mse_loss", "both"),
                ("two_layer_sgd_step", "step"),
            )
            for dtype in ("float32", "bfloat16")
        }
        assert {each.device for each in wanted} == {"cuda:1"}
        wanted.clear()
        assert lab.main(["tune"]) == 0
        assert "two_layer_sgd_steps" in {each.op for each in wanted}
        monkeypatch.setattr(_tuned, "enabled", lambda device: False)
        with pytest.raises(SystemExit):
            lab.main(["tune"])

    def test_interpreting_beside_a_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda device, op=None: None)
        monkeypatch.setattr(type(BACKENDS["triton"]), "interpreted", True)
        assert lab.main(["tune"]) == 3
        assert "TRITON_INTERPRET=1 runs the kernels in NumPy" in capsys.readouterr().out

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
    def test_on_a_gpu(self, tmp_path):
        """A small case for real: tuned, found by the next process, right and taken there."""
        command = ["-m", "pyext.lab", "tune", "--suite", "two_layer_sgd_step"]
        variables = {"TRITON_INTERPRET": "0", "XDG_CACHE_HOME": str(tmp_path), "PYEXT_TUNED": "1"}

        def python(*arguments):
            environment = os.environ | variables
            done = subprocess.run(
                [sys.executable, *arguments], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        assert "Products tuned: 5," in python(*command, "--shape", "16x64x32x8")
        assert "Products tuned: 0," in python(*command, "--shape", "16x64x32x8")
        code = """
import torch
from pyext import registry
from pyext.lab import environment, tune
from pyext.lab.cases import Case, Inputs, backend_variant
from pyext.kernels import _tuned

case = Case("two_layer_sgd_step", "step", (16, 64, 32, 8), "float32", "cuda:0")
inputs = Inputs(registry.get(case.op), case, 0)
variant = backend_variant("triton", inputs, case)
assert variant.verify(inputs)
device = torch.device(case.device)
assert all(_tuned.load(each, device) for each in tune._launched(variant))
print(environment.tuned_products("cuda"))
"""
        assert python("-c", code) == "5\n"


class TestWhoSaysHowMany:
    @pytest.fixture
    def three(self, monkeypatch):
        """A GPU for which three products are tuned."""
        BACKENDS["triton"].raw  # noqa: B018  imports the kernels
        from pyext.kernels import _tuned

        monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda device, op=None: None)
        monkeypatch.setattr(_tuned, "count", lambda device: 3 if device.type == "cuda" else 0)

    def test_the_environment_of_a_result_file(self, three, monkeypatch):
        assert environment.tuned_products(torch.device("cuda", 0)) == 3
        reason = "Triton is not installed"
        monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda device, op=None: reason)
        assert environment.tuned_products("cuda") is None

    def test_the_doctor(self, three, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert doctor.describe_triton().endswith(", 3 products tuned for this GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "tuned" not in doctor.describe_triton()


COMPILED = """
import sys
import torch
from pyext import registry
from pyext.lab import tune
from pyext.lab.cases import Case, Inputs, backend_variant
from pyext.lab.compile_report.triton_rows import _Compiler

compiler = _Compiler(sys.argv[1])
case = Case("two_layer_sgd_step", "step", (64, 1000, 100, 10), sys.argv[2], "cpu")
variant = backend_variant("triton", Inputs(registry.get(case.op), case, 0), case)
from pyext.kernels import _tiling, _tuned
product = tune._launched(variant)[0]
rule = _tuned.tiling_of(product, torch.device("cpu"))
compiler.wanted = {"_matmul_kernel"}
for tiling in _tiling.neighbours(rule, product):
    compiler.launched.clear()
    with tune._forced({product: tiling}):
        variant.subject.call()
    compiled = compiler.launched[0][1]
    print(tiling, compiled.metadata.shared)
    assert compiled.metadata.shared <= 227 * 1024, tiling
    assert compiled.metadata.num_warps == tiling.warps
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_neighbours_compile(tmp_path, dtype, architecture):
    """Of the largest product of the headline step; within the shared memory of sm_90."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILED, architecture, dtype],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) >= 5
