"""Argument checks that ops share: each refuses in one sentence, before anything is launched."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from pyext.registry import FLOATING_DTYPES

_CPU = torch.device("cpu")
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
"""PyTorch's own numbering (``torch.nn._reduction``), which the raw ops' schemas use."""


def tensor(op: str, name: str, value: object) -> None:
    """``TypeError`` unless ``value`` is a tensor; ``NotImplementedError`` unless it is strided."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}(): argument {name!r} must be Tensor, not {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise NotImplementedError(
            f"{op}(): argument {name!r} has layout {layout}, only torch.strided is accepted"
        )


def say_better(check: Callable, *args) -> None:
    """Raises what ``check(*args)`` does, if anything, in place of the error that is being handled.

    For what a raw op has refused: the check words it better, and the raw op's words are left out.
    """
    try:
        check(*args)
    except Exception as better:
        raise better from None


def same_device(op: str, **tensors: torch.Tensor) -> torch.device:
    """The tensors' common device; ``RuntimeError`` if they are on different ones."""
    device = None
    for name, value in tensors.items():
        if device is None:
            first, device = name, value.device
        elif value.device != device:
            raise RuntimeError(
                f"{op}(): expected all tensors to be on the same device, but {first!r} is on "
                f"{device} and {name!r} is on {value.device}"
            )
    return device


def same_floating_dtype(op: str, **tensors: torch.Tensor) -> None:
    """``RuntimeError`` if dtypes differ, ``NotImplementedError`` if theirs is not floating."""
    dtype = None
    for name, value in tensors.items():
        if dtype is None:
            first, dtype = name, value.dtype
        elif value.dtype != dtype:
            raise RuntimeError(
                f"{op}(): expected all tensors to have the same dtype, but {first!r} is "
                f"{dtype} and {name!r} is {value.dtype}"
            )
    floating_dtype(op, first, dtype)


def floating_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """``NotImplementedError`` unless ``dtype`` is one of the lab's floating dtypes."""
    if dtype not in FLOATING_DTYPES:
        accepted = ", ".join(str(each) for each in FLOATING_DTYPES)
        raise NotImplementedError(
            f"{op}(): not implemented for {dtype} (argument {name!r}); accepted are {accepted}"
        )


def shape(op: str, name: str, value: torch.Tensor, expected: tuple[int, ...], because: str) -> None:
    """``RuntimeError`` unless ``value`` has the expected shape; ``because`` says why it must."""
    if value.shape != expected:
        raise RuntimeError(
            f"{op}(): argument {name!r} must have shape {expected} {because}, "
            f"but has {tuple(value.shape)}"
        )


def broadcastable(op: str, **tensors: torch.Tensor) -> None:
    """``RuntimeError`` unless the shapes broadcast."""
    try:
        torch.broadcast_shapes(*(value.shape for value in tensors.values()))
    except RuntimeError:
        given = " and ".join(f"{name!r} {tuple(value.shape)}" for name, value in tensors.items())
        raise RuntimeError(f"{op}(): shapes do not broadcast: {given}") from None


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors on ``device``."""
    kind = "cpu" if device == _CPU else device.type  # the latter costs a small call 3 of 46 µs
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def reduction(value: object) -> int:
    """The number of a reduction; ``ValueError`` unless it is ``none``, ``mean`` or ``sum``."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        known = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"{value} is not a valid value for reduction; expected one of {known}")
    return REDUCTIONS[value]


_LARGEST = int(sys.float_info.max)


