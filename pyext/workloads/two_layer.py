"""The two-layer network trained by hand, without `nn.Module` or optimizer: as PyTorch's autograd
writes it, and as one op, `two_layer_sgd_step`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyext import functional

__all__ = ["Problem", "problem", "train_by_autograd", "train_by_step"]


@dataclasses.dataclass
class Problem:
    """Random inputs, targets and start weights. Training changes `w1` and `w2` in place.

    Shapes: x (N, I), y (N, O), w1 (I, H), w2 (H, O); one dtype and device.
    """

    x: Tensor
    y: Tensor
    w1: Tensor
    w2: Tensor

    def clone(self) -> Problem:
        """The same numbers in memory of their own."""
        return Problem(self.x.clone(), self.y.clone(), self.w1.clone(), self.w2.clone())


def problem(
    batch: int = 64,
    in_features: int = 1000,
    hidden_features: int = 100,
    out_features: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A standard normal `Problem`, drawn on the CPU: equal on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).to(device)

    return Problem(
        draw(batch, in_features),
        draw(batch, out_features),
        draw(in_features, hidden_features),
        draw(hidden_features, out_features),
    )


def train_by_autograd(problem: Problem, steps: int, lr: float = 1e-6) -> Tensor:
    """The hand-written loop over PyTorch's own ops; the reference of `train_by_step`.

    Args:
        problem: its weights are trained in place.
        lr: the learning rate. The loss is a sum over the batch, hence its small default.

    Returns:
        The losses before each update, (steps,), on the problem's device.
    """
    losses = torch.empty(steps, dtype=problem.x.dtype, device=problem.x.device)
    w1, w2 = problem.w1.requires_grad_(), problem.w2.requires_grad_()
    for step in range(steps):
        prediction = problem.x.mm(w1).clamp(min=0).mm(w2)
        loss = (prediction - problem.y).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            losses[step] = loss
            for weight in (w1, w2):
                weight -= lr * weight.grad
                weight.grad.zero_()
    for weight in (w1, w2):
        weight.requires_grad_(False)
        weight.grad = None
    return losses


def train_by_step(
    problem: Problem, steps: int, lr: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """The same training with one call of `two_layer_sgd_step` per step; arguments and result alike.

    Raises:
        ValueError, RuntimeError: as `pyext.functional.two_layer_sgd_step` does.
    """
    losses = torch.empty(steps, dtype=problem.x.dtype, device=problem.x.device)
    for step in range(steps):
        losses[step] = functional.two_layer_sgd_step(
            problem.x, problem.y, problem.w1, problem.w2, lr, backend=backend
        )
    return losses
