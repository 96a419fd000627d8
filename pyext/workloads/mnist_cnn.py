"""The MNIST CNN of PyTorch's examples, in the seven steps of every training program.

1. Hyper-parameters (`engine.HyperParameters`) and 2. data (`data.load`) are what `prepare` takes;
it does 3. the network, 4. loss and optimizer and 5. the scheduler. `train` does 6. train and test,
and 7. save.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pyext.nn import swap
from pyext.workloads import engine
from pyext.workloads.data import Data
from pyext.workloads.engine import HyperParameters, TestResult, Training

__all__ = ["NAME", "MnistCNN", "prepare", "train"]

NAME = "mnist_cnn"


class MnistCNN(nn.Module):
    """conv 1→32, ReLU, conv 32→64, ReLU, max-pool, dropout, fc 9216→128, ReLU, dropout, fc 128→10.

    Its parameters have the names that they have in PyTorch's example, which can load them.

    Shape: (N, 1, 28, 28) → (N, 10), log-probabilities.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.relu2_pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(9216, 128)
        self.relu3 = nn.ReLU()
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, 10)
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu2_pool(self.conv2(self.relu1(self.conv1(images))))
        features = self.dropout1(features).flatten(1)
        hidden = self.dropout2(self.relu3(self.fc1(features)))
        return self.log_softmax(self.fc2(hidden))


def prepare(
    hyper: HyperParameters,
    data: Data,
    *,
    backend: str = "eager",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Steps 3 to 5: everything ready for the first step.

    `backend="eager"` leaves everything as it is: `torch.nn`'s modules, `torch.optim`'s optimizer.
    The same seed gives the same weights with every backend, device and dtype.

    Raises:
        ValueError, RuntimeError: as `pyext.nn.swap` does for the backend.
    """
    # 3. The network. Its weights are drawn on the CPU, in float32.
    torch.manual_seed(hyper.seed)
    model = MnistCNN().to(device=device, dtype=dtype)
    swapped = () if backend == "eager" else (swap(model, backend),)

    # 4. Loss and optimizer.
    criterion = nn.NLLLoss()
    optimizer = engine.adadelta(model, hyper, backend)

    # 5. Scheduler: the learning rate after each epoch.
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=hyper.gamma)
    return Training(
        NAME,
        hyper,
        data,
        model,
        criterion,
        optimizer,
        scheduler,
        backend=backend,
        swapped=swapped,
    )


def train(
    training: Training,
    *,
    save: Path | None = None,
    on_step: Callable[[Training], None] = lambda training: None,
    on_epoch: Callable[[Training, TestResult], None] = lambda training, result: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Steps 6 and 7: from wherever `training` is to its last epoch.

    Args:
        save: where to write the checkpoint after every epoch, and when the run is stopped.
        on_step, on_epoch, should_stop: as in `engine.run`.

    Returns:
        Whether all epochs are over.

    Raises:
        engine.Diverged: the loss is not finite; `save` has the end of the last good epoch.
    """

    # 6. Train and test ...
    def save_and_report(training: Training, result: TestResult) -> None:
        if save is not None:
            engine.save_checkpoint(training, save)
        on_epoch(training, result)

    finished = engine.run(
        training, on_step=on_step, on_epoch=save_and_report, should_stop=should_stop
    )
    # 7. ... and save: after each epoch above, and here what an interruption left.
    if save is not None and not finished:
        engine.save_checkpoint(training, save)
    return finished
