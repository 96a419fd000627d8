"""What the backends change in a whole training run: the same numbers first, then the time of a
step, the share of it that the lab's ops could win at all, and the training curves.

Every variant trains a copy of its own of the same model, from the same weights on the same batches
from the same random numbers. `eager` is the model as `torch.nn` makes it; the others are `swap`ped,
and then drop other elements for the same seed.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from pyext.backends import BACKENDS
from pyext.lab import measure
from pyext.nn import swap
from pyext.workloads import mnist_cnn, mnist_mlp
from pyext.workloads.data import Data
from pyext.workloads.engine import HyperParameters, Training

__all__ = [
    "Comparison",
    "Curve",
    "Parity",
    "Profile",
    "PROFILES",
    "Share",
    "Speed",
    "TestPoint",
    "check_curve",
    "check_float64",
    "check_parity",
    "check_relu_bitwise",
    "measure_share",
    "run",
    "train_side_by_side",
]

WORKLOADS: dict[str, ModuleType] = {module.NAME: module for module in (mnist_cnn, mnist_mlp)}
DEFAULTS = HyperParameters()
FLOAT64_LIMIT = 1e-9
CURVE_FACTOR = 3
REORDERINGS = 3
CURVE_SEEDS = 3
TARGET_ACCURACY = 0.99
BLOCK_S = 0.25
"""Variants take turns after this long: short against the machine's moods, long against the clock's
own cost."""
MIN_BLOCKS = 5
# The threads of the variant before keep spinning for about this long after their last work.
SETTLE_S = 5e-3
# A GPU needs about this long to reach its working clock; a CPU to fill its caches and pools.
WARM_UP_S = {"cuda": 1.0, "cpu": 0.3}
# Triton's interpreter runs a thousand times slower, and nothing is timed there.
INTERPRETED_BATCH_SIZE = 2

# (what is going on, the share of the whole that is done, 0 to 1)
Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Parity:
    """Whether a backend trains as `eager` does. Distances are between loss curves: the largest
    |loss − eager's| / |eager's| over the steps."""

    workload: str
    check: str
    """`relu_bitwise`, `float64` or `float32_curve`."""
    backend: str
    device: str
    dtype: str
    steps: int
    batch_size: int
    distance: float
    limit: float
    ok: bool
    interpreted: bool
    detail: str
    when: str = "before"
    """`before` or `after` the timing."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """The time of one training step (batch, forward, loss, backward, update), host clock."""

    workload: str
    backend: str
    device: str
    dtype: str
    batch_size: int
    steps: int
    """How many steps were timed."""
    block_s: tuple[float, ...]
    """Seconds per step of each block; blocks with the same index ran next to each other."""
    median_s: float
    p20_s: float
    p80_s: float
    ratio_vs_eager: float
    """eager's time / this one's: above 1 is faster than eager."""
    ratio_ci: tuple[float, float]
    """95 % bootstrap interval of the ratio."""
    page_faults_per_step: float
    """Of the process, none of which reads a disk: how often a step touches memory that is fresh
    from the operating system."""

    @property
    def steps_per_s(self) -> float:
        return 1 / self.median_s

    @property
    def images_per_s(self) -> float:
        return self.batch_size / self.median_s


@dataclasses.dataclass(frozen=True)
class TestPoint:
    """A test in the course of training, after `step` steps (`epoch` epochs, maybe a fraction)."""

    step: int
    epoch: float
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """How one variant's training went: the loss of every step, and the tests."""

    workload: str
    backend: str
    losses: tuple[float, ...]
    tests: tuple[TestPoint, ...]
    cut_short: bool = False
    """Whether the time was used up before the end of the training."""


