"""The training engine: one optimisation step at a time, so that runs can be interrupted, resumed
bit-identically, and interleaved with one another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyext.nn import SwapRecord
from pyext.optim import Adadelta
from pyext.workloads.data import Data

__all__ = [
    "CheckpointError",
    "Diverged",
    "HyperParameters",
    "TestResult",
    "Training",
    "adadelta",
    "load_checkpoint",
    "run",
    "save_checkpoint",
]

CHECKPOINT_FORMAT = 1
# With 1000, activations leave a CPU's caches: 6.2 s for MNIST's test set, not 2.8 (one core, EPYC).
TEST_BATCH_SIZE = 100
# Reading a loss waits for the GPU; doing it now and then keeps the queue filled.
STEPS_BETWEEN_LOSS_CHECKS_ON_GPU = 50


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class CheckpointError(RuntimeError):
    """A file is no checkpoint of this run."""


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """What a run's course depends on, besides its data and its model.

    Defaults are those of the MNIST program in PyTorch's examples.
    """

    dataset: str = "mnist"
    epochs: int = 14
    batch_size: int = 64
    lr: float = 1.0
    """Adadelta's initial learning rate."""
    gamma: float = 0.7
    """The learning rate is multiplied by this after each epoch."""
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class TestResult:
    """Mean loss and share of right answers (0 to 1) over the whole test set."""

    loss: float
    accuracy: float


