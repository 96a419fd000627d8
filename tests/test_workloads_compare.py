"""The comparison of backends in training: that its checks can fail, and what it reports."""

import dataclasses
import functools
import mmap
import time

import pytest
import torch
import workload_data as tiny

from pyext import functional, nn
from pyext.backends import BACKENDS, backends
from pyext.workloads import compare, data
from pyext.workloads.engine import HyperParameters

FILES = tiny.contents(tiny.arrays(train=64))
HYPER = HyperParameters(epochs=2, batch_size=8)
OPTIONS = {"steps": 6, "batch_size": 4}
SMALL = compare.Profile(
    parity_steps=3,
    parity_batch_size=4,
    share_steps=2,
    seconds={name: 0.3 for name in compare.WORKLOADS},
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny.write(root, FILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "mnist", tiny.dataset(FILES))
        return data.load("mnist", root, download=False)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(compare, "BLOCK_S", 0.02)
    monkeypatch.setattr(compare, "WARM_UP_S", {"cpu": 0.02, "cuda": 0.02})


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := BACKENDS[request.param].unavailable("cpu"):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def _wrong(monkeypatch, op, factor):
    """Makes one op wrong by a factor, wherever a module calls it."""
    real = getattr(functional, op)
    monkeypatch.setattr(functional, op, lambda *args, **options: real(*args, **options) * factor)


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", compare.WORKLOADS)
def test_backends_train_as_eager_does(loaded, backend, workload):
    profile = dataclasses.replace(SMALL, parity_batch_size=4)
    checks = compare.check_parity(workload, loaded, backend, profile=profile)
    assert [check.check for check in checks] == ["relu_bitwise", "float64", "float32_curve"]
    for check in checks:
        assert check.ok, check
        assert check.workload == workload and check.backend == backend and check.device == "cpu"
    assert checks[0].distance == 0 == checks[0].limit
    assert checks[1].limit == 1e-9 and checks[1].dtype == "float64"
    assert checks[2].limit > 0 and checks[2].dtype == "float32"


@pytest.mark.parametrize("factor", [1 + 2**-23, 0.0])
def test_bitwise_parity_sees_the_last_bit(loaded, monkeypatch, factor):
    _wrong(monkeypatch, "relu", factor)
    for workload in compare.WORKLOADS:
        check = compare.check_relu_bitwise(workload, loaded, "eager", **OPTIONS)
        assert not check.ok and "not bit-identical" in check.detail


def test_bitwise_parity_sees_wrong_weights_behind_right_losses(loaded, monkeypatch):
    class WrongInTheEnd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.relu()

        @staticmethod
        def backward(ctx, grad):
            return grad

    monkeypatch.setattr(functional, "relu", lambda x, backend: WrongInTheEnd.apply(x))
    check = compare.check_relu_bitwise("mnist_cnn", loaded, "eager", steps=1, batch_size=4)
    assert check.distance == 0 and not check.ok


# Swapping to "eager" sends the model through pyext.functional, where the tests put their errors.
@pytest.mark.parametrize(
    "workload, op",
    [("mnist_cnn", "relu"), ("mnist_mlp", "two_layer"), ("mnist_mlp", "mse_loss")],
)
def test_float64_and_curve_parity_see_a_wrong_op(loaded, monkeypatch, workload, op):
    prepare = compare.WORKLOADS[workload].prepare

    def prepare_swapped(hyper, data, *, backend="eager", **options):
        training = prepare(hyper, data, backend="eager", **options)
        if backend != "eager":
            nn.swap(training.model, "eager")
            nn.swap(training.criterion, "eager")
        return training

    module = type("Workload", (), {"prepare": staticmethod(prepare_swapped)})
    monkeypatch.setitem(compare.WORKLOADS, workload, module)
    monkeypatch.setattr(compare, "_is_interpreted", lambda *args: False)
    assert compare.check_float64(workload, loaded, "other", **OPTIONS).ok
    assert compare.check_curve(workload, loaded, "other", **OPTIONS).ok
    _wrong(monkeypatch, op, 1 + 1e-7)
    check = compare.check_float64(workload, loaded, "other", **OPTIONS)
    assert not check.ok and check.distance > check.limit == 1e-9
    _wrong(monkeypatch, op, 0.5)
    check = compare.check_curve(workload, loaded, "other", **OPTIONS)
    assert not check.ok and check.distance > check.limit


def test_one_strange_reordered_run_does_not_set_the_limit(loaded, monkeypatch):
    """A flipped activation parts one of eager's own re-ordered runs from the others."""
    real, calls = compare._distance, 0

    def distance(expected, actual):
        nonlocal calls
        calls += 1
        return 0.5 if calls == 2 else real(expected, actual)

    monkeypatch.setattr(compare, "_distance", distance)
    check = compare.check_curve("mnist_mlp", loaded, "eager", **OPTIONS)
    assert calls == 4 and check.ok and check.limit < 1e-3


@pytest.mark.parametrize("workload", compare.WORKLOADS)
def test_reordering_changes_rounding_and_nothing_else(loaded, workload):
    prepare = compare.WORKLOADS[workload].prepare

    def distance(dtype, change=compare._reordered):
        plain, other = (prepare(HYPER, loaded, dtype=dtype) for _ in range(2))
        return compare._distance(
            compare._losses(plain, 6), compare._losses(change(other, seed=1), 6)
        )

    assert distance(torch.float64) < 1e-9
    assert 0 < distance(torch.float32)

    def without_dropout_hooks(training, seed):
        training = compare._reordered(training, seed)
        for module in training.model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return training

    if workload == "mnist_cnn":
        assert distance(torch.float64, without_dropout_hooks) > 1e-3


# --- side by side --------------------------------------------------------------------------------


def test_side_by_side_every_variant_trains_as_if_alone(loaded):
    prepare = compare.WORKLOADS["mnist_cnn"].prepare
    trainings = {name: prepare(HYPER, loaded) for name in ("eager", "other")}
    speeds, curves = compare.train_side_by_side(trainings, epochs=2, target_accuracy=2.0)
    alone = prepare(HYPER, loaded)
    expected = compare._losses(alone, 15).float().tolist()
    for curve in curves:
        assert list(curve.losses[:15]) == expected and len(curve.losses) == 16
        assert [(test.step, test.epoch) for test in curve.tests] == [(8, 1.0), (16, 2.0)]
    assert curves[0].tests == curves[1].tests
    for speed in speeds:
        assert speed.p20_s <= speed.median_s <= speed.p80_s
        assert speed.steps_per_s == 1 / speed.median_s
        assert speed.images_per_s == 8 / speed.median_s
        assert speed.page_faults_per_step >= 0
        assert speed.ratio_ci[0] <= speed.ratio_vs_eager <= speed.ratio_ci[1]
    assert speeds[0].ratio_vs_eager == 1.0 and speeds[0].ratio_ci == (1.0, 1.0)


def test_side_by_side_ends_in_time_and_tests_where_it_ends(loaded):
    trainings = {"eager": compare.WORKLOADS["mnist_mlp"].prepare(HYPER, loaded)}
    _, (curve,) = compare.train_side_by_side(trainings, epochs=10**6, seconds=0.1)
    assert curve.tests[-1].step == len(curve.losses)
    assert curve.tests[-1].epoch == len(curve.losses) / 8


def test_side_by_side_ends_when_all_reach_the_target(loaded):
    trainings = {"eager": compare.WORKLOADS["mnist_mlp"].prepare(HYPER, loaded)}
    _, (curve,) = compare.train_side_by_side(trainings, epochs=50, target_accuracy=0.0)
    assert [test.epoch for test in curve.tests] == [1.0]


def test_side_by_side_is_cut_short_when_the_time_is_used_up(loaded):
    def train(**options):
        trainings = {"eager": compare.WORKLOADS["mnist_mlp"].prepare(HYPER, loaded)}
        _, (curve,) = compare.train_side_by_side(trainings, target_accuracy=2.0, **options)
        return curve

    curve = train(epochs=10**6, limit_s=0.2)
    assert curve.cut_short
    assert curve.tests[-1].step == len(curve.losses)  # tested where it ends
    assert not train(epochs=2, limit_s=60.0).cut_short
    # All of what was asked for, though just in time, is not cut short.
    assert not train(epochs=1, limit_s=0.0).cut_short
    # Long enough to be timed, however little time there is.
    trainings = {"eager": compare.WORKLOADS["mnist_mlp"].prepare(HYPER, loaded)}
    (speed,), _ = compare.train_side_by_side(
        trainings, epochs=10**6, limit_s=0.0, target_accuracy=2.0
    )
    assert len(speed.block_s) == compare.MIN_BLOCKS


def test_page_faults_are_counted_per_step(loaded, monkeypatch):
    training = compare.WORKLOADS["mnist_mlp"].prepare(HYPER, loaded)
    step = training.step

    def touching():
        with mmap.mmap(-1, 1 << 20) as fresh:  # from the kernel, whatever the allocator keeps
            fresh[:] = bytes(1 << 20)
        return step()

    def faults(function):
        monkeypatch.setattr(training, "step", function)
        (speed,), _ = compare.train_side_by_side({"eager": training}, epochs=10**6, seconds=0.1)
        return speed.page_faults_per_step

    before = faults(step)
    assert faults(touching) > before + 100  # of 256 pages of 4 KiB


# --- the share, and everything together ----------------------------------------------------------


def test_the_share_names_the_swapped_ops(loaded):
    cnn = compare.measure_share("mnist_cnn", loaded, steps=2, batch_size=8)
    mlp = compare.measure_share("mnist_mlp", loaded, steps=2, batch_size=8)
    assert cnn.op_s.keys() == {"relu", "dropout", "relu_max_pool2d", "adadelta_step"}
    assert mlp.op_s.keys() == {"relu", "mse_loss", "two_layer", "adadelta_step"}
    for share in (cnn, mlp):
        assert all(0 < seconds < share.step_s for seconds in share.op_s.values())
        assert share.share == pytest.approx(sum(share.op_s.values()) / share.step_s)
        assert share.bound == pytest.approx(1 / (1 - share.share))
        assert 0 < share.share < 1 and share.op_device_s == {}


def test_run_checks_measures_and_reports_progress(loaded):
    progress = []
    names = [*backends(), *(name for name, each in BACKENDS.items() if each.interpreted)]
    names = [name for name in names if BACKENDS[name].unavailable("cpu") is None]
    result = compare.run(
        loaded, names, profile=SMALL, hyper=HYPER, progress=lambda *args: progress.append(args)
    )
    assert result.ok and result.data == "tiny MNIST"
    timed = [name for name in names if name != "eager" and not BACKENDS[name].interpreted]
    for workload in compare.WORKLOADS:
        assert [s.backend for s in result.speed if s.workload == workload] == ["eager", *timed]
        assert [c.backend for c in result.curves if c.workload == workload] == ["eager", *timed]
        checked = [c.backend for c in result.parity if c.workload == workload]
        assert all(checked.count(name) == 6 for name in timed)
        later = [c.backend for c in result.parity if c.workload == workload and c.when == "after"]
        assert all(later.count(name) == 3 for name in timed)
    assert [share.workload for share in result.shares] == list(compare.WORKLOADS)
    done = [share for _, share in progress]
    assert done == sorted(done) and 0 <= done[0] and done[-1] <= 1
    assert any("mnist_cnn: training" in what for what, _ in progress)


def test_run_keeps_to_its_time(loaded, monkeypatch):
    without_target = functools.partial(compare.train_side_by_side, target_accuracy=2.0)
    monkeypatch.setattr(compare, "train_side_by_side", without_target)
    profile = dataclasses.replace(
        SMALL, seconds=None, epochs=dict.fromkeys(compare.WORKLOADS, 9999)
    )
    start = time.monotonic()
    result = compare.run(loaded, [], profile=profile, hyper=HYPER, limit_s=2.0)
    assert time.monotonic() - start < 30.0  # epochs without end otherwise
    assert [curve.cut_short for curve in result.curves] == [True, True]


def test_a_wrong_backend_is_reported_and_not_timed(loaded, monkeypatch):
    name = next((name for name in backends() if name != "eager"), None)
    if name is None:
        pytest.skip("only eager is available here")
    _wrong(monkeypatch, "relu", 1.01)
    profile = dataclasses.replace(SMALL, seconds={name: 0.01 for name in compare.WORKLOADS})
    result = compare.run(loaded, [name], profile=profile, hyper=HYPER)
    assert not result.ok
    wrong = {check.workload for check in result.parity if not check.ok}
    assert "mnist_cnn" in wrong
    assert [s.backend for s in result.speed if s.workload == "mnist_cnn"] == ["eager"]