@dataclasses.dataclass(frozen=True)
class Share:
    """How much of an `eager` step the ops that `swap` replaces take, from torch.profiler."""

    workload: str
    device: str
    batch_size: int
    step_s: float
    """Under the profiler, which makes small ops longer than they are."""
    op_s: dict[str, float]
    """Seconds per step of each swapped op, forward and backward, on the host clock."""
    op_device_s: dict[str, float]
    """The same on the GPU; empty on a CPU."""
    share: float
    """Of the step's time; on a GPU the larger of its share of the host's and of the device's."""

    @property
    def bound(self) -> float:
        """Amdahl: how many times faster a step would be if the swapped ops cost nothing and the
        others the same as before (they may find other memory: see `Speed.page_faults_per_step`)."""
        return 1 / (1 - self.share) if self.share < 1 else float("inf")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that `run` found out."""

    data: str
    """The data's title, to show beside every number."""
    parity: tuple[Parity, ...]
    speed: tuple[Speed, ...]
    curves: tuple[Curve, ...]
    shares: tuple[Share, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.parity)


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much `run` does."""

    parity_steps: int = 20
    parity_batch_size: int = 64
    share_steps: int = 10
    seconds: Mapping[str, float] | None = None
    """Workload → seconds of side-by-side training for each variant; None trains whole epochs."""
    epochs: Mapping[str, int] | None = None
    """Workload → most epochs, ended earlier once every variant reaches `TARGET_ACCURACY`."""


PROFILES = {
    "quick": Profile(parity_batch_size=16, seconds={mnist_cnn.NAME: 5.0, mnist_mlp.NAME: 1.5}),
    "full": Profile(epochs={mnist_cnn.NAME: HyperParameters.epochs, mnist_mlp.NAME: 2}),
}


def run(
    data: Data,
    backends: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    profile: Profile = PROFILES["quick"],
    hyper: HyperParameters = DEFAULTS,
    limit_s: float | None = None,
    progress: Progress = lambda what, done: None,
) -> Comparison:
    """The whole comparison: parity, then speed and curves together, the share, and parity again.

    A backend that fails the parity checks is not timed. An interpreted one is checked on small
    batches and never timed.

    Args:
        backends: names besides `eager`, which is always there.
        limit_s: the trainings are cut short so that all of it takes about so many seconds, where
            the checks leave them that.

    Raises:
        RuntimeError: a backend is not available on `device`.
    """
    device = torch.device(device)
    begin = time.monotonic()
    others = [name for name in backends if name != "eager"]
    parity: list[Parity] = []
    speed: list[Speed] = []
    curves: list[Curve] = []
    shares: list[Share] = []
    for index, name in enumerate(WORKLOADS):

        def report(what: str, done: float, *, index: int = index, name: str = name) -> None:
            progress(f"{name}: {what}", (index + done) / len(WORKLOADS))

        checks, checks_begin = [], time.monotonic()
        for backend in others:
            report(f"{backend} against eager", 0.0)
            checks += check_parity(name, data, backend, device=device, profile=profile)
        checks_s = time.monotonic() - checks_begin
        wrong = {check.backend for check in checks if not check.ok}
        timed = ["eager"] + [
            backend
            for backend in others
            if backend not in wrong and not _is_interpreted(backend, device)
        ]
        trainings = {
            backend: WORKLOADS[name].prepare(hyper, data, backend=backend, device=device)
            for backend in timed
        }
        training_s = None
        if limit_s is not None:
            # Of what the checks leave: two rounds for each network, of which this one's first is
            # over. It is divided as the quick profile's seconds are.
            rounds = 2 * (len(WORKLOADS) - index) - 1
            left_s = begin + limit_s - time.monotonic() - rounds * checks_s
            wanted = PROFILES["quick"].seconds
            rest = sum(wanted[each] for each in list(WORKLOADS)[index:])
            training_s = max(left_s * wanted[name] / rest, 0.0)
        new_speed, new_curves = train_side_by_side(
            trainings,
            seconds=profile.seconds[name] if profile.seconds else None,
            epochs=profile.epochs[name] if profile.epochs else hyper.epochs,
            limit_s=training_s,
            progress=lambda what, done, report=report: report(what, 0.2 + 0.6 * done),
        )
        report("the share of the swapped ops", 0.8)
        shares.append(measure_share(name, data, device=device, steps=profile.share_steps))
        for backend in timed[1:]:
            report(f"{backend} against eager, again", 0.9)
            again = check_parity(name, data, backend, device=device, profile=profile)
            checks += [dataclasses.replace(check, when="after") for check in again]
        parity += checks
        speed += new_speed
        curves += new_curves
    return Comparison(data.title, tuple(parity), tuple(speed), tuple(curves), tuple(shares))


def check_parity(
    workload: str,
    data: Data,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    profile: Profile = PROFILES["quick"],
) -> list[Parity]:
    """Every parity check that applies to the workload on this device.

    Bit-identity is asked of the CPU only: on a GPU two eager runs need not have it.
    """
    device = torch.device(device)
    batch_size = profile.parity_batch_size
    if _is_interpreted(backend, device):
        batch_size = INTERPRETED_BATCH_SIZE
    arguments = (workload, data, backend)
    options = {"device": device, "steps": profile.parity_steps, "batch_size": batch_size}
    checks = [check_float64(*arguments, **options), check_curve(*arguments, **options)]
    if device.type == "cpu":
        checks.insert(0, check_relu_bitwise(*arguments, **options))
    return checks


def check_relu_bitwise(
    workload: str,
    data: Data,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    steps: int = 20,
    batch_size: int = 64,
) -> Parity:
    """float32, only the ReLUs swapped: losses and final weights equal `eager`'s bit for bit.

    ReLU rounds nothing, so any difference is an error.
    """
    hyper = HyperParameters(batch_size=batch_size)
    reference = WORKLOADS[workload].prepare(hyper, data, device=device)
    training = WORKLOADS[workload].prepare(hyper, data, device=device)
    replaced = sum(
        len(swap(module, backend)) for module in training.model.modules() if type(module) is nn.ReLU
    )
    expected, actual = _losses(reference, steps), _losses(training, steps)
    same_weights = all(
        torch.equal(a, b)
        for a, b in zip(
            reference.model.state_dict().values(),
            training.model.state_dict().values(),
            strict=True,
        )
    )
    same = torch.equal(expected, actual) and same_weights
    return _parity(
        training,
        "relu_bitwise",
        backend,
        steps,
        _distance(expected, actual),
        0.0,
        same,
        f"{replaced} ReLU swapped; losses and weights "
        + ("bit-identical" if same else "not bit-identical"),
    )


def check_float64(
    workload: str,
    data: Data,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    steps: int = 20,
    batch_size: int = 64,
) -> Parity:
    """float64, everything swapped: the loss curve agrees with `eager`'s to a relative 1e-9.

    `eager` here drops what the lab's backends drop (see `_dropping_alike`).
    """
    hyper = HyperParameters(batch_size=batch_size)
    prepare, options = WORKLOADS[workload].prepare, {"device": device, "dtype": torch.float64}
    expected = _losses(_dropping_alike(prepare(hyper, data, **options)), steps)
    training = _swapped(prepare(hyper, data, backend=backend, **options))
    distance = _distance(expected, _losses(training, steps))
    return _parity(
        training,
        "float64",
        backend,
        steps,
        distance,
        FLOAT64_LIMIT,
        distance <= FLOAT64_LIMIT,
        f"largest relative difference of a loss {distance:.1e}",
    )


def check_curve(
    workload: str,
    data: Data,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    steps: int = 20,
    batch_size: int = 64,
) -> Parity:
    """float32, everything swapped: the loss curve stays as near to `eager`'s as rounding allows.

    `eager` here drops what the lab's backends drop (see `_dropping_alike`).

    How near that is, is measured: `eager` trains again, on the same batches and with the same
    dropout, but with the sums over a batch and over a layer's inputs in another order. The limit
    is three times the median distance of three such runs. (Other thread counts re-order sums as
    well, but fewer of them, and not on a machine with one core.)

    Sometimes an activation so near to zero is rounded to its other side, and from there the curves
    part by orders of magnitude. The median keeps one such run of the three from setting the limit.
    Where it happened to the backend's run and not to most of the three, it says nothing about the
    backend, so another seed decides; only a backend that is too far off with every seed fails.
    """
    prepare = WORKLOADS[workload].prepare
    for seed in range(1, CURVE_SEEDS + 1):
        hyper = HyperParameters(batch_size=batch_size, seed=seed)

        def reference(hyper: HyperParameters = hyper) -> Training:
            return _dropping_alike(prepare(hyper, data, device=device))

        expected = _losses(reference(), steps)
        noise = statistics.median(
            _distance(expected, _losses(_reordered(reference(), i), steps))
            for i in range(REORDERINGS)
        )
        training = _swapped(prepare(hyper, data, backend=backend, device=device))
        distance = _distance(expected, _losses(training, steps))
        if distance <= CURVE_FACTOR * noise:
            break
    return _parity(
        training,
        "float32_curve",
        backend,
        steps,
        distance,
        CURVE_FACTOR * noise,
        distance <= CURVE_FACTOR * noise,
        f"{distance:.1e} from eager; re-ordered eager runs are {noise:.1e} apart"
        f" (seed {seed} of {CURVE_SEEDS})",
    )


def train_side_by_side(
    trainings: Mapping[str, Training],
    *,
    epochs: int,
    seconds: float | None = None,
    limit_s: float | None = None,
    target_accuracy: float = TARGET_ACCURACY,
    progress: Progress = lambda what, done: None,
) -> tuple[list[Speed], list[Curve]]:
    """Trains the variants in turns, block by block, all the same steps, and times every block.

    Args:
        trainings: variant → its training; one of them is `eager`.
        epochs: stop after so many,
        seconds: or when each variant has trained for so long on average;
        limit_s: cut it short, tests included, after about so many seconds on the clock and no fewer
            than `MIN_BLOCKS` blocks;
        target_accuracy: without `seconds`, stop after the epoch in which all variants reach it on
            the test set.
    """
    begin = time.monotonic()
    first = next(iter(trainings.values()))
    steps_in_all = epochs * first.steps_per_epoch
    losses: dict[str, list[Tensor]] = {name: [] for name in trainings}
    tests: dict[str, list[TestPoint]] = {name: [] for name in trainings}
    test_s, cut_short = None, False
    blocks: dict[str, list[float]] = {name: [] for name in trainings}
    faults: Counter[str] = Counter()

    def train(name: str, steps: int) -> float:
        training = trainings[name]
        if training.device.type == "cpu":
            time.sleep(SETTLE_S)
        with training.own_random_numbers():
            _synchronize(training.device)
            faults_before = _page_faults()
            start = time.perf_counter()
            losses[name] += [training.step() for _ in range(steps)]
            _synchronize(training.device)
            elapsed_s = time.perf_counter() - start
            faults[name] += _page_faults() - faults_before
            return elapsed_s

    def test() -> None:
        nonlocal test_s
        start = time.monotonic()
        for name, training in trainings.items():
            result = training.end_epoch() if training.epoch_is_over else training.test()
            step = training.steps_done
            epoch = step / training.steps_per_epoch
            tests[name].append(TestPoint(step, epoch, result.loss, result.accuracy))
        test_s = time.monotonic() - start

    block_steps = _warm_up(trainings, train)
    warm_up_steps = first.steps_done
    faults.clear()
    names, trained_s, turn = list(trainings), 0.0, 0
    while first.steps_done < steps_in_all and (
        seconds is None or trained_s < seconds or len(blocks["eager"]) < MIN_BLOCKS
    ):
        if limit_s is not None and len(blocks["eager"]) >= MIN_BLOCKS:
            # Until a test has shown how long it takes: one forward is about a third of a step.
            batches = len(first.data.test_images) / first.hyper.batch_size
            expected_s = sum(times[-1] for times in blocks.values()) * batches / 3
            cut_short = time.monotonic() - begin > limit_s - (test_s or expected_s)
            if cut_short:
                break
        steps = min(block_steps, first.steps_per_epoch - first.step_in_epoch)
        for offset in range(len(names)):
            # Rotating who goes first spreads whatever a predecessor leaves in caches and clocks.
            name = names[(turn + offset) % len(names)]
            block_s = train(name, steps)
            trained_s += block_s / len(names)
            if steps == block_steps:
                blocks[name].append(block_s / steps)
        turn += 1
        if first.epoch_is_over:
            test()
            reached = all(points[-1].accuracy >= target_accuracy for points in tests.values())
            if seconds is None and reached:
                break
        done = first.steps_done / steps_in_all if seconds is None else trained_s / seconds
        progress(f"training {', '.join(names)} side by side", min(done, 1.0))
    if first.step_in_epoch:
        progress("testing", 1.0)
        test()

    speeds = [
        _speed(
            training,
            name,
            block_steps,
            blocks[name],
            blocks["eager"],
            faults[name] / max(training.steps_done - warm_up_steps, 1),
        )
        for name, training in trainings.items()
    ]
    curves = [
        Curve(training.name, name, tuple(_to_list(losses[name])), tuple(tests[name]), cut_short)
        for name, training in trainings.items()
    ]
    return speeds, curves


def measure_share(
    workload: str,
    data: Data,
    *,
    device: torch.device | str = "cpu",
    steps: int = 10,
    batch_size: int = 64,
) -> Share:
    """Profiles `eager` steps and adds up what `swap` would replace, forward and backward."""
    hyper = HyperParameters(batch_size=batch_size)
    training = WORKLOADS[workload].prepare(hyper, data, device=device)
    on_gpu = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with training.own_random_numbers():
        for _ in range(3):
            _next_step(training)
        _synchronize(training.device)
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function(_STEP):
                    _next_step(training)
            _synchronize(training.device)

    swapped = _swapped_events(training)
    step_s, host, on_device, device_s = 0.0, dict.fromkeys(swapped, 0.0), {}, 0.0
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.name == _STEP:
            step_s += event.cpu_time_total / 1e6 / steps
        device_s += event.self_device_time_total / 1e6 / steps
        for op, names in swapped.items():
            if event.name in names:
                host[op] += event.cpu_time_total / 1e6 / steps
                if on_gpu:
                    kernels_s = event.device_time_total / 1e6 / steps
                    on_device[op] = on_device.get(op, 0.0) + kernels_s
    shares = [sum(host.values()) / step_s]
    if device_s > 0:
        shares.append(sum(on_device.values()) / device_s)
    return Share(
        workload, str(training.device), batch_size, step_s, host, on_device, min(max(shares), 1.0)
    )


_STEP = "training step"
_BACKWARD = "autograd::engine::evaluate_function: "
# The outermost profiler events of what `swap` replaces; none of them contains another.
_EVENTS = {
    nn.ReLU: ("relu", ("aten::relu", f"{_BACKWARD}ReluBackward0")),
    # Where there is no kernel of its own (on a CPU), its derivative is the product's.
    nn.Dropout: (
        "dropout",
        ("aten::dropout", *(f"{_BACKWARD}{name}Backward0" for name in ("NativeDropout", "Mul"))),
    ),
    nn.MSELoss: ("mse_loss", ("aten::mse_loss", f"{_BACKWARD}MseLossBackward0")),
    # (Its ReLU is counted with the others.)
    nn.MaxPool2d: (
        "relu_max_pool2d",
        ("aten::max_pool2d", f"{_BACKWARD}MaxPool2DWithIndicesBackward0"),
    ),
    torch.optim.Adadelta: ("adadelta_step", ("Optimizer.step#Adadelta.step",)),
    nn.Linear: (
        "two_layer",
        ("aten::linear", *(f"{_BACKWARD}{name}Backward0" for name in ("Addmm", "T", "Linear"))),
    ),
}


def _swapped_events(training: Training) -> dict[str, tuple[str, ...]]:
    """Op → the profiler events that it would replace in this (not yet swapped) training."""
    kinds = {
        type(module) for root in (training.model, training.criterion) for module in root.modules()
    }
    kinds.add(type(training.optimizer))
    kinds.discard(nn.Linear)  # alone it stays what it is
    fused = [m for m in training.model.modules() if type(m) is nn.Sequential and len(m) == 3]
    if fused:
        kinds.add(nn.Linear)
    return {op: names for kind, (op, names) in _EVENTS.items() if kind in kinds}


def _losses(training: Training, steps: int) -> Tensor:
    """The losses of the next steps, whatever epoch they are in: (steps,), float64, on the CPU."""
    losses = []
    with training.own_random_numbers():
        for _ in range(steps):
            losses.append(_next_step(training))
    return torch.stack(losses).double().cpu()


def _next_step(training: Training) -> Tensor:
    if training.epoch_is_over:
        training.end_epoch()
    return training.step()


def _distance(expected: Tensor, actual: Tensor) -> float:
    """The largest relative difference between two loss curves."""
    return ((actual - expected).abs() / expected.abs()).max().item()


def _dropping_alike(training: Training) -> Training:
    """The same training in `torch.nn`'s own modules, but for dropout, which is the lab's in eager
    ops: it drops what every backend drops for the same seed."""
    for module in list(training.model.modules()):
        if type(module) is nn.Dropout:
            swap(module, "eager")
    return training


def _swapped(training: Training) -> Training:
    """The training itself; `eager`'s, in which nothing is swapped, drops as its reference does."""
    return _dropping_alike(training) if training.backend == "eager" else training


