"""Calls every kernel on small inputs: every op, dtype and backend, forward, backward and step.

    python -m pyext.lab.kernel_calls --device cuda

It is what ``python -m pyext.lab gpu-suite`` runs under compute-sanitizer. The inputs come from the
registry: every op's sample inputs, and shapes that reach the tiles which small inputs do not. They
are made, and the results compared with ``eager`` in float64, on the CPU, so that hardly any kernel
but the lab's own runs on the GPU. Breadth first: when the time is up, every op has been called.

Exit codes: 0 done; 1 a result was wrong or a call failed; 2 wrong usage; 3 no backend to call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import check

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# By the last of the names in a shape. Elementwise: vectors only, and a tail. Networks: K split into
# parts, outputs of (1024, 1024) and more, for which the largest tiles are taken, and 256 slices of
# an SGD step, in float64 more blocks than a GPU of 132 multiprocessors holds at once. Pooling: rows
# of whole vectors, and windows of three by three that leave a rest.
EXTRA_SHAPES = {
    "n": ((4096,), (1001,)),
    "out": ((64, 1000, 100, 10), (1024, 1024, 1024, 8), (2048, 16, 16, 1024), (8, 2048, 16, 4)),
    "kernel": ((3, 5, 24, 24, 2), (2, 3, 23, 34, 3)),
    "steps": ((64, 1000, 100, 10, 3),),
}


@dataclass(frozen=True)
class KernelCall:
    """One op on one input, forward and, where there is one, backward."""

    op: registry.Op
    backend: str
    dtype: torch.dtype
    name: str
    args: tuple[Any, ...]
    """On the CPU."""
    kwargs: dict[str, Any]

    @property
    def label(self) -> str:
        """Such as ``relu triton float32 4096``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name} {self.backend} {dtype} {self.name}"

    def failure(self, device: torch.device) -> str | None:
        """Runs the call on ``device``; what is wrong with its result, or None."""
        args = tuple(_on_device(each, device) for each in self.args)
        function = functools.partial(self.op.function, backend=self.backend)
        try:
            results = check.call(self.op, function, args, self.kwargs)
            actual = {name: None if each is None else each.cpu() for name, each in results.items()}
        except RuntimeError as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        expected = check.reference(self.op, self.args, self.kwargs)
        terms = self.op.reduction_length(*self.args, **self.kwargs)
        before = check.before_step(self.op, self.args)
        return check.compare(actual, expected, terms, before).detail or None


def _on_device(value: Any, device: torch.device) -> Any:
    """A tensor's copy on ``device``, with its strides and its place within 16 bytes."""
    if not torch.is_tensor(value):
        return value
    elements = value.untyped_storage().nbytes() // value.element_size()
    memory = value.detach().as_strided((elements,), (1,), 0).to(device)
    copy = memory.as_strided(value.shape, value.stride(), value.storage_offset())
    return copy.requires_grad_(value.requires_grad)


def kernel_calls(
    backends: Sequence[str], dtypes: Iterable[torch.dtype] | None = None
) -> Iterator[KernelCall]:
    """Every call, breadth first: one of each op, dtype and backend, then the next ones.

    Args:
        backends: names of backends that have kernels.
        dtypes: only these; by default all that an op accepts.
    """
    wanted = None if dtypes is None else set(dtypes)
    rows = [
        _calls(op, backend, dtype)
        for dtype in (*registry.FLOATING_DTYPES[1:], torch.float64, *INTEGER_DTYPES)
        if wanted is None or dtype in wanted
        for op in registry.ops().values()
        for backend in backends
        if _accepts(op, dtype)
    ]
    for column in itertools.zip_longest(*rows):
        yield from filter(None, column)


def _accepts(op: registry.Op, dtype: torch.dtype) -> bool:
    if dtype in op.dtypes:
        return True
    if op.is_step:
        return False
    sample = next(iter(op.sample_inputs(torch.device("cpu"), dtype)))
    try:
        op.function(*sample.args, **sample.kwargs, backend="eager")
    except NotImplementedError:
        return False
    return True


def _calls(op: registry.Op, backend: str, dtype: torch.dtype) -> Iterator[KernelCall]:
    call = KernelCall(op, backend, dtype, "", (), {})
    cpu = torch.device("cpu")
    for shape in EXTRA_SHAPES[op.shape_names[-1]] if dtype.is_floating_point else ():
        args = op.benchmark_inputs(shape, dtype, cpu, torch.Generator().manual_seed(0))
        yield replace(call, name="x".join(map(str, shape)), args=check.with_visible_step(op, args))
    needs_grad = dtype.is_floating_point and not op.is_step
    for sample in op.sample_inputs(cpu, dtype, requires_grad=needs_grad):
        yield replace(call, name=sample.name, args=sample.args, kwargs=dict(sample.kwargs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pyext.lab.kernel_calls", description=__doc__.partition("\n")[0]
    )
    with_kernels = [name for name, backend in BACKENDS.items() if backend.namespace]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", choices=with_kernels, action="append", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long (default: never)"
    )
    options = parser.parse_args(arguments)
    wanted = options.backend or with_kernels
    reasons = {name: BACKENDS[name].unavailable(options.device) for name in wanted}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} cannot be called on {options.device}: {reason}.")
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        return 3
    return _run(list(kernel_calls(usable)), torch.device(options.device), options.seconds)


def _run(calls: Sequence[KernelCall], device: torch.device, seconds: float) -> int:
    end = time.monotonic() + seconds
    done = failed = 0
    for call in calls:
        if time.monotonic() > end:
            break
        print(call.label, flush=True)  # before the call: a crash must be seen to be this one's
        if failure := call.failure(device):
            failed += 1
            print(f"FAILED {call.label}: {failure}", flush=True)
        done += 1
    print(f"{done} of {len(calls)} calls, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
