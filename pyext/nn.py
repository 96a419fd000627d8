"""torch.nn modules over the lab's ops, and `swap`, which gives them to a model that exists already.

Each class here extends its namesake in `torch.nn` by nothing but a `backend`, so that a module can
change into it without losing anything: same parameters, same hooks, same place in every container.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyext import functional
from pyext.backends import lookup, select

__all__ = [
    "Dropout",
    "MSELoss",
    "ReLU",
    "ReLUMaxPool2d",
    "Swap",
    "SwapRecord",
    "TwoLayerNet",
    "swap",
]


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` over `pyext.functional.relu`.

    Shape: any; floating and integer dtypes; the result has the input's shape and dtype.

    The lab's ops never write to their arguments. With `inplace=True` the result is therefore
    copied back into the input and the input is returned, which leaves a model's results as they
    were (some models read the rectified input again) but saves no memory and costs one more pass.
    Where nothing reads the input again, `module.inplace = False` is faster.
    """

    def __init__(self, inplace: bool = False, backend: str | None = None) -> None:
        super().__init__(inplace)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        output = functional.relu(input, backend=self.backend)
        return input.copy_(output) if self.inplace else output

    def extra_repr(self) -> str:
        return _join(super().extra_repr(), f"backend={self.backend!r}")


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` over `pyext.functional.dropout`.

    Shape: any; floating dtypes; the result has the input's shape and dtype. Each call draws a seed
    from PyTorch's default generator. What is dropped for it is the same with every backend, but
    not what `torch.nn.Dropout` drops.

    With `inplace=True` the result is copied back into the input, as by `ReLU`.

    Raises:
        ValueError: `p` is not from 0 to 1.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, backend: str | None = None) -> None:
        super().__init__(p, inplace)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        output = functional.dropout(input, self.p, self.training, backend=self.backend)
        return input.copy_(output) if self.inplace and output is not input else output

    def extra_repr(self) -> str:
        return _join(super().extra_repr(), f"backend={self.backend!r}")


class MSELoss(nn.MSELoss):
    """`torch.nn.MSELoss` over `pyext.functional.mse_loss`.

    Shape: input and target alike, or broadcastable as in PyTorch (with its warning); the result is
    0-d for `reduction="mean"` and `"sum"`, of the inputs' shape for `"none"`.

    Raises:
        ValueError: an unknown reduction, when it is called (as in PyTorch).
    """

    def __init__(self, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction=reduction)
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, self.reduction, backend=self.backend)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, backend={self.backend!r}"


class ReLUMaxPool2d(nn.Sequential):
    """ReLU → MaxPool2d as one op, `pyext.functional.relu_max_pool2d`.

    It *is* the `nn.Sequential` of its two modules; as soon as one of them is more than its sizes
    (it has a hook, was replaced, or pools in a way that the op does not), they run one after the
    other.

    Shape: input (N, C, H, W) or (C, H, W); the result has ⌊(H + 2 padding - kernel) / stride⌋ + 1
    rows, likewise columns, and the input's dtype.

    Args:
        kernel_size, stride, padding: an int or a pair (height, width), as in `nn.MaxPool2d`; a
            window has at most 255 elements.
        backend: as in `pyext.functional`; None takes the first that is available at each call.

    Raises:
        RuntimeError, TypeError: sizes that the op refuses, when it is called.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__(ReLU(backend=backend), nn.MaxPool2d(kernel_size, stride, padding))
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        if _why_not_fusable(self, ReLUMaxPool2d) is not None:
            return super().forward(input)
        _, pool = self
        return functional.relu_max_pool2d(
            input, pool.kernel_size, pool.stride, pool.padding, backend=self.backend
        )

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A module, or for a slice an `nn.Sequential` of some."""
        return _plain_sequential(self, index)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class TwoLayerNet(nn.Sequential):
    """Linear → ReLU → Linear as one op, `pyext.functional.two_layer`.

    It *is* the `nn.Sequential` of its three modules: the same seed initialises it to the same
    weights, and `state_dict` (`0.weight`, `0.bias`, `2.weight`, `2.bias`) loads either way. The
    fused op reads the weights where the three modules keep them. As soon as the three are more
    than their weights (one has a hook, was replaced or is parametrized), they run one after the
    other, so that nothing attached to them is lost.

    Shape: input (*, in_features), output (*, out_features), as in `nn.Linear`.

    Args:
        bias: gives both layers a bias.
        backend: as in `pyext.functional`; None takes the first that is available at each call.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features, bias=bias),
            ReLU(backend=backend),
            nn.Linear(hidden_features, out_features, bias=bias),
        )
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        if _why_not_fusable(self, TwoLayerNet) is not None:
            return super().forward(input)
        first, _, last = self
        return functional.two_layer(
            input, first.weight.t(), last.weight.t(), first.bias, last.bias, backend=self.backend
        )

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A module, or for a slice an `nn.Sequential` of some."""
        return _plain_sequential(self, index)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def _plain_sequential(sequential: nn.Sequential, index: int | slice) -> nn.Module:
    """`sequential[index]`; a slice is no fused op any more."""
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict(list(sequential._modules.items())[index]))
    return nn.Sequential.__getitem__(sequential, index)


@dataclasses.dataclass(frozen=True)
class Swap:
    """One module that `swap` changed, or left alone although it came near; `note` says why.

    `names` are all the places where the model holds the module ("" is the model itself).
    """

    names: tuple[str, ...]
    was: str
    now: str
    note: str = ""

    def __str__(self) -> str:
        names = ", ".join(name or "(the model itself)" for name in self.names)
        return f"{names}: {self.was} → {self.now}" + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass(frozen=True)
class SwapRecord:
    """What `swap` did, to look at or to print. Its length and its items are what it replaced."""

    model: nn.Module
    backend: str | None
    replaced: tuple[Swap, ...]
    left: tuple[Swap, ...]

    def __len__(self) -> int:
        return len(self.replaced)

    def __iter__(self) -> Iterator[Swap]:
        return iter(self.replaced)

    def __str__(self) -> str:
        kind = type(self.model).__name__
        count = f"{len(self)} module{'' if len(self) == 1 else 's'}"
        lines = [f"swapped {count} of {kind} to backend {self.backend!r}"]
        lines += [f"  {entry}" for entry in self.replaced]
        lines += [f"  left {entry.names[0] or kind}: {entry.note}" for entry in self.left]
        return "\n".join(lines)


def swap(model: nn.Module, backend: str | None) -> SwapRecord:
    """Makes the modules of `model` that the lab has an op for run on `backend`; says which.

    Changed are `nn.ReLU`, `nn.Dropout`, `nn.MSELoss` and `nn.Sequential` of exactly Linear, ReLU,
    Linear (which becomes a `TwoLayerNet`) or of exactly ReLU, MaxPool2d (`ReLUMaxPool2d`), wherever
    they are in the model, the model itself included. Modules that are the lab's already change
    their backend.

    Nothing is rebuilt: a module keeps its identity and changes its class. So parameters (and the
    optimizers that hold them), hooks and their handles, the training flag, names and every other
    reference to the module stay valid, and a module that is shared is changed everywhere at once
    (also in another model that shares it: `copy.deepcopy` first to compare two).

    Left alone are subclasses, modules whose `forward` was replaced by hand, and, of a Sequential
    whose inner modules have hooks, everything but its ReLU. Hooks for all modules
    (`torch.nn.modules.module.register_module_forward_hook`) see a fused network as one module. A
    changed model is for `torch.compile`; `torch.fx.symbolic_trace` and `torch.jit.script` cannot
    follow it into the ops, so use them on a copy that was not swapped.

    Args:
        backend: a backend's name, or None for the first that is available at each call.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: there is no backend of this name.
        RuntimeError: the backend is not available on a device of the model's parameters. Move the
            model first. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap(): model must be a torch.nn.Module, not {type(model).__name__}")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)

    replaced, left, plan = [], [], []
    for module, names in places.items():
        target = _target(module)
        if target is None:
            continue
        was, now = _qualified(type(module)), _qualified(target)
        obstacle = _why_not(module, target)
        if obstacle is None:
            plan.append((module, target))
            replaced.append(Swap(tuple(names), was, now, _note(module, target)))
        else:
            left.append(Swap(tuple(names), was, was, obstacle))
    _check_available(model, backend, {_OPS[target] for _, target in plan})

    for module, target in plan:
        module.__class__ = target
        module.backend = backend
    return SwapRecord(model, backend, tuple(replaced), tuple(left))


_OPS = {
    ReLU: "relu",
    Dropout: "dropout",
    MSELoss: "mse_loss",
    TwoLayerNet: "two_layer",
    ReLUMaxPool2d: "relu_max_pool2d",
}


def _target(module: nn.Module) -> type[nn.Module] | None:
    """The lab's class for this module, also where something else will keep it from becoming one."""
    for target in _OPS:
        if target not in _FUSABLE and isinstance(module, target.__base__):
            return target
    if isinstance(module, nn.Sequential):
        inner = tuple(module._modules.values())
        for target, parts in _FUSABLE.items():
            kinds = [names[0] for names in parts]
            if len(inner) == len(kinds) and all(map(isinstance, inner, kinds)):
                return target
    return None


def _why_not(module: nn.Module, target: type[nn.Module]) -> str | None:
    """Why this module must not become a `target`, or None if it may."""
    if type(module) not in (target, target.__base__):
        return f"{type(module).__name__} is a subclass of {_qualified(target.__base__)}"
    if "forward" in vars(module):
        return "its forward was replaced by hand"
    if target in _FUSABLE and type(module) is not target:
        return _why_not_fusable(module, target)
    return None


# Module -> the modules that it fuses, each as it may be written.
_FUSABLE = {
    TwoLayerNet: ((nn.Linear,), (nn.ReLU, ReLU), (nn.Linear,)),
    ReLUMaxPool2d: ((nn.ReLU, ReLU), (nn.MaxPool2d,)),
}


def _why_not_fusable(sequential: nn.Sequential, target: type[nn.Module]) -> str | None:
    """Why a Sequential's modules must run one by one, or None if the fused op does the same."""
    modules = tuple(sequential._modules.values())
    expected = _FUSABLE[target]
    if len(modules) != len(expected):
        return f"it has {len(modules)} modules instead of {len(expected)}"
    for module, kinds in zip(modules, expected, strict=True):
        if type(module) not in kinds:
            return f"{type(module).__name__} is not exactly torch.nn.{kinds[0].__name__}"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"its {type(module).__name__} has hooks"
        if "forward" in module.__dict__:
            return f"the forward of its {type(module).__name__} was replaced by hand"
    return _why_not_poolable(*modules) if target is ReLUMaxPool2d else None


def _why_not_poolable(relu: nn.ReLU, pool: nn.MaxPool2d) -> str | None:
    if relu.inplace:  # others may read the rectified input
        return "its ReLU is inplace"
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return "its MaxPool2d has a dilation, ceil_mode or return_indices"
    return None


def _note(module: nn.Module, target: type[nn.Module]) -> str:
    if isinstance(module, target):
        return f"backend was {module.backend!r}"
    if target in (ReLU, Dropout) and module.inplace:
        return "inplace=True is kept by copying the result back"
    return ""


def _check_available(model: nn.Module, backend: str | None, ops: set[str]) -> None:
    if backend is None:
        return
    lookup(backend)  # all that can be said of a model on meta
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    for device in sorted(devices, key=str):
        if device.type != "meta":
            for op in sorted(ops) or sorted(_OPS.values()):
                select(backend, device, op)


def _qualified(kind: type) -> str:
    package = kind.__module__.partition(".modules")[0]
    return f"{package}.{kind.__qualname__}"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
