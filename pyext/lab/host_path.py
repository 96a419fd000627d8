"""What one small call costs on the host, from the public function down to the kernel.

Each part is the difference of two calls that differ in it alone; all of an op's calls are timed
interleaved. So the parts add up to the whole call, and a part below the clock's noise may come out
a little below 0. Who calls ``host_path`` has verified the op on that shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import measure
from pyext.lab.cases import AutogradCall, Case, Inputs, StepCall, synchronizer
from pyext.lab.measure import Effort, Subject

PARTS = {
    "checks": "the public function: argument checks, autocast, choice of the backend",
    "function": "torch.autograd.Function's forward: the graph's node and what it saves",
    "dispatcher": "the raw ops of the forward on empty tensors, less the allocation",
    "allocation": "torch.empty_like for each output of the raw ops, called from Python",
    "kernel": "what the raw ops of the forward take longer on the real tensors",
    "engine": "autograd's engine, Function's backward and the leaves' gradients",
    "backward dispatcher": "as dispatcher, of the backward's raw ops",
    "backward allocation": "as allocation, of the backward's raw ops",
    "backward kernel": "as kernel, of the backward's raw ops",
}
"""Part -> what is in it, in the order of a call. A step op has no ``function`` and no backward."""


@dataclass(frozen=True)
class HostPath:
    """One op's call, forward and backward or a step, and what it is made of."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    backend: str
    call_s: float
    """Median seconds of the whole call."""
    eager_s: float
    """The same of the op's baseline, interleaved with it."""
    parts_s: dict[str, float]
    """Part -> seconds; their sum is ``call_s``."""

    def to_json(self) -> dict[str, Any]:
        """An entry of ``host_path`` in a result file."""
        return asdict(self)


def small_case(op: registry.Op, dtype: str, device: str) -> Case:
    """A forward and backward, or a step, so small that its kernels do not hide the rest.

    Of the first of the op's benchmark shapes, with 2^12 elements at most, and of several extents
    none above 16.
    """
    first, *_ = op.benchmark_shapes[torch.device(device).type]["quick"]
    most = 2**12 if len(first) == 1 else 16
    shape = tuple(min(each, most) for each in first)
    return Case(op.name, op.directions[-1], shape, dtype, device)


RawCall = tuple[Callable[..., Any], tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """The calls of one namespace's raw ops while it is active, and their outputs."""

    def __init__(self, namespace: str):
        super().__init__()
        self._namespace = namespace
        self.calls: list[RawCall] = []
        self.outputs: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == self._namespace:
            # The packet, whose Python is some 0.5 µs of ``dispatcher`` that an op's calls spare.
            packet = getattr(getattr(torch.ops, self._namespace), function._opname)
            self.calls.append((packet, args))
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.outputs += [each.detach() for each in outputs if torch.is_tensor(each)]
        return result


def host_path(case: Case, inputs: Inputs, backend: str, effort: Effort) -> HostPath:
    """Times one op's call and its parts.

    Args:
        case: ``small_case``, or the kernel is all that is seen.
        inputs: its tensors.
        backend: one that has raw ops and is available on the case's device.
        effort: how long, for each of the calls that are timed.
    """
    op, device = inputs.op, case.device
    function = functools.partial(op.function, backend=backend)
    forward, backward = _recorded(op, function, inputs, backend)
    empty = Inputs(op, replace(case, shape=(0, *case.shape[1:])), seed=0)
    empty_forward, empty_backward = _recorded(op, function, empty, backend)

    calls: dict[str, Callable[[], Any]] = {
        "raw": _replay(forward.calls),
        "raw empty": _replay(empty_forward.calls),
        "outputs": _allocate(forward.outputs),
    }
    subjects = [_subject(device, name, call) for name, call in calls.items()]
    if op.is_step:
        whole, eager = (StepCall(each, inputs.args) for each in (function, op.baseline))
    else:
        whole, eager = (_both(each, inputs) for each in (function, op.baseline))
        recording = _both(function, inputs, "forward").call
        args = tuple(a.detach() if torch.is_tensor(a) else a for a in inputs.args)
        subjects += [
            _subject(device, "detached", functools.partial(function, *args)),
            _subject(device, "recording", recording),
            _subject(device, "backward raw", _replay(backward.calls)),
            _subject(device, "backward raw empty", _replay(empty_backward.calls)),
            _subject(device, "backward outputs", _allocate(backward.outputs)),
        ]
    subjects += [
        _subject(device, "whole", whole.call, whole.prepare),
        _subject(device, "eager", eager.call, eager.prepare),
    ]
    samples = measure.measure(subjects, "host", effort, device=torch.device(device), seed=0)
    median = {name: each.median for name, each in samples.items()}
    parts = {
        "checks": median["whole" if op.is_step else "detached"] - median["raw"],
        "dispatcher": median["raw empty"] - median["outputs"],
        "allocation": median["outputs"],
        "kernel": median["raw"] - median["raw empty"],
    }
    if not op.is_step:
        parts |= {
            "function": median["recording"] - median["detached"],
            "engine": median["whole"] - median["recording"] - median["backward raw"],
            "backward dispatcher": median["backward raw empty"] - median["backward outputs"],
            "backward allocation": median["backward outputs"],
            "backward kernel": median["backward raw"] - median["backward raw empty"],
        }
    ordered = {name: parts[name] for name in PARTS if name in parts}
    return HostPath(
        op.name, case.shape, case.dtype, device, backend, median["whole"], median["eager"], ordered
    )


def _both(function: Callable, inputs: Inputs, direction: str = "both") -> AutogradCall:
    return AutogradCall(function, inputs.args, inputs.grad, direction, max_batch=10_000)


def _recorded(
    op: registry.Op, function: Callable, inputs: Inputs, backend: str
) -> tuple[Recorder, Recorder]:
    """The raw ops that the forward (or the step) and the backward of one call run."""
    forward, backward = (Recorder(BACKENDS[backend].namespace) for _ in range(2))
    if op.is_step:
        step = StepCall(function, inputs.args)
        with forward:
            step.call()
        return forward, backward
    with forward:
        out = function(*inputs.args)
    with backward:
        torch.autograd.grad(out, inputs.leaves, inputs.grad)
    return forward, backward


def _replay(calls: list[RawCall]) -> Callable[[], Any]:
    def replay() -> None:
        for op, args in calls:
            op(*args)

    if len(calls) == 1:
        ((op, args),) = calls
        return functools.partial(op, *args)
    return replay


def _allocate(outputs: list[torch.Tensor]) -> Callable[[], None]:
    def allocate() -> None:
        for each in outputs:
            torch.empty_like(each)

    return allocate


def _subject(
    device: str,
    name: str,
    call: Callable[[], Any],
    prepare: Callable[[int], None] = lambda calls: None,
) -> Subject:
    return Subject(name, call, prepare, synchronizer(device))
