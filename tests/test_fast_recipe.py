"""The fast MNIST recipe: its course, its rules, and its command line."""

import contextlib
import copy
import dataclasses
import json
import signal
import statistics

import pytest
import torch
import workload_data as tiny
from torch import nn
from torch.nn import functional as F

from pyext import _fast_recipe, train
from pyext.backends import BACKENDS, backends
from pyext.workloads import data, mnist_fast
from pyext.workloads.mnist_fast import FastHyperParameters, FastRun, FastTraining, Resident

FILES = tiny.contents(tiny.arrays())
HYPER = FastHyperParameters(steps=7, batch_size=16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with the tiny data set, and a recipe that fits it."""
    monkeypatch.setitem(data.DATASETS, "mnist", tiny.dataset(FILES))
    monkeypatch.setattr(mnist_fast, "RECIPE", HYPER)
    monkeypatch.setenv("PYEXT_DATA", str(tmp_path / "data"))
    tiny.write(tmp_path / "data", FILES)
    return tmp_path


@pytest.fixture
def resident(folder):
    return Resident.of(data.load("mnist", download=False), "cpu")


# --- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", [mnist_fast.RECIPE, HYPER, FastHyperParameters(steps=1)])
def test_the_learning_rate_rises_once_and_ends_one_step_before_zero(hyper):
    rates = hyper.schedule().double()
    assert rates.shape == (hyper.steps,)
    assert 0 < rates.min() and rates.max() <= hyper.lr * (1 + 1e-6)
    peak = int(rates.argmax())
    directions = rates.diff().sign()
    assert (directions.diff() <= 0).all()  # up, then down
    assert (directions == 0).sum() <= 1  # two steps may lie as far from the peak
    fall = hyper.lr / (1 - hyper.warm_up) / (hyper.steps + 1)
    if hyper.steps > 1:
        assert rates[-1].item() == pytest.approx(fall, rel=1e-5)
        assert abs(peak + 1 - hyper.warm_up * (hyper.steps + 1)) <= 1


def test_it_trains_as_a_loop_by_hand(folder):
    # In float64: Adam divides by the gradients' own size, which turns float32's rounding of a
    # small gradient into a step of full size.
    resident = Resident.of(data.load("mnist", download=False), "cpu", torch.float64)
    training = FastTraining(HYPER, resident)
    model = mnist_fast.FastCNN().double()
    model.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=HYPER.betas, weight_decay=HYPER.weight_decay
    )
    training.prepare()
    training.run()
    for rate, index in zip(HYPER.schedule(), training.batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate.item()
        output = model(resident.train_images[index])
        loss = F.cross_entropy(
            output, resident.train_labels[index], label_smoothing=HYPER.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(training.loss, loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        training.model.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9
    )


def test_preparing_leaves_no_trace(resident):
    prepared, fresh = FastTraining(HYPER, resident), FastTraining(HYPER, resident)
    prepared.prepare()
    for key, value in fresh.model.state_dict().items():
        assert torch.equal(prepared.model.state_dict()[key], value), key
    prepared.run()
    fresh.model.train()
    fresh.run()
    assert torch.equal(prepared.loss, fresh.loss)
    for key, value in fresh.model.state_dict().items():
        assert torch.equal(prepared.model.state_dict()[key], value), key


def test_every_epoch_goes_through_whole_batches_in_another_order(resident):
    training = FastTraining(FastHyperParameters(steps=7, batch_size=20), resident)
    training.draw_batches()
    first, second = training.batches[0:2], training.batches[2:4]
    for epoch in (first, second):
        assert len(set(epoch.flatten().tolist())) == 40
    assert not torch.equal(first, second)
    other = FastTraining(FastHyperParameters(steps=7, batch_size=20, seed=2), resident)
    other.draw_batches()
    assert not torch.equal(other.batches, training.batches)


def test_a_single_step_is_a_run(resident):
    assert mnist_fast.train(FastHyperParameters(steps=1, batch_size=16), resident).train_s > 0


def test_a_run_is_a_function_of_its_seed(resident):
    def weights(seed):
        training = FastTraining(dataclasses.replace(HYPER, seed=seed), resident)
        training.prepare()
        training.run()
        return torch.cat([value.flatten() for value in training.model.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_it_learns(resident):
    run = mnist_fast.train(FastHyperParameters(steps=60, batch_size=16), resident)
    assert run.accuracy > 0.9
    assert run.train_s > 0 and run.prepare_s > 0 and run.test_s > 0 and run.note == ""


class _Watched(torch.Tensor):
    """A tensor that says when anything is made from it."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.reads += 1
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_the_test_set_is_read_once_after_the_last_update(resident, monkeypatch):
    watched = dataclasses.replace(resident, test_images=resident.test_images.as_subclass(_Watched))
    events = []
    step, test = FastTraining.step, FastTraining.test

    def watched_step(self):
        step(self)
        events.append(("step", _Watched.reads))

    def watched_test(self):
        events.append(("test", _Watched.reads))
        return test(self)

    monkeypatch.setattr(_Watched, "reads", 0)
    monkeypatch.setattr(FastTraining, "step", watched_step)
    monkeypatch.setattr(FastTraining, "test", watched_test)
    mnist_fast.train(HYPER, watched)
    assert {reads for _, reads in events} == {0}
    assert [name for name, _ in events].count("test") == 1 and events[-1][0] == "test"
    assert _Watched.reads == 1  # the split into batches


def test_the_validation_split_holds_out_training_images_only(folder):
    whole = data.load("mnist", download=False)
    split, again = mnist_fast.hold_out(whole), mnist_fast.hold_out(whole)
    assert torch.equal(split.test_images, again.test_images)
    assert (len(split.train_images), len(split.test_images)) == (40, 8)
    parts = [
        (*each.flatten().tolist(), int(label))
        for images, labels in (
            (split.train_images, split.train_labels),
            (split.test_images, split.test_labels),
        )
        for each, label in zip(images, labels, strict=True)
    ]
    expected = zip(whole.train_images, whole.train_labels, strict=True)
    assert sorted(parts) == sorted((*x.flatten().tolist(), int(y)) for x, y in expected)


def test_testing_counts_right(resident, monkeypatch):
    monkeypatch.setattr(mnist_fast, "TEST_BATCH_SIZE", 7)
    training = FastTraining(HYPER, resident)
    training.run()
    accuracy = training.test()
    output = training.model.eval()(resident.test_images)
    right = (output.argmax(1) == resident.test_labels).double().mean().item()
    assert accuracy == pytest.approx(right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_as_eager(resident, backend):
    if reason := BACKENDS[backend].unavailable("cpu"):
        pytest.skip(f"{backend}: {reason}")
    hyper = dataclasses.replace(HYPER, batch_size=2)
    agrees, sentence = _fast_recipe.agrees_with_eager(hyper, resident, backend)
    assert agrees and sentence.startswith(f"{backend}: losses within")
    swapped = FastTraining(hyper, resident, backend=backend).swapped
    if backend != "eager":
        assert [entry.was for entry in swapped].count("torch.nn.ReLU") == 3


def test_a_backend_that_trains_otherwise_is_seen(resident, monkeypatch):
    def swap(model, backend):
        model.relu2 = nn.LeakyReLU(1e-6)

    monkeypatch.setattr(mnist_fast, "swap", swap)
    agrees, _ = _fast_recipe.agrees_with_eager(HYPER, resident, "extension")
    assert not agrees


def test_a_training_set_smaller_than_a_batch_is_refused(resident):
    with pytest.raises(ValueError, match="48 training images are fewer than a batch of 49"):
        FastTraining(FastHyperParameters(batch_size=49), resident)


def test_a_loss_that_is_not_finite_is_said(resident):
    with pytest.raises(mnist_fast.Diverged, match="after 7 steps with seed 1"):
        mnist_fast.train(dataclasses.replace(HYPER, lr=float("inf")), resident)


def test_the_flops_are_those_of_convolutions_and_products():
    shapes = {"conv1": (12, 25 * 1 * 8), "conv2": (12, 9 * 8 * 16), "conv3": (4, 9 * 16 * 64)}
    forward = {name: 2 * size**2 * weights for name, (size, weights) in shapes.items()}
    forward["fc"] = 2 * 1024 * 10
    # Backward: the derivative by the weights and, but for the first layer, by the input.
    expected = 3 * sum(forward.values()) - forward["conv1"]
    assert mnist_fast.flops_per_image() == expected


@pytest.mark.parametrize("steps, expected", [(468, 234), (240, 240), (7, 7), (241, 1), (700, 175)])
def test_captured_steps_divide_the_run(steps, expected):
    assert mnist_fast.captured_steps(steps) == expected


class _Stream:
    def wait_stream(self, other):
        pass


def _fake_cuda(monkeypatch, training, capture):
    """Stands in for streams and graphs: `capture` is the context manager that captures, and a graph
    replays by running its steps."""

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1
            for _ in range(training._steps_in_graph):
                training.step()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("works", [True, False])
def test_a_captured_run_is_the_run_step_by_step(resident, monkeypatch, works):
    # The logic around the graph, with a stand-in for the graph: it needs no GPU.
    expected = FastTraining(HYPER, resident)
    expected.prepare()
    expected.run()

    training = FastTraining(HYPER, resident)
    initial = copy.deepcopy(training.model.state_dict())

    @contextlib.contextmanager
    def capture(graph):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    _fake_cuda(monkeypatch, training, capture)
    training.model.train()
    training._capture()
    training._start_again(initial)
    training.run()
    assert torch.equal(training.loss, expected.loss)
    if works:
        assert training.note == "" and training._graph.replays == 1
    else:
        assert "could not be captured (operation not permitted" in training.note


# --- many seeds ----------------------------------------------------------------------------------


def _run(seed, accuracy, train_s=2.0):
    return FastRun(seed, accuracy, train_s, prepare_s=0.1, test_s=0.2, note="")


def test_the_spread_is_the_one_of_the_statistics_module():
    values = [0.9901, 0.9911, 0.9890]
    assert dataclasses.astuple(_fast_recipe.Spread.of(values)) == (
        statistics.fmean(values), statistics.stdev(values), 0.9890, 0.9911,
    )  # fmt: skip
    assert _fast_recipe.Spread.of([0.5]).standard_deviation is None


@pytest.mark.parametrize(
    "count, accuracy, failed, sentence",
    [
        (1, 0.5, False, "mean over 1 seed: 50.000 %, below 99 %; a claim takes 20 seeds"),
        (20, 0.99, False, "mean over 20 seeds: 99.000 %, at or above 99 %"),
        (20, 0.9899, True, "mean over 20 seeds: 98.990 %, below 99 %"),
    ],
)
def test_a_claim_takes_twenty_seeds(count, accuracy, failed, sentence):
    runs = tuple(_run(seed, accuracy) for seed in range(count))
    outcome = _fast_recipe.Outcome(HYPER, "eager", runs, interrupted=False)
    assert outcome.failed is failed and _fast_recipe.verdict(outcome) == sentence


# --- the command line ----------------------------------------------------------------------------


def _main(capsys, *arguments):
    """Exit code, output and error output of `python -m pyext.train mnist --recipe fast ...`."""
    try:
        code = train.main(["mnist", "--recipe", "fast", "--device", "cpu", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_and_the_file(folder, capsys):
    path = folder / "fast.json"
    code, out, _ = _main(capsys, "--seeds", 3, "--seed", 5, "--json", path)
    assert code == 0
    assert "tiny MNIST: 48 training and 20 test images" in out
    assert "backend eager: torch.nn's own modules" in out
    saved = json.loads(path.read_text())
    assert [run["seed"] for run in saved["runs"]] == [5, 6, 7]
    accuracies = [run["accuracy"] for run in saved["runs"]]
    assert saved["accuracy"]["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert saved["train_s"]["greatest"] == max(run["train_s"] for run in saved["runs"])
    assert saved["hyper_parameters"]["steps"] == 7 and saved["hyper_parameters"]["seed"] == 5
    assert saved["environment"]["command"] == (
        "python -m pyext.train mnist --recipe fast --device cpu --seed 5 --seeds 3"
    )
    assert saved["interrupted"] is False and saved["schema"] == _fast_recipe.SCHEMA
    assert str(folder) not in path.read_text()
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for run in saved["runs"]:
        assert cells[str(run["seed"])][:2] == [
            f"{100 * run['accuracy']:.2f} %", f"{run['train_s']:.3f} s",
        ]  # fmt: skip
    for name in ("mean", "standard deviation", "least", "greatest"):
        key = name.replace(" ", "_")
        assert cells[name][:2] == [
            f"{100 * saved['accuracy'][key]:.3f} %", f"{saved['train_s'][key]:.3f} s",
        ]  # fmt: skip


@pytest.mark.parametrize("finished", [0, 2])
def test_a_seed_that_diverges_keeps_those_before_it(folder, capsys, monkeypatch, finished):
    def run(hyper, resident, backend):
        if hyper.seed == 1 + finished:
            raise mnist_fast.Diverged(f"the loss is nan after 7 steps with seed {hyper.seed}")
        return _run(hyper.seed, 0.5)

    monkeypatch.setattr(mnist_fast, "train", run)
    path = folder / "fast.json"
    code, out, err = _main(capsys, "--seeds", 4, "--json", path)
    assert code == 1
    assert f"Stopped: the loss is nan after 7 steps with seed {1 + finished}." in err
    assert path.is_file() == ("mean over 2 seeds" in out) == (finished > 0)
    if finished:
        saved = json.loads(path.read_text())
        assert [each["seed"] for each in saved["runs"]] == [1, 2]
        assert saved["diverged"].startswith("the loss is nan")


def test_validation_leaves_the_test_set_alone(folder, capsys, monkeypatch):
    path = folder / "fast.json"
    tested = []
    test = FastTraining.test
    monkeypatch.setattr(
        FastTraining, "test", lambda self: tested.append(self.data.test_images) or test(self)
    )
    code, out, _ = _main(capsys, "--validation", "--json", path)
    assert code == 0 and "tiny MNIST (validation split): 40 training and 8 test images" in out
    saved = json.loads(path.read_text())
    assert saved["data"] == "tiny MNIST (validation split)"
    assert saved["environment"]["command"].endswith("--validation")
    whole = data.load("mnist", download=False)
    [images] = tested
    held = Resident.of(mnist_fast.hold_out(whole), "cpu").test_images
    assert torch.equal(images, held)


def test_the_same_seed_gives_the_same_accuracy(folder, capsys):
    paths = [folder / "a.json", folder / "b.json"]
    for path in paths:
        assert _main(capsys, "--seeds", 2, "--json", path)[0] == 0
    first, second = (json.loads(path.read_text())["runs"] for path in paths)
    assert [run["accuracy"] for run in first] == [run["accuracy"] for run in second]


def test_with_the_extension(folder, capsys):
    if "extension" not in backends("cpu"):
        pytest.skip(f"extension: {BACKENDS['extension'].unavailable('cpu')}")
    path = folder / "fast.json"
    code, out, _ = _main(capsys, "--backend", "extension", "--json", path)
    assert code == 0 and "extension: losses within" in out
    saved = json.loads(path.read_text())
    assert saved["backend"] == "extension" and len(saved["swapped"]) >= 3


def test_a_backend_that_fails_its_check_is_not_timed(folder, capsys, monkeypatch):
    if "extension" not in backends("cpu"):
        pytest.skip(f"extension: {BACKENDS['extension'].unavailable('cpu')}")
    monkeypatch.setattr(mnist_fast, "parity", lambda *arguments: 1e-3)
    code, out, err = _main(capsys, "--backend", "extension")
    assert code == 1 and "nothing was timed" in err and "standard deviation" not in out


def test_ctrl_c_keeps_the_finished_seeds(folder, capsys, monkeypatch):
    path = folder / "fast.json"
    step, steps = FastTraining.step, 0

    def interrupted(self):
        nonlocal steps
        step(self)
        steps += 1
        if steps == 2 * (HYPER.steps + mnist_fast.WARM_UP_STEPS) + 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FastTraining, "step", interrupted)
    code, out, err = _main(capsys, "--seeds", 5, "--json", path)
    assert code == 130 and "Interrupted after 2 of 5 seeds." in err
    assert "mean over 2 seeds" in out
    saved = json.loads(path.read_text())
    assert [run["seed"] for run in saved["runs"]] == [1, 2] and saved["interrupted"] is True


def test_ctrl_c_before_the_first_seed(folder, capsys, monkeypatch):
    def interrupted(self):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FastTraining, "step", interrupted)
    code, _, err = _main(capsys, "--seeds", 5)
    assert code == 130 and "before the first seed" in err


def test_a_mean_below_the_target_exits_with_1(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        mnist_fast, "train", lambda hyper, data, backend: _run(hyper.seed, accuracy=0.98)
    )
    code, out, _ = _main(capsys, "--seeds", 20)
    assert code == 1 and "below 99 %" in out
    assert _main(capsys, "--seeds", 19)[0] == 0


def test_a_diverging_run_exits_with_1(folder, capsys, monkeypatch):
    monkeypatch.setattr(mnist_fast, "RECIPE", dataclasses.replace(HYPER, lr=float("inf")))
    code, _, err = _main(capsys)
    assert code == 1 and "Stopped: the loss is" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--seeds", "0"), "--seeds: '0' is not an integer of at least 1"),
        (("--seeds", "two"), "--seeds: 'two' is not an integer of at least 1"),
        (("--seed", 2**31 - 1, "--seeds", 2), "--seeds 2: the last seed would be above"),
        (("--dataset", "fashion"), "--dataset fashion does not go with --recipe fast"),
        (("--dataset", "digits"), "--dataset digits does not go with --recipe fast"),
        (("--resume", "run.pt"), "--resume does not go with --recipe fast"),
        (("--save", "run.pt"), "--save does not go with --recipe fast"),
        (("--epochs", 3), "--epochs does not go with --recipe fast"),
        (("--batch-size", 3), "--batch-size does not go with --recipe fast"),
        (("--lr", 0.1), "--lr does not go with --recipe fast"),
        (("--gamma", 0.1), "--gamma does not go with --recipe fast"),
        (("--backend", "all"), "--backend all does not go with --recipe fast"),
        (("--json", "no/such/folder/fast.json"), "--json: there is no folder"),
        (("--json", "."), "--json: . is a folder"),
        (("--recipe", "example", "--seeds", 3), "--seeds goes with --recipe fast"),
        (("--recipe", "example", "--json", "x.json"), "--json goes with --recipe fast"),
        (("--recipe", "example", "--validation"), "--validation goes with --recipe fast"),
        (("--recipe", "slow"), "--recipe"),
    ],
)
def test_wrong_usage(folder, capsys, arguments, message):
    code, _, err = _main(capsys, *arguments)
    assert code == 2 and message in err


def test_missing_data(folder, capsys):
    code, _, err = _main(capsys, "--data-dir", folder / "elsewhere", "--no-download")
    assert code == 3 and "Put its files there." in err


def test_an_interpreted_backend_is_not_timed(folder, capsys, monkeypatch):
    if BACKENDS["triton"].unavailable("cpu") or not BACKENDS["triton"].interpreted:
        pytest.skip("Triton does not run in its interpreter here")
    code, _, err = _main(capsys, "--backend", "triton")
    assert code == 3 and "--recipe fast measures time" in err