def _reordered(training: Training, seed: int) -> Training:
    """The same training with its sums in another order, which changes nothing but their rounding.

    The examples of every batch change places (each keeps its dropout mask), and so do the input
    features or channels of every layer, together with the weights that they meet.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(length: int) -> Tensor:
        return torch.randperm(length, generator=generator).to(training.device)

    next_batch = training.next_batch
    order = inverse = torch.empty(0)

    def permuted_batch() -> tuple[Tensor, Tensor]:
        nonlocal order, inverse
        images, labels = next_batch()
        order = shuffled(len(labels))
        inverse = order.argsort()
        return images[order], labels[order]

    training.next_batch = permuted_batch
    for module in training.model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(lambda _, inputs: inputs[0][inverse])
            module.register_forward_hook(lambda _, inputs, output: output[order])
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            features = shuffled(module.weight.shape[1])
            module.weight.data = module.weight.data[:, features].contiguous()
            module.register_forward_pre_hook(
                lambda _, inputs, features=features: inputs[0][:, features]
            )
    return training


def _parity(
    training: Training,
    check: str,
    backend: str,
    steps: int,
    distance: float,
    limit: float,
    ok: bool,
    detail: str,
) -> Parity:
    return Parity(
        training.name,
        check,
        backend,
        str(training.device),
        str(training.dtype).removeprefix("torch."),
        steps,
        training.hyper.batch_size,
        distance,
        limit,
        ok,
        _is_interpreted(backend, training.device),
        detail,
    )


def _warm_up(trainings: Mapping[str, Training], train: Callable[[str, int], float]) -> int:
    """Trains all variants until the machine is warm; returns how many steps make a block."""
    first = next(iter(trainings.values()))
    elapsed, shortest = 0.0, float("inf")
    # These steps belong to the curves; half an epoch leaves steps to be timed.
    while first.step_in_epoch < max(1, first.steps_per_epoch // 2):
        for name in trainings:
            step_s = train(name, 1)
            elapsed += step_s
            shortest = min(shortest, step_s)
        if elapsed > WARM_UP_S[first.device.type] * len(trainings) and first.step_in_epoch >= 3:
            break
    return max(1, min(round(BLOCK_S / shortest), first.steps_per_epoch // 4))


def _speed(
    training: Training,
    name: str,
    block_steps: int,
    block_s: Sequence[float],
    eager_block_s: Sequence[float],
    page_faults_per_step: float,
) -> Speed:
    # One sample per block: a bootstrap over whole turns keeps neighbours together, so that what
    # slowed both cancels in the ratio.
    samples, eager = (
        measure.Samples(np.array(times)[:, None], block_steps) for times in (block_s, eager_block_s)
    )
    ratio = measure.speedup(eager, samples, paired=True, seed=training.hyper.seed)
    return Speed(
        training.name,
        name,
        str(training.device),
        str(training.dtype).removeprefix("torch."),
        training.hyper.batch_size,
        block_steps * len(block_s),
        tuple(block_s),
        samples.median,
        samples.quantile(0.2),
        samples.quantile(0.8),
        ratio.value,
        (ratio.low, ratio.high),
        page_faults_per_step,
    )


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _to_list(losses: list[Tensor]) -> list[float]:
    return torch.stack(losses).cpu().tolist() if losses else []


def _is_interpreted(backend: str, device: torch.device) -> bool:
    return BACKENDS[backend].interpreted


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
