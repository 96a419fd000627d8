"""Cases and variants: what is timed, verified through the very calls that are timed.

A case is one op in one direction on one shape and dtype. A variant is a backend or a peer that
computes it. The benchmarks' main job, ``pytest benchmarks`` and the processes in which peers are
timed alone all take their work from here.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pyext import registry
from pyext.lab import check, roofline
from pyext.lab.measure import Subject

ALLOCATED, PREALLOCATED = "allocated", "preallocated"
# Outputs from here on may be fresh pages from the kernel at every call (glibc's mmap threshold
# adapts up to 32 MiB, but starts at 128 KiB) or a pool's, so that two rows tell kernel and memory
# handling apart.
_LARGE_OUTPUT_BYTES = 2**22
# Forwards that wait for their backwards keep their tensors; few enough to stay in the caches.
_QUEUE_BYTES = 2**21
_MAX_QUEUE = 64


@dataclass(frozen=True)
class Case:
    """One op in one direction on one shape and dtype."""

    op: str
    direction: str
    """``forward``, ``backward``, ``both`` or, for step ops, ``step``."""
    shape: tuple[int, ...]
    dtype: str
    device: str
    outputs: str = ALLOCATED
    """``allocated``: each call allocates its outputs, as the user meets it; ``preallocated``: in
    memory that is mapped already, for every variant alike."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's object."""
        return getattr(torch, self.dtype)

    @property
    def label(self) -> str:
        """Such as ``relu both 4096 float32``."""
        text = f"{self.op} {self.direction} {shape_text(self.shape)} {self.dtype}"
        return text if self.outputs == ALLOCATED else f"{text} {self.outputs}"

    @property
    def cost(self) -> registry.Cost:
        """Bytes and FLOPs of one call."""
        op = registry.get(self.op)
        return op.cost(self.direction, self.shape, self.torch_dtype.itemsize)

    def to_json(self) -> dict[str, Any]:
        """For another process; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "shape": tuple(data["shape"])})


def shape_text(shape: Sequence[int]) -> str:
    """``(64, 1000)`` -> ``"64x1000"``."""
    return "x".join(map(str, shape))


def cases(
    op: registry.Op,
    device: torch.device,
    dtypes: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    preallocated: Sequence[str] = (),
) -> Iterator[Case]:
    """The cases of one op; all directions of one shape follow one another.

    Args:
        op: the op.
        device: where the tensors are.
        dtypes: such as ``("float32",)``; those that are not among ``op.dtypes`` are left out.
        shapes: each of the length that the op takes.
        preallocated: the directions that come, for large elementwise outputs, a second time with
            preallocated outputs.
    """
    known = [dtype for dtype in dtypes if getattr(torch, dtype) in op.dtypes]
    for dtype in known:
        for shape in shapes:
            for direction in op.directions:
                case = Case(op.name, direction, tuple(shape), dtype, str(device))
                yield case
                large = case.cost.bytes >= 2 * _LARGE_OUTPUT_BYTES
                if direction in preallocated and large and case.cost.unit == "elementwise":
                    yield replace(case, outputs=PREALLOCATED)


class Inputs:
    """The tensors of all cases of one op, shape and dtype, and what the reference makes of them."""

    def __init__(self, op: registry.Op, case: Case, seed: int):
        self.op = op
        device = torch.device(case.device)
        # Each op, shape and dtype has its own numbers, the same in every process.
        key = f"{op.name} {case.shape} {case.dtype} {seed}".encode()
        generator = torch.Generator(device).manual_seed(zlib.crc32(key))
        self.args = op.benchmark_inputs(case.shape, case.torch_dtype, device, generator)
        self.leaves = [a for a in self.args if torch.is_tensor(a) and a.requires_grad]
        self.grad: torch.Tensor | None = None
        """The gradient of the output, made outside the clock; None for a 0-d loss."""
        if not op.is_step:
            with torch.no_grad():
                out = op.baseline(*self.args)
            if out.dim():
                self.grad = torch.randn(
                    out.shape, dtype=out.dtype, device=device, generator=generator
                )
        self.before: check.Named = {}
        """What a step updates, as it is before; known once its reference is."""
        self._references: dict[str, check.Named] = {}
        self.terms = op.reduction_length(*self.args)
        """The length of the longest sum, from which tolerances follow."""

    def reference(self, direction: str) -> check.Named:
        """What ``direction`` yields by ``eager`` in float64, named as a call's results are."""
        if direction not in self._references:
            args = tuple(_double(each) for each in self.args)
            grad = None if self.grad is None else self.grad.double()
            if self.op.is_step:
                call = StepCall(self.op.eager, args)
                self.before = call.before
            else:
                call = AutogradCall(self.op.eager, args, grad, direction, max_batch=1)
            self._references[direction] = _cloned(call.results())
        return self._references[direction]


def _cloned(results: check.Named) -> check.Named:
    return {name: each.clone() for name, each in results.items()}


def _double(value: Any) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


