"""torch.optim's optimizers over the lab's step ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from pyext.backends import lookup, select
from pyext.ops import adadelta_step
from pyext.registry import FLOATING_DTYPES

__all__ = ["Adadelta"]

_PLAIN_TYPES = (torch.nn.Parameter, Tensor)


class Adadelta(torch.optim.Adadelta):
    """`torch.optim.Adadelta` over `pyext.functional.adadelta_step`: one pass per parameter.

    Constructor, state and `state_dict` are those of `torch.optim.Adadelta`, and either loads the
    other's; `backend` is not part of a `state_dict`. Results are the same up to rounding; for half
    precisions they are rounded once per step, where `torch.optim` rounds after each operation.

    A param group with `maximize`, `capturable` or `differentiable`, or in which a parameter or its
    gradient is complex or a tensor subclass, goes through `torch.optim`'s own code. `foreach`
    chooses among that code's ways and changes nothing else.

    Args:
        params, lr, rho, eps, weight_decay, foreach, capturable, maximize, differentiable: as for
            `torch.optim.Adadelta`.
        backend: `None`, `"eager"`, `"extension"` or `"triton"`.

    Raises:
        ValueError: a hyper-parameter that `torch.optim.Adadelta` refuses; an unknown `backend`.
    """

    backend: str | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str | None = None,
    ) -> None:
        if backend is not None:
            lookup(backend)
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
        self.backend = backend

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"backend": self.backend}

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what `closure` did.

        Raises:
            RuntimeError: a gradient is sparse; a parameter or its state cannot be updated in place
                (`adadelta_step` says why); `backend` is not available on a parameter's device.
                No parameter of that group has changed then.
        """
        # Its name differs among the PyTorch versions.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, square_avgs, acc_deltas, steps = tensors = [], [], [], [], []
            has_complex = self._init_group(group, *tensors)
            if not params:
                continue
            if _is_served(group, params, grads):
                self._step_group(group, *tensors)
                continue
            adadelta(
                *tensors,
                has_complex=has_complex,
                **{key: value for key, value in group.items() if key in _ADADELTA_OPTIONS},
            )
        return loss

    def _step_group(self, group, params, grads, square_avgs, acc_deltas, steps) -> None:
        lr = group["lr"]
        rates = adadelta_step.checked_rates(
            lr.item() if isinstance(lr, Tensor) else lr,
            group["rho"],
            group["eps"],
            group["weight_decay"],
        )
        calls = [
            (select(self.backend, operands[0].device, "adadelta_step"), operands)
            for operands in zip(params, grads, square_avgs, acc_deltas, strict=True)
        ]
        for _, operands in calls:
            adadelta_step.check_operands(*operands)
        # As torch.optim does it: adding a Python number would make a tensor of it for each.
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
        for backend, operands in calls:
            adadelta_step.update(backend, *operands, *rates)


_ADADELTA_OPTIONS = (
    "lr",
    "rho",
    "eps",
    "weight_decay",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
)


def _is_served(group, params, grads) -> bool:
    """Whether the op does what the group asks for."""
    if group["maximize"] or group["capturable"] or group["differentiable"]:
        return False
    return all(
        type(param) in _PLAIN_TYPES
        and type(grad) in _PLAIN_TYPES
        and param.dtype in FLOATING_DTYPES
        and param.dtype == grad.dtype
        for param, grad in zip(params, grads, strict=True)
    )