class Training:
    """A model in training: its data, loss, optimizer, scheduler, and how far it has come.

    `epoch` epochs are complete, and `step_in_epoch` steps of the next one. The order of the
    examples is a function of the seed and the epoch alone, so it needs no saving.

    Args:
        target: makes the loss's target from labels (N,) int64; by default the labels themselves.
        backend, swapped: the name of the model's backend, and what `swap` did to give it that.
    """

    def __init__(
        self,
        name: str,
        hyper: HyperParameters,
        data: Data,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        target: Callable[[Tensor], Tensor] = lambda labels: labels,
        backend: str = "eager",
        swapped: tuple[SwapRecord, ...] = (),
    ) -> None:
        self.name = name
        self.hyper = hyper
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.target = target
        self.backend = backend
        self.swapped = swapped
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.data = data.to(self.device)
        self.epoch = 0
        self.step_in_epoch = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.tests: list[TestResult] = []
        self._order: tuple[int, Tensor] | None = None
        self._rng: dict[str, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train_images) / self.hyper.batch_size)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def step(self) -> Tensor:
        """Trains on the next batch; returns its loss from before the update, 0-d on the device."""
        self.model.train()
        images, labels = self.next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self.model(images), self.target(labels))
        loss.backward()
        self.optimizer.step()
        loss = loss.detach()
        self.loss_sum += loss
        self.step_in_epoch += 1
        return loss

    @property
    def epoch_is_over(self) -> bool:
        """All steps of the current epoch are done; `end_epoch` comes next."""
        return self.step_in_epoch == self.steps_per_epoch

    def end_epoch(self) -> TestResult:
        """Tests the model, lowers the learning rate and goes on to the next epoch."""
        result = self.test()
        self.tests.append(result)
        self.scheduler.step()
        self.epoch += 1
        self.step_in_epoch = 0
        self.loss_sum.zero_()
        return result

    @property
    def mean_loss(self) -> float:
        """The mean training loss of the current epoch's steps; waits for the device."""
        return self.loss_sum.item() / max(self.step_in_epoch, 1)

    @torch.no_grad()
    def test(self) -> TestResult:
        """Loss and accuracy on the whole test set, with dropout off. Changes nothing."""
        was_training = self.model.training
        self.model.eval()
        images, labels = self.data.test_images, self.data.test_labels
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for some, answers in zip(
            images.split(TEST_BATCH_SIZE), labels.split(TEST_BATCH_SIZE), strict=True
        ):
            output = self.model(self.data.normalize(some, self.dtype))
            loss += self.criterion(output, self.target(answers)) * len(answers)
            correct += (output.argmax(dim=1) == answers).sum()
        self.model.train(was_training)
        return TestResult(loss.item() / len(labels), correct.item() / len(labels))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The images (N, 1, 28, 28) and labels (N,) that the next `step` trains on."""
        if self.epoch_is_over:
            raise RuntimeError("the epoch is over; call end_epoch() before the next step()")
        start = self.step_in_epoch * self.hyper.batch_size
        index = self._epoch_order()[start : start + self.hyper.batch_size]
        images = self.data.train_images.index_select(0, index)
        labels = self.data.train_labels.index_select(0, index)
        return self.data.normalize(images, self.dtype), labels

    def _epoch_order(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.hyper.seed * 100_003 + self.epoch)
            order = torch.randperm(len(self.data.train_images), generator=generator)
            self._order = (self.epoch, order.to(self.device))
        return self._order[1]

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Within it, dropout draws from this run's own stream, wherever others have left theirs."""
        outside = _rng_state(self.device)
        _set_rng_state(self._rng or _seeded(self.hyper.seed, self.device))
        try:
            yield
        finally:
            self._rng = _rng_state(self.device)
            _set_rng_state(outside)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on exactly here; only plain values and
        tensors, so that `torch.load(weights_only=True)` reads it."""
        return {
            "format": CHECKPOINT_FORMAT,
            "workload": self.name,
            "backend": self.backend,
            "hyper_parameters": dataclasses.asdict(self.hyper),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "loss_sum": self.loss_sum,
            "tests": [dataclasses.asdict(result) for result in self.tests],
            "rng": _rng_state(self.device),
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; also sets the global random-number generators."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch = state["epoch"]
        self.step_in_epoch = state["step_in_epoch"]
        self.loss_sum.copy_(state["loss_sum"])
        self.tests = [TestResult(**result) for result in state["tests"]]
        _set_rng_state(state["rng"])


def adadelta(model: nn.Module, hyper: HyperParameters, backend: str) -> torch.optim.Adadelta:
    """`torch.optim.Adadelta` for `eager`, else `pyext.optim.Adadelta`: one pass over a weight."""
    if backend == "eager":
        return torch.optim.Adadelta(model.parameters(), lr=hyper.lr)
    return Adadelta(model.parameters(), lr=hyper.lr, backend=backend)


def run(
    training: Training,
    *,
    on_step: Callable[[Training], None] = lambda training: None,
    on_epoch: Callable[[Training, TestResult], None] = lambda training, result: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains until the last epoch is over; returns False if `should_stop` ended it between steps.

    Raises:
        Diverged: the loss is not finite.
    """
    every = STEPS_BETWEEN_LOSS_CHECKS_ON_GPU if training.device.type == "cuda" else 1
    while training.epoch < training.hyper.epochs:
        while not training.epoch_is_over:
            if should_stop():
                return False
            loss = training.step()
            if training.step_in_epoch % every == 0 or training.epoch_is_over:
                _check_finite(training, loss)
            on_step(training)
        result = training.end_epoch()
        on_epoch(training, result)
    return True


def _check_finite(training: Training, loss: Tensor) -> None:
    # A NaN stays in the weights, so the newest loss speaks for all since the last check.
    if not math.isfinite(value := loss.item()):
        raise Diverged(
            f"the loss is {value} at step {training.step_in_epoch} of epoch {training.epoch + 1} "
            f"(lr {training.hyper.lr:g}); try a smaller --lr"
        )


def save_checkpoint(training: Training, path: Path) -> None:
    """Writes `training.state_dict()`; at any moment `path` is either the old file or the new."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(_on_cpu(training.state_dict()), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, with its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch.load has no common exception for what it cannot read
        raise CheckpointError(f"{path} is not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of format {CHECKPOINT_FORMAT}")
    return state


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_on_cpu(value) for value in state]
    return state


def _seeded(seed: int, device: torch.device) -> dict[str, Tensor]:
    outside = _rng_state(device)
    torch.manual_seed(seed)
    state = _rng_state(device)
    _set_rng_state(outside)
    return state


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
