"""What a user would pick instead of a kernel of their own, timed beside the backends.

``eager-inplace`` is the same work written by hand without autograd, ``compile`` and ``compile-max``
are PyTorch's compiler, ``graph`` is eager in a captured CUDA graph, ``jax`` is XLA.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from pyext.lab import check
from pyext.lab.cases import Case, Inputs, StepCall, Variant, named, synchronizer, torch_variant
from pyext.lab.measure import Subject
from pyext.lab.roofline import dtype_name
from pyext.registry import Op

# Lets XLA's thread pool follow --threads; read when JAX starts.
_JAX_THREADS = "NPROC"


class Unavailable(RuntimeError):
    """A peer cannot run here; the message says why and what to do."""


class Peers:
    """Makes the peers of one run; compiled functions are kept while op, shape and dtype stay."""

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._key: tuple | None = None

    def variant(self, name: str, inputs: Inputs, case: Case) -> Variant | None:
        """The peer called ``name`` on ``case``; None where it does not exist by its nature.

        Raises:
            Unavailable: it could exist, but not here.
        """
        if reason := why_unavailable(name, case.device):
            raise Unavailable(reason)
        return _MAKERS[name](self, inputs, case)

    def compiled(self, mode: str | None, inputs: Inputs, case: Case) -> Callable[..., Any]:
        """The op's baseline through ``torch.compile``, for static shapes.

        A step is compiled from the version without autograd: it is the faster one, and needs no
        break in the graph.
        """
        # It warns where CUDA is installed but no GPU is there, which here is nothing to warn of.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import torch._dynamo
        import torch._inductor.config as inductor

        # Worker processes that compile compete on a CPU with what is being timed there.
        if torch.device(case.device).type == "cpu":
            inductor.compile_threads = 1
        key = (case.op, case.shape, case.dtype, case.device)
        if key != self._key:
            self._key = key
            self._compiled.clear()
            torch._dynamo.reset()  # otherwise the ninth shape silently runs uncompiled
        name = mode or "default"
        if name not in self._compiled:
            op = inputs.op
            function = op.by_hand if op.is_step and op.by_hand else op.baseline
            self._compiled[name] = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        return self._compiled[name]


def why_unavailable(name: str, device: torch.device | str) -> str | None:
    """Why no op can be timed by this peer on ``device``, and what to do; None if ops can."""
    kind = torch.device(device).type
    if name == "graph" and kind != "cuda":
        return "CUDA graphs need an NVIDIA GPU; use --device cuda on a machine with one"
    if name == "jax":
        if importlib.util.find_spec("jax") is None:
            extra = "jax[cuda13]" if kind == "cuda" else "jax"
            return f'JAX is not installed; pip install "{extra}"'
        if kind == "cuda" and not _jax_has_gpu():
            return 'this JAX has no GPU support; pip install "jax[cuda13]"'
    return None


def _by_hand(peers: Peers, inputs: Inputs, case: Case) -> Variant | None:
    op = inputs.op
    if op.by_hand is None or case.direction not in ("both", "step"):
        return None
    if op.is_step:
        return torch_variant("eager-inplace", "peer", op.by_hand, inputs, case)
    args = tuple(each.detach() if torch.is_tensor(each) else each for each in inputs.args)
    grad = () if inputs.grad is None else (inputs.grad,)

    def call() -> tuple[torch.Tensor, ...]:
        return op.by_hand(*args, *grad)

    subject = Subject(
        "eager-inplace", call, synchronize=synchronizer(case.device), capturable=lambda: call
    )
    return Variant(
        "eager-inplace",
        "peer",
        subject,
        lambda: named(case.direction, call()),
        lambda: inputs.reference(case.direction),
    )


def _compile(peers: Peers, inputs: Inputs, case: Case) -> Variant:
    return torch_variant("compile", "peer", peers.compiled(None, inputs, case), inputs, case)


def _compile_max(peers: Peers, inputs: Inputs, case: Case) -> Variant:
    function = peers.compiled("max-autotune", inputs, case)
    if torch.device(case.device).type == "cuda":

        def stepwise(*args):
            # Its CUDA graphs reuse their outputs' memory from here on.
            torch.compiler.cudagraph_mark_step_begin()
            return function(*args)

        variant = torch_variant("compile-max", "peer", stepwise, inputs, case)
        variant.subject.capturable = None
        variant.subject.why_not_capturable = "it brings CUDA graphs of its own"
        return variant
    return torch_variant("compile-max", "peer", function, inputs, case)


def _graph(peers: Peers, inputs: Inputs, case: Case) -> Variant:
    """Eager ops in a captured CUDA graph: inputs and outputs stay where they were captured."""
    graph, outputs = torch.cuda.CUDAGraph(), []
    stream = torch.cuda.Stream(case.device)
    stream.wait_stream(torch.cuda.current_stream(case.device))
    with torch.cuda.stream(stream):
        call = _captured_call(inputs, case)
        for _ in range(3):
            call()
    torch.cuda.current_stream(case.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        outputs.extend(call())
    subject = Subject(
        "graph",
        graph.replay,
        call.prepare,
        synchronizer(case.device),
        why_not_capturable="it is a captured graph; eager's row by this clock is its replay",
    )

    def results() -> check.Named:
        call.prepare(1)
        graph.replay()
        copies = [None if each is None else each.clone() for each in outputs]
        return named(case.direction, copies)

    return Variant("graph", "peer", subject, results, lambda: inputs.reference(case.direction))


class _captured_call:
    """What the ``graph`` peer captures: one direction, as the list of its results."""

    def __init__(self, inputs: Inputs, case: Case):
        self._inputs, self._direction = inputs, case.direction
        self._step = StepCall(inputs.op.baseline, inputs.args) if inputs.op.is_step else None
        # Leaves of its own over the same memory: a graph that is kept pins a leaf's gradient to the
        # stream that it was recorded on, for every other variant too.
        self._args = tuple(
            each.detach().requires_grad_(each.requires_grad) if torch.is_tensor(each) else each
            for each in inputs.args
        )
        self._leaves = [a for a in self._args if torch.is_tensor(a) and a.requires_grad]
        if case.direction == "backward":
            self._out = inputs.op.baseline(*self._args)

    def prepare(self, calls: int) -> None:
        if self._step:
            self._step.prepare(calls)

    def __call__(self) -> list[torch.Tensor | None]:
        if self._step:
            return [self._step.call(), *self._step.mutated]
        grad = self._inputs.grad
        if self._direction == "backward":
            return list(torch.autograd.grad(self._out, self._leaves, grad, retain_graph=True))
        out = self._inputs.op.baseline(*self._args)
        if self._direction == "forward":
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, self._leaves, grad)]


# --- JAX -----------------------------------------------------------------------------------------


def _jax(peers: Peers, inputs: Inputs, case: Case) -> Variant:
    jax = _import_jax()
    module = _jax_module(inputs.op)
    if module is None:
        raise Unavailable(f"{inputs.op.name} is not written in JAX; add pyext/lab/jax_ops")
    call = _JaxCall(jax, module, inputs, case)
    subject = Subject(
        "jax", call.call, call.prepare, call.synchronize, call.max_batch, on_stream=False
    )
    return Variant("jax", "peer", subject, call.results, lambda: inputs.reference(case.direction))


def _import_jax() -> Any:
    os.environ.setdefault(_JAX_THREADS, str(torch.get_num_threads()))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 behind one's back
    return jax


def _jax_has_gpu() -> bool:
    try:
        return bool(_import_jax().devices("cuda"))
    except RuntimeError:
        return False


def _jax_module(op: Op) -> Any:
    name = f"pyext.lab.jax_ops.{op.name}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _of_all_but_integers(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """``function`` of the other arguments: integers are sizes, which XLA takes for constants."""

    def of_the_others(*given):
        others = iter(given)
        return function(*(each if isinstance(each, int) else next(others) for each in args))

    return of_the_others


class _JaxCall:
    """One direction of a JAX function, jitted; all that is returned is computed."""

    max_batch = 10_000

    def __init__(self, jax: Any, module: Any, inputs: Inputs, case: Case):
        self._jax, self._case = jax, case
        self._device = jax.devices(torch.device(case.device).type)[0]
        given = [each for each in inputs.args if not isinstance(each, int)]
        self._args = [self._from_torch(each) for each in given]
        self._grad = None if inputs.grad is None else self._from_torch(inputs.grad)
        self._wanted = [i for i, a in enumerate(given) if torch.is_tensor(a) and a.requires_grad]
        self._last: Any = None
        self._queue: list[Any] = []
        self.call = getattr(self, f"_{case.direction}")
        function = _of_all_but_integers(module.function, inputs.args)
        if case.direction == "step":
            self._donated = module.DONATED
            self._start = self._args
            self._jitted = jax.jit(function, donate_argnums=module.DONATED)
            return
        if case.direction == "backward":
            self.max_batch = 64

        def forward(*args):
            """Output and pullback, for the leaves that require grad."""

            def of_leaves(*leaves):
                every = list(args)
                for index, leaf in zip(self._wanted, leaves, strict=True):
                    every[index] = leaf
                return function(*every)

            return jax.vjp(of_leaves, *(args[index] for index in self._wanted))

        def both(grad, *args):
            out, pullback = forward(*args)
            return out, *pullback(self._cotangent(out, grad))

        self._jit_function = jax.jit(function)
        self._jit_forward = jax.jit(forward)
        self._jit_pullback = jax.jit(lambda pullback, grad: pullback(grad))
        self._jit_both = jax.jit(both)
        if case.direction == "backward" and self._grad is None:
            self._grad = self._cotangent(self._jit_forward(*self._args)[0], None)

    def _cotangent(self, out: Any, grad: Any) -> Any:
        return self._jax.numpy.ones_like(out) if grad is None else grad

    def prepare(self, calls: int) -> None:
        """Resets the weights of a step; runs the forwards whose backwards will be timed."""
        jax = self._jax
        if self._case.direction == "step":
            copies = {i: jax.numpy.copy(self._start[i]) for i in self._donated}
            self._args = [copies.get(i, each) for i, each in enumerate(self._start)]
            jax.block_until_ready(self._args)
        elif self._case.direction == "backward":
            self._queue = [self._jit_forward(*self._args)[1] for _ in range(calls)]
            jax.block_until_ready(self._queue)

    def synchronize(self) -> None:
        """JAX returns before it has computed."""
        self._jax.block_until_ready(self._last)
        self._last = None

    def _forward(self) -> None:
        # Without the pullback's residuals, which only cost time here: the peer at its best.
        self._last = self._jit_function(*self._args)

    def _backward(self) -> None:
        self._last = self._jit_pullback(self._queue.pop(), self._grad)

    def _both(self) -> None:
        self._last = self._jit_both(self._grad, *self._args)

    def _step(self) -> None:
        self._last = self._jitted(*self._args)
        for index, updated in zip(self._donated, self._last[1:], strict=True):
            self._args[index] = updated

    def results(self) -> check.Named:
        """The results of one call as PyTorch tensors."""
        self.prepare(1)
        self.call()
        last = self._last
        self.synchronize()
        outputs = (last,) if self._case.direction == "forward" else last
        tensors = [None if each is None else self._to_torch(each) for each in outputs]
        return named(self._case.direction, tensors)

    def _from_torch(self, value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16):
            narrow = getattr(self._jax.numpy, dtype_name(value.dtype))
            array = self._jax.numpy.asarray(value.float().numpy()).astype(narrow)
        else:
            array = self._jax.numpy.array(value.numpy())
        return self._jax.device_put(array, self._device)

    def _to_torch(self, array: Any) -> torch.Tensor:
        import numpy

        wide = numpy.asarray(array.astype("float64"))
        return torch.from_numpy(wide.copy()).to(self._case.device, self._case.torch_dtype)


_MAKERS: dict[str, Callable[[Peers, Inputs, Case], Variant | None]] = {
    "eager-inplace": _by_hand,
    "compile": _compile,
    "compile-max": _compile_max,
    "graph": _graph,
    "jax": _jax,
}
PEERS = tuple(_MAKERS)
"""The names of all peers."""


def kind_of(name: str) -> str:
    """``peer`` or ``backend``, by a variant's name."""
    return "peer" if name in PEERS else "backend"