def number(op: str, name: str, value: object) -> float:
    """``value`` as a float, ±inf if it is an integer beyond; ``TypeError`` unless a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}(): argument {name!r} must be a float, not {type(value).__name__}")
    # Asked before, not caught: torch.compile of PyTorch 2.14 dies of the OverflowError. (The digits
    # of such an integer would fill a sentence.)
    if value > _LARGEST or value < -_LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def learning_rate(op: str, lr: object) -> float:
    """``lr`` as a float; ``TypeError`` unless a number, ``ValueError`` if negative, NaN or inf."""
    value = number(op, "lr", lr)
    if not 0 <= value < math.inf:
        raise ValueError(f"Invalid learning rate: {value}; {op}() accepts 0 <= lr < inf")
    return value


def no_transforms(op: str, *tensors: torch.Tensor) -> None:
    """``RuntimeError`` under ``torch.func`` and forward AD: a step op has no derivative."""
    if torch._C._are_functorch_transforms_active() or (
        torch.autograd.forward_ad._current_level >= 0
        and any(torch.autograd.forward_ad.unpack_dual(each).tangent is not None for each in tensors)
    ):
        raise RuntimeError(
            f"{op}() is a step op: it updates its arguments in place and has no derivative, so it "
            "works neither under torch.func transforms nor in forward AD"
        )


def writable(op: str, name: str, value: torch.Tensor) -> None:
    """``RuntimeError`` if a kernel may not write to a tensor's memory as it is."""
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}(): inplace update to inference tensor {name!r} outside InferenceMode is not "
            "allowed; clone it first"
        )
    if value.is_neg():
        raise RuntimeError(
            f"{op}(): the written-to tensor {name!r} is a negated view; resolve_neg() it first"
        )


def updatable_in_place(op: str, updated: dict[str, torch.Tensor], **read: torch.Tensor) -> None:
    """``RuntimeError`` if an update in place would write an element twice or change other operands.

    ``torch.compile`` sees strides but no addresses, so there only the former is checked. (The
    compiled ``two_layer_sgd_step`` checks both itself, when it runs.)

    Args:
        op: the op's name.
        updated: the tensors that the op writes.
        read: those that it only reads.
    """
    each_element_once(op, updated)
    if torch.compiler.is_compiling():  # a tensor that is being traced has no address
        return
    for name, value in updated.items():
        writable(op, name, value)
    # Usually all lie apart: that is seen at once, and each pair is looked at only where it is not.
    end = 1
    for begin, next_end in sorted(map(_address_range, (*updated.values(), *read.values()))):
        if begin < end:
            break
        end = next_end
    else:
        return
    everything = {**updated, **read}
    ranges = {name: _address_range(value) for name, value in everything.items()}
    for name, value in updated.items():
        begin, end = ranges[name]
        for other_name, other in everything.items():
            if other_name == name:
                continue
            if other is value and value.numel():
                raise RuntimeError(f"{op}(): the written-to tensor {name!r} was passed twice")
            other_begin, other_end = ranges[other_name]
            if begin < other_end and other_begin < end:
                raise RuntimeError(
                    f"{op}(): the written-to tensor {name!r} shares memory with {other_name!r}; "
                    "clone() one of them first"
                )


def each_element_once(op: str, updated: dict[str, torch.Tensor]) -> None:
    """``RuntimeError`` if two indices of what is updated share an address."""
    for name, value in updated.items():
        if _overlaps_itself(value):
            raise RuntimeError(
                f"{op}(): more than one element of the written-to tensor {name!r} refers to a "
                "single memory location; clone() it first"
            )


def count_update(*updated: torch.Tensor) -> None:
    """Bumps the version counters of what a raw op has updated in place.

    The stable ABI does not count what it mutates, and a stale saved tensor must be an error.
    (``torch.compile`` functionalizes the op and counts by itself.)
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(updated)


def _overlaps_itself(value: torch.Tensor) -> bool:
    """Whether two indices may share an address: a stride is within the run of the shorter ones."""
    if value.is_contiguous():
        return False
    run = 1
    steps = zip(value.stride(), value.shape, strict=True)
    for stride, size in sorted(each for each in steps if each[1] > 1):
        if stride < run:
            return True
        run += stride * (size - 1)
    return False


def _address_range(value: torch.Tensor) -> tuple[int, int]:
    """The addresses that a tensor spans, on one device; empty where it has no elements or data."""
    begin = 0 if value.is_meta else value.data_ptr()
    if not begin:  # no elements, too, have no address
        return 0, 0
    if value.is_contiguous():
        return begin, begin + value.nbytes
    last = sum(
        stride * (size - 1) for stride, size in zip(value.stride(), value.shape, strict=True)
    )
    return begin, begin + (last + 1) * value.element_size()
