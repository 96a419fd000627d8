"""MNIST to 99 % on the test set in the least time: a small network and a short schedule.

Network and `FastHyperParameters`, the number of steps included, were chosen on the images that
`hold_out` holds out (docs/mnist.md has the evidence). The training uses all 60 000 images, and
`train` reads the test set once, after the last update. The clock runs from initialised weights to
there, with the data on the device; loading, preparing and testing are timed beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyext.nn import SwapRecord, swap
from pyext.workloads.data import Data
from pyext.workloads.engine import Diverged

__all__ = [
    "RECIPE",
    "TARGET_ACCURACY",
    "FastCNN",
    "FastHyperParameters",
    "FastRun",
    "FastTraining",
    "Resident",
    "flops_per_image",
    "hold_out",
    "parity",
    "train",
]

TARGET_ACCURACY = 0.99
TEST_BATCH_SIZE = 500
VALIDATION_SEED = 2024
WARM_UP_STEPS = 3
# A graph holds a few tens of kernels for each step; an epoch's steps are enough to hide its launch.
MOST_CAPTURED_STEPS = 240
PARITY_STEPS = 3


# 1. Hyper-parameters.
@dataclasses.dataclass(frozen=True)
class FastHyperParameters:
    """What a run's course depends on, besides its data."""

    steps: int = 468
    batch_size: int = 128
    lr: float = 0.02
    """AdamW's learning rate at its peak; it rises to it from 0 and falls to 0, both linearly."""
    warm_up: float = 0.3
    """The share of the steps in which the learning rate rises."""
    betas: tuple[float, float] = (0.7, 0.95)
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    seed: int = 1

    def schedule(self) -> Tensor:
        """The learning rate of each step: (steps,) float32.

        The rates of 0 at both ends are one step before the first and one after the last, so that
        no step is wasted on them.
        """
        at = torch.arange(1, self.steps + 1, dtype=torch.float64) / (self.steps + 1)
        rising, falling = at / self.warm_up, (1 - at) / (1 - self.warm_up)
        return (self.lr * torch.minimum(rising, falling)).float()


RECIPE = FastHyperParameters()


