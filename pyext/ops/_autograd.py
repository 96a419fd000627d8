"""Makes ``torch.autograd.Function`` shells from an op's one set of derivative formulas.

One shell does not fit all callers: ``torch.func`` needs ``setup_context``, whose signature binding
costs 28 of 65 µs of a small ReLU forward and backward; ``torch.compile(fullgraph=True)`` refuses a
custom ``jvp``. So each set of formulas gets three, over the same raw ops, and a call picks one.
Those that are ``EverydayFormulas`` get a fourth, which their caller picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor as _is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling

Saved = tuple[tuple[Any, ...], tuple[Any, ...]]


class Formulas(Protocol):
    """An op's forward, what it keeps, and its two derivatives, in terms of raw ops.

    ``raw`` is a backend's dispatcher namespace. Every formula but the forward must be made of ops
    that have a derivative themselves, so that differentiating twice works.
    """

    raw_op: str
    """The name of the raw op that is the forward: it takes the inputs as they are."""

    @staticmethod
    def forward(raw, *inputs) -> Any:
        """In place of ``raw_op``, where the raw op takes something else. The outputs; those that
        ``save`` keeps must be among them."""

    @staticmethod
    def save(inputs: tuple, outputs: tuple) -> Saved:
        """The tensors (or None) and the constants that the derivatives need."""

    @staticmethod
    def backward(raw, tensors: tuple, constants: tuple, needs: tuple, *grads) -> tuple:
        """One gradient (or None) per input; a grad is None where an output was not used."""

    @staticmethod
    def jvp(raw, tensors: tuple, constants: tuple, *tangents) -> Any:
        """One tangent per output; a tangent is None where an input has none."""


class EverydayFormulas(Formulas, Protocol):
    """Formulas that have a shorter way for a common kind of call, of one output.
    ``Differentiable.everyday`` hands it out.

    ``everyday_backward`` is called with a gradient, where grad mode is off and neither torch.func
    nor forward AD nor torch.compile is at work; else ``everyday_formulas``.
    """

    everyday_op: str
    """The name of the raw op without which a backend has no such way."""

    @staticmethod
    def everyday_forward(ctx, raw, *inputs) -> Tensor:
        """The output; ``ctx.to_save`` and ``ctx.constants`` are for the backward."""

    @staticmethod
    def everyday_backward(ctx, raw, grad: Tensor) -> tuple | None:
        """One gradient (or None) per input; None where it must go by ``everyday_formulas``."""

    @staticmethod
    def everyday_formulas(raw, tensors: tuple, constants: tuple, needs: tuple, grad) -> tuple:
        """As ``backward``, of what ``everyday_forward`` saved, and of a gradient that is there."""


class _Direct:
    """A namespace's raw ops as what its attributes call in the end, without two Python calls before
    it: 0.5 of a small raw op's 2.0 µs. Without derivatives, and nothing that torch.compile traces.
    """

    def __init__(self, raw, names: Iterable[str]):
        self.name = raw.name
        for name in names:
            setattr(self, name, getattr(raw, name).default._op)


_direct: dict[str, _Direct] = {}
"""Namespace -> its raw ops, to be called directly."""


def direct(raw):
    """The raw ops of a namespace, to be called without autograd by what has no derivative."""
    return raw if is_dynamo_compiling() else _direct[raw.name]


class Differentiable:
    """Formulas as a callable: ``op(raw, *inputs)`` computes, and records the derivative."""

    _all: list[Differentiable] = []

    def __init__(self, formulas: type[Formulas]):
        self._formulas = formulas
        self._shells: dict[str, SimpleNamespace] = {}
        # By namespace (the one below also by _Direct): what a plain call calls, with autograd and
        # without.
        self._recorded: dict[Any, Callable] = {}
        self._computed: dict[Any, Callable] = {}
        # By namespace, where it has the formulas' everyday_op.
        self._everyday: dict[Any, Callable] = {}
        self._all.append(self)

    def __call__(self, raw, *inputs):
        if type(raw) is _Direct:  # from a formula that nothing differentiates
            return self._computed[raw](*inputs)
        # Not is_compiling(), which is true for more than what traces these lines, and in two calls
        # where this is one: 1 of mse_loss's 41 µs at 4096 elements, which asks three times.
        if is_dynamo_compiling():
            if _records(inputs):
                return self._shells[raw.name].compiled.apply(*inputs)
            # PyTorch 2.14 hands a ctx to the forward of a Function that needs no gradient.
            return _forward(self._formulas, getattr(torch.ops, raw.name), inputs)
        return self.at_once(raw, *inputs)

    def at_once(self, raw, *inputs):
        """The same from callers that know that ``torch.compile`` does not trace."""
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._shells[raw.name].functional.apply(*inputs)
        if is_grad_enabled():
            for each in inputs:  # not any(): its generator is 0.4 of a small call's 10 µs
                if isinstance(each, Tensor) and each.requires_grad:
                    return self._recorded[raw](*inputs)
        return self._computed[raw](*inputs)

    def everyday(self, raw) -> Callable | None:
        """What makes an everyday call and records its derivative, from callers that know that an
        input needs one and that ``torch.compile`` does not trace. None where the backend has no
        such way, where nothing is recorded, and under torch.func or forward AD.
        """
        if (
            not is_grad_enabled()
            or _are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return None
        return self._everyday.get(raw)

    @classmethod
    def make_shells(cls, raw, names: Iterable[str]) -> None:
        """Makes every op's shells over one namespace; ``torch.compile`` could not while tracing.

        Args:
            raw: the namespace.
            names: of the raw ops in it.
        """
        direct = _direct[raw.name] = _Direct(raw, names)
        for each in cls._all:
            computed = _without_autograd(each._formulas, direct)
            shells = each._shells[raw.name] = _make_shells(each._formulas, direct, computed)
            each._recorded[raw] = shells.plain.apply
            if shells.everyday is not None:
                each._everyday[raw] = shells.everyday.apply
            each._computed[raw] = each._computed[direct] = computed


def _forward(formulas: type[Formulas], raw, inputs: tuple) -> Any:
    if hasattr(formulas, "raw_op"):
        return getattr(raw, formulas.raw_op)(*inputs)
    return formulas.forward(raw, *inputs)


def _without_autograd(formulas: type[Formulas], direct: _Direct) -> Callable:
    """The forward over ``direct``, in as few Python calls as there can be."""
    if hasattr(direct, getattr(formulas, "raw_op", "")):
        return getattr(direct, formulas.raw_op)
    return lambda *inputs: _forward(formulas, direct, inputs)


def _records(inputs: tuple) -> bool:
    return is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in inputs
    )


def differentiable(formulas: type[Formulas]) -> Differentiable:
    """Class decorator that turns formulas into a ``Differentiable``."""
    return Differentiable(formulas)


def _make_shells(formulas: type[Formulas], direct: _Direct, computed: Callable) -> SimpleNamespace:
    # What torch.compile traces holds the name: it knows no way to trace a namespace held itself.
    namespace, save = direct.name, formulas.save

    def forward_with_ctx(ctx, *inputs):
        outputs = computed(*inputs)
        # As ``keep``: a call of it, and its calls, are 0.8 of 202 µs of two_layer at
        # 64 x 1000 x 100 x 10, as cold as a kernel leaves the caches.
        tensors, constants = save(inputs, outputs if isinstance(outputs, tuple) else (outputs,))
        ctx.to_save = tensors
        ctx.materialize_grads = False
        if constants:
            ctx.constants = constants
        return outputs

    def keep(ctx, inputs, outputs) -> tuple:
        tensors, constants = save(inputs, outputs if isinstance(outputs, tuple) else (outputs,))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if constants:
            ctx.constants = constants
        return tensors

    def forward(*inputs):
        return _forward(formulas, getattr(torch.ops, namespace), inputs)

    def setup_context(ctx, inputs, output):
        keep(ctx, inputs, output)

    def setup_context_for_jvp(ctx, inputs, output):
        ctx.save_for_forward(*keep(ctx, inputs, output))

    def backward_by(derivative: Callable) -> Callable:
        def backward(ctx, *grads):
            if grads[0] is None and all(grad is None for grad in grads):
                return tuple(None for _ in ctx.needs_input_grad)
            return derivative(
                # Not `direct`: torch.compile traces this, and knows no way to trace what it would
                # hold. PyTorch's, where a derivative may be wanted of this or it is traced; to ask
                # that in a call is 1 to 3 of 200 µs of two_layer at 64 x 1000 x 100 x 10.
                getattr(torch.ops, namespace)
                if is_grad_enabled()
                or is_dynamo_compiling()
                or _are_functorch_transforms_active()
                or forward_ad._current_level >= 0
                else _direct[namespace],
                ctx.saved_tensors,
                getattr(ctx, "constants", ()),
                ctx.needs_input_grad,
                *grads,
            )

        return backward

    backward = backward_by(formulas.backward)

    def jvp(ctx, *tangents):
        constants = getattr(ctx, "constants", ())
        return formulas.jvp(getattr(torch.ops, namespace), ctx.saved_tensors, constants, *tangents)

    def shell(suffix: str, **members: Callable) -> type[Function]:
        body = {name: staticmethod(member) for name, member in members.items()}
        return type(formulas.__name__.lstrip("_") + suffix, (Function,), body)

    functional = shell(
        "Functional",
        forward=forward,
        setup_context=setup_context_for_jvp,
        backward=backward,
        jvp=jvp,
    )
    functional.generate_vmap_rule = True
    plain = shell("", forward=forward_with_ctx, backward=backward)
    everyday = None
    if hasattr(direct, getattr(formulas, "everyday_op", "")):
        everyday = _make_everyday(formulas, direct, backward_by(formulas.everyday_formulas), shell)
    for each in filter(None, (plain, everyday)):
        if hasattr(each, "_backward_cls"):
            # What autograd's engine calls. The class's own looks up at each call whether to call
            # ``backward`` or ``vjp``: 3 of 202 µs of two_layer at 64 x 1000 x 100 x 10, as cold as
            # a kernel leaves the caches.
            each._backward_cls.apply = each.backward
            # What a ctx that has none of its own finds, so that no AttributeError is made and
            # dropped.
            each._backward_cls.constants = ()
    return SimpleNamespace(
        plain=plain,
        everyday=everyday,
        functional=functional,
        compiled=shell("Compiled", forward=forward, setup_context=setup_context, backward=backward),
    )


def _make_everyday(
    formulas: type[EverydayFormulas], direct: _Direct, by_formulas: Callable, shell: Callable
) -> type[Function]:
    namespace = direct.name
    forward_of, backward_of = formulas.everyday_forward, formulas.everyday_backward

    def forward(ctx, *inputs):
        ctx.materialize_grads = False
        return forward_of(ctx, direct, *inputs)

    def backward(ctx, grad):
        # What backward_by asks, without a call: 1 of mse_loss's 40 µs at 4096 elements.
        grads = None
        if not (
            grad is None
            or is_grad_enabled()
            or is_dynamo_compiling()
            or _are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            # What is_grads_batched makes, which gradcheck uses: no functorch transform.
            or _is_legacy_batchedtensor(grad)
        ):
            grads = backward_of(ctx, _direct[namespace], grad)
        return by_formulas(ctx, grad) if grads is None else grads

    return shell("", forward=forward, backward=backward)


def add(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there; None if none is."""
    there = [term for term in terms if term is not None]
    return sum(there[1:], there[0]) if there else None


def matmul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a @ b``, or None where a factor is None (an absent tangent or gradient)."""
    return None if a is None or b is None else a @ b
