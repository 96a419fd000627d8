"""A two-layer network on MNIST with squared error: the training run in which `swap` reaches every
op that has a place in a model, `relu`, `two_layer` and `mse_loss`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from pyext.nn import swap
from pyext.workloads import engine
from pyext.workloads.data import Data
from pyext.workloads.engine import HyperParameters, Training

__all__ = ["NAME", "prepare"]

NAME = "mnist_mlp"
HIDDEN = 128
CLASSES = 10


def prepare(
    hyper: HyperParameters,
    data: Data,
    *,
    backend: str = "eager",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Training:
    """784 → 128 → ReLU → 10 against one-hot targets, ready for the first step.

    Arguments and errors are those of `mnist_cnn.prepare`.
    """
    torch.manual_seed(hyper.seed)
    network = nn.Sequential(nn.Linear(28 * 28, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    model = nn.Sequential(nn.Flatten(), network).to(device=device, dtype=dtype)
    criterion = nn.MSELoss()
    swapped = ()
    if backend != "eager":
        swapped = (swap(model, backend), swap(criterion, backend))
    optimizer = engine.adadelta(model, hyper, backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=hyper.gamma)
    target = functools.partial(_one_hot, dtype=dtype)
    return Training(
        NAME,
        hyper,
        data,
        model,
        criterion,
        optimizer,
        scheduler,
        target=target,
        backend=backend,
        swapped=swapped,
    )


def _one_hot(labels: Tensor, dtype: torch.dtype) -> Tensor:
    return nn.functional.one_hot(labels, CLASSES).to(dtype)