# 2. Data.
def hold_out(data: Data) -> Data:
    """A sixth of the training images, always the same, in the place of the test set, which is left
    out: 50 000 and 10 000 of MNIST's."""
    count = len(data.train_images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    held, kept = order[: count // 6], order[count // 6 :]
    return dataclasses.replace(
        data,
        title=f"{data.title} (validation split)",
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


@dataclasses.dataclass(frozen=True)
class Resident:
    """Normalised images and their labels on the device where they are trained on.

    Shapes and dtypes: images (N, 1, 28, 28) float32, labels (N,) int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def of(
        cls, data: Data, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Resident:
        """`data` on `device`, normalised there."""
        data = data.to(device)
        return cls(
            data.normalize(data.train_images, dtype),
            data.train_labels,
            data.normalize(data.test_images, dtype),
            data.test_labels,
        )


# 3. The network.
class FastCNN(nn.Module):
    """Three convolutions whose outputs stay small: a stride, then a pooling, come before anything
    elementwise.

    conv 5×5/2 1→8, BN, ReLU | conv 3×3 8→16, max-pool, BN, ReLU | conv 3×3 16→64, BN, ReLU |
    fc 1024→10.

    Shape: (N, 1, 28, 28) → (N, 10), logits.
    """

    def __init__(self) -> None:
        super().__init__()
        # Batch normalisation has the bias.
        self.conv1 = nn.Conv2d(1, 8, 5, stride=2, bias=False)  # → 12×12
        self.norm1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.pool2 = nn.MaxPool2d(2)  # → 6×6
        self.norm2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 64, 3, bias=False)  # → 4×4
        self.norm3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.fc = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu1(self.norm1(self.conv1(images)))
        features = self.relu2(self.norm2(self.pool2(self.conv2(features))))
        features = self.relu3(self.norm3(self.conv3(features)))
        return self.fc(features.flatten(1))


class FastTraining:
    """A model in training. All that a step reads lies in tensors on the device, its number and its
    learning rate too, so that a CUDA graph can replay it.

    Args:
        backend: `"eager"` leaves `torch.nn`'s modules; another name swaps them.

    Raises:
        ValueError: the training set is smaller than a batch.
        ValueError, RuntimeError: as `pyext.nn.swap` does for the backend.
    """

    def __init__(
        self,
        hyper: FastHyperParameters,
        data: Resident,
        *,
        backend: str = "eager",
    ) -> None:
        if len(data.train_images) < hyper.batch_size:
            raise ValueError(
                f"{len(data.train_images)} training images are fewer than a batch of "
                f"{hyper.batch_size}"
            )
        self.hyper, self.data = hyper, data
        self.device, dtype = data.train_images.device, data.train_images.dtype
        on_gpu = self.device.type == "cuda"
        # The same seed gives the same weights on every device and in every dtype.
        torch.manual_seed(hyper.seed)
        model = FastCNN().to(self.device, dtype)
        self.model = model.to(memory_format=torch.channels_last)
        self.swapped: SwapRecord | None = None if backend == "eager" else swap(model, backend)

        # 4. Loss and optimizer. Fused: one call for all parameters, and one that a graph can hold.
        self.criterion = nn.CrossEntropyLoss(label_smoothing=hyper.label_smoothing)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=torch.zeros((), device=self.device),
            betas=hyper.betas,
            weight_decay=hyper.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        # 5. Scheduler: a table on the device.
        self.schedule = hyper.schedule().to(self.device)
        self.batches = torch.zeros(
            hyper.steps, hyper.batch_size, dtype=torch.int64, device=self.device
        )
        self.step_index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), dtype=dtype, device=self.device)
        """The last step's, from before its update."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps_in_graph = 1
        self.note = ""
        """Why the steps are not captured where they should be."""

    def prepare(self) -> None:
        """What needs to be done once, outside the clock: libraries choose their kernels and, on a
        GPU, the steps are captured. The weights are afterwards what they were before."""
        initial = copy.deepcopy(self.model.state_dict())
        self.model.train()
        if self.device.type == "cuda":
            self._capture()
        else:
            self._warm_up()
        self._start_again(initial)

    def draw_batches(self) -> None:
        """The order of the examples: whole batches of one random permutation after another."""
        generator = torch.Generator().manual_seed(self.hyper.seed)
        size, count = self.hyper.batch_size, len(self.data.train_images)
        per_epoch = count // size
        epochs = math.ceil(self.hyper.steps / per_epoch)
        orders = [
            torch.randperm(count, generator=generator)[: per_epoch * size] for _ in range(epochs)
        ]
        self.batches.copy_(torch.cat(orders).view(-1, size)[: self.hyper.steps])

    def step(self) -> None:
        """Trains on the next batch."""
        index = self.batches.index_select(0, self.step_index).view(-1)
        images = self.data.train_images.index_select(0, index)
        labels = self.data.train_labels.index_select(0, index)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self.schedule.index_select(0, self.step_index).view(()))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        self.step_index += 1

    # 6. Train ...
    def run(self) -> None:
        """From the weights as they are through all steps."""
        self.draw_batches()
        for _ in range(self.hyper.steps // self._steps_in_graph):
            if self._graph is None:
                self.step()
            else:
                self._graph.replay()

    # ... and test.
    @torch.no_grad()
    def test(self) -> float:
        """The share of right answers (0 to 1) on the test set."""
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in zip(
            self.data.test_images.split(TEST_BATCH_SIZE),
            self.data.test_labels.split(TEST_BATCH_SIZE),
            strict=True,
        ):
            correct += (self.model(images).argmax(dim=1) == labels).sum()
        return correct.item() / len(self.data.test_labels)

    def _warm_up(self) -> None:
        for _ in range(min(WARM_UP_STEPS, self.hyper.steps)):
            self.step()
        self.step_index.zero_()

    def _capture(self) -> None:
        """Captures as many steps as divide the run; without a graph, `note` says why."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._warm_up()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        steps, graph = captured_steps(self.hyper.steps), torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                for _ in range(steps):
                    self.step()
        except RuntimeError as error:
            self.note = f"the steps run one by one: they could not be captured ({error})"
        else:
            self._graph, self._steps_in_graph = graph, steps

    def _start_again(self, initial: dict[str, Tensor]) -> None:
        """In place: a graph keeps the addresses of what it updates."""
        self.model.load_state_dict(initial)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.step_index.zero_()
        self.optimizer.zero_grad(set_to_none=self._graph is None)


@dataclasses.dataclass(frozen=True)
class FastRun:
    """One seed's run. Times are in seconds, host clock."""

    seed: int
    accuracy: float
    """On the test set, 0 to 1."""
    train_s: float
    """From initialised weights to the last update."""
    prepare_s: float
    """Making the network, the libraries' first calls, and on a GPU the capture."""
    test_s: float
    note: str
    """Why the steps were not captured on a GPU."""


def train(hyper: FastHyperParameters, data: Resident, *, backend: str = "eager") -> FastRun:
    """One whole run: prepare, train against the clock, test once.

    Raises:
        Diverged: the loss is not finite.
        ValueError, RuntimeError: as `FastTraining` does.
    """
    start = time.perf_counter()
    training = FastTraining(hyper, data, backend=backend)
    training.prepare()
    _synchronize(training.device)
    ready = time.perf_counter()
    training.run()
    _synchronize(training.device)
    trained = time.perf_counter()
    if not math.isfinite(loss := training.loss.item()):
        raise Diverged(f"the loss is {loss} after {hyper.steps} steps with seed {hyper.seed}")
    begin_test = time.perf_counter()
    accuracy = training.test()
    tested = time.perf_counter()
    return FastRun(
        hyper.seed,
        accuracy,
        train_s=trained - ready,
        prepare_s=ready - start,
        test_s=tested - begin_test,
        note=training.note,
    )


def captured_steps(steps: int) -> int:
    """How many steps go into a graph: the most that divide the run, up to an epoch's."""
    return max(n for n in range(1, MOST_CAPTURED_STEPS + 1) if steps % n == 0)


def parity(hyper: FastHyperParameters, data: Resident, backend: str) -> float:
    """How far a backend's first losses are from `eager`'s, both in float64: the largest relative
    difference."""
    hyper = dataclasses.replace(hyper, batch_size=min(hyper.batch_size, 64))
    double = dataclasses.replace(
        data,
        train_images=data.train_images[: PARITY_STEPS * hyper.batch_size].double(),
        train_labels=data.train_labels[: PARITY_STEPS * hyper.batch_size],
    )

    def losses(name: str) -> Tensor:
        training = FastTraining(hyper, double, backend=name)
        training.draw_batches()
        found = []
        for _ in range(PARITY_STEPS):
            training.step()
            found.append(training.loss.clone())
        return torch.stack(found)

    expected = losses("eager")
    return ((losses(backend) - expected).abs() / expected.abs()).max().item()


def flops_per_image() -> int:
    """FLOPs of a training step's convolutions and products, forward and backward, per image."""
    model = FastCNN()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 1, 28, 28)).sum().backward()
    return counter.get_total_flops() // 2


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