class AutogradCall:
    """One direction of a differentiable function.

    ``forward`` records for autograd, as in training. ``backward``'s forwards run outside the clock,
    one for each call, so nothing is retained that training would free. Gradients are ``None``
    before each backward, and the gradient of a non-scalar output is made outside the clock.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        grad: torch.Tensor | None,
        direction: str,
        max_batch: int,
    ):
        self._function, self._args, self._grad = function, args, grad
        self._leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        self._queue: list[torch.Tensor] = []
        self._direction = direction
        self.call = getattr(self, f"_{direction}")
        self.max_batch = max_batch if direction == "backward" else 10_000

    def prepare(self, calls: int) -> None:
        """Runs the forwards whose backwards will be timed."""
        self._queue.clear()
        if self._direction == "backward":
            self._queue.extend(self._function(*self._args) for _ in range(calls))

    def _forward(self) -> torch.Tensor:
        return self._function(*self._args)

    def _backward(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        self._queue.pop().backward(self._grad)

    def _both(self) -> torch.Tensor:
        for leaf in self._leaves:
            leaf.grad = None
        out = self._function(*self._args)
        out.backward(self._grad)
        return out

    def capturable(self) -> Callable[[], Any]:
        """The same work without ``prepare``, for a CUDA graph; ``backward`` retains its graph."""
        if self._direction == "forward":
            return self._forward
        if self._direction == "both":
            return lambda: torch.autograd.grad(
                self._function(*self._args), self._leaves, self._grad
            )
        out = self._function(*self._args)
        return lambda: torch.autograd.grad(out, self._leaves, self._grad, retain_graph=True)

    def results(self) -> check.Named:
        """The output, the gradients of the leaves, or both, of one call."""
        with check.same_random_numbers():
            self.prepare(1)
            out = self.call()
        grads = [] if self._direction == "forward" else [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return named(self._direction, grads if out is None else [out.detach(), *grads])


class StepCall:
    """A step op on weights of its own, which are reset before each batch of calls."""

    max_batch = 10_000

    def __init__(self, function: Callable[..., torch.Tensor], args: tuple[Any, ...]):
        self._function = function
        self._start = args
        self._args = tuple(a.detach().clone() if torch.is_tensor(a) else a for a in args)
        self._function(*self._args)
        pairs = [(a, s) for a, s in zip(self._args, args, strict=True) if torch.is_tensor(a)]
        self._mutated = [(a, s.detach()) for a, s in pairs if not torch.equal(a, s)]
        self.mutated = [tensor for tensor, _ in self._mutated]
        """The tensors that a step updates in place."""
        self.before = {f"updated_{i}": start for i, (_, start) in enumerate(self._mutated)}
        """What they are before it, named as its results are."""

    def prepare(self, calls: int) -> None:
        """Back to the start: training on would leave the range in which all variants agree."""
        for tensor, start in self._mutated:
            tensor.copy_(start)

    def call(self) -> torch.Tensor | None:
        """One step; returns its loss, if it has one."""
        return self._function(*self._args)

    def capturable(self) -> Callable[[], Any]:
        """A step needs no preparation to be repeated."""
        return self.call

    def results(self) -> check.Named:
        """The loss, if there is one, and the updated tensors of one step from the start."""
        self.prepare(1)
        loss = self.call()
        return named("step", [loss, *self.mutated])


def named(direction: str, results: Sequence[torch.Tensor | None]) -> check.Named:
    """Names the results of a call: the output first, unless ``direction`` has none; of a step, the
    loss, which is None if it has none and then left out, and what it updated."""
    names = [f"grad_{i}" for i in range(len(results))]
    if direction == "step":
        names = ["loss", *(f"updated_{i}" for i in range(len(results) - 1))]
        if results[0] is None:
            names, results = names[1:], results[1:]
    elif direction != "backward":
        names = ["out", *names[:-1]]
    return dict(zip(names, results, strict=True))


@dataclass
class Variant:
    """A backend or peer on one case: what is timed, and what it computed."""

    name: str
    kind: str
    """``backend`` or ``peer``."""
    subject: Subject
    results: Callable[[], check.Named]
    """One call through the timed entry point."""
    reference: Callable[[], check.Named]

    def verify(self, inputs: Inputs) -> check.CheckResult:
        """One call, compared with ``eager`` in float64 under the op's derived tolerance; where it
        draws random numbers of its own (``Op.timed_eager``), with what these should have given."""
        timed = inputs.op.timed_eager
        if timed is None or (self.kind == "backend" and self.name != "eager"):
            return check.compare(self.results(), self.reference(), inputs.terms, inputs.before)
        results = self.results()
        expected, improbable = timed.expected(results, inputs.args, inputs.grad)
        result = check.compare(results, expected, inputs.terms)
        return replace(result, ok=False, detail=improbable) if result and improbable else result


def torch_variant(
    name: str,
    kind: str,
    function: Callable[..., Any],
    inputs: Inputs,
    case: Case,
) -> Variant:
    """A variant that is a function on PyTorch tensors, differentiated by autograd."""
    if inputs.op.is_step:
        call = StepCall(function, inputs.args)
    else:
        call = AutogradCall(function, inputs.args, inputs.grad, case.direction, _queue(case))
    subject = Subject(
        name,
        call.call,
        call.prepare,
        synchronizer(case.device),
        call.max_batch,
        call.capturable,
    )
    return Variant(name, kind, subject, call.results, lambda: inputs.reference(case.direction))


def backend_variant(name: str, inputs: Inputs, case: Case) -> Variant:
    """A backend through the op's public function; ``eager`` is the bare baseline.

    The baseline is what a user writes without the lab, so it pays for none of the lab's checks.
    """
    op = inputs.op
    function = op.baseline if name == "eager" else functools.partial(op.function, backend=name)
    return torch_variant(name, "backend", function, inputs, case)


def _queue(case: Case) -> int:
    """How many forwards may wait for their backwards; one on a GPU, where compiled CUDA graphs
    overwrite their outputs at the next call."""
    if torch.device(case.device).type == "cuda":
        return 1
    return max(1, min(_QUEUE_BYTES // max(case.cost.bytes, 1), _MAX_QUEUE))


def synchronizer(device: str) -> Callable[[], None]:
    """Waits for all work on ``device``; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def floor_of(case: Case, clock: str, ceilings: roofline.Ceilings) -> float:
    """The least seconds that the case can take on this machine."""
    return roofline.floor(case.cost, case.dtype, clock, ceilings)
