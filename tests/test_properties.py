"""Properties that hold for any shapes, strides, offsets, dtypes and values, drawn by hypothesis.

The draws are the same in every run (``derandomize``), and a failure prints the smallest tensors
that show it as code to paste. A few examples in the plain tier, more in the slow one; both find
what nobody thought of when the sample inputs were written.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import configurations, through

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import check
from pyext.ops import _samples

SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40)
FLOATING = st.sampled_from(registry.FLOATING_DTYPES)
EXTENTS = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33))


@dataclass(frozen=True)
class Drawn:
    """A strided tensor as hypothesis drew it; prints as code that makes it again.

    ``order`` permutes the dimensions in memory, ``steps`` are the gaps between their elements (0:
    expanded), ``offset`` elements lie before. Values are normal but for ``special`` ones, or the
    squares of such.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int = 0
    seed: int = 0
    special: tuple[tuple[int, float], ...] = ()
    squared: bool = False

    def tensor(self, device: str) -> torch.Tensor:
        strides, span = [0] * len(self.shape), 1
        for dimension in self.order:
            strides[dimension] = span * self.steps[dimension]
            span = max(span, strides[dimension] * max(self.shape[dimension], 1))
        memory = _samples.normal((self.offset + span,), device, self.dtype, self.seed)
        for index, value in self.special:
            memory[index % len(memory)] = value
        if self.squared:
            memory.square_()
        return memory.as_strided(self.shape, strides, self.offset)


@st.composite
def tensors(draw, shape, dtype, special=False, overlapping=True) -> Drawn:
    """Of one shape and dtype, with any layout."""
    dimensions = len(shape)
    steps = st.sampled_from((0, 1, 1, 2, 3) if overlapping else (1, 1, 2, 3))
    index_and_value = st.tuples(st.integers(0, 1000), st.sampled_from(SPECIAL))
    return Drawn(
        shape,
        dtype,
        tuple(draw(st.permutations(range(dimensions)))),
        tuple(draw(st.lists(steps, min_size=dimensions, max_size=dimensions))),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 9)),
        tuple(draw(st.lists(index_and_value, max_size=4))) if special else (),
    )


@st.composite
def relu_calls(draw):
    shape = draw(st.lists(EXTENTS, max_size=3).map(tuple))
    return (draw(tensors(shape, draw(FLOATING), special=True)),), {}


@st.composite
def dropout_calls(draw):
    """The seed has any bits in both halves."""
    ((x,), _), p = draw(relu_calls()), draw(st.floats(0, 1))
    return (x, p), {"seed": draw(st.integers(-(2**63), 2**63 - 1))}


@st.composite
def relu_max_pool2d_calls(draw):
    """Windows of any size up to the input's; half of the calls have windows of 2 x 2."""
    kernel = stride = (2, 2)
    padding = (0, 0)
    if draw(st.booleans()):
        kernel, stride = (tuple(draw(st.integers(1, 4)) for _ in range(2)) for _ in range(2))
        padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    planes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    extents = tuple(size + draw(st.sampled_from((0, 1, 2, 3, 7, 14, 33))) for size in kernel)
    input = draw(tensors((*planes, *extents), draw(FLOATING), special=True))
    return (input, kernel, stride, padding), {}


@st.composite
def mse_loss_calls(draw):
    """Shapes that broadcast, each with its own dtype."""
    shape = draw(st.lists(EXTENTS, max_size=3).map(tuple))
    shapes = [
        tuple(draw(st.sampled_from((extent, extent, 1))) for extent in shape)[
            draw(st.integers(0, len(shape))) if draw(st.booleans()) else 0 :
        ]
        for _ in range(2)
    ]
    args = tuple(draw(tensors(each, draw(FLOATING), special=True)) for each in shapes)
    return args, {"reduction": draw(st.sampled_from(("none", "mean", "sum")))}


def network(draw, names, overlapping=True):
    n, n_in, n_hidden, n_out = (draw(EXTENTS) for _ in range(4))
    dtype = draw(FLOATING)
    shapes = {
        "x": (n, n_in),
        "y": (n, n_out),
        "w1": (n_in, n_hidden),
        "w2": (n_hidden, n_out),
        "b1": (n_hidden,),
        "b2": (n_out,),
    }
    return tuple(
        None
        if name.startswith("b") and draw(st.booleans())
        else draw(tensors(shapes[name], dtype, overlapping=overlapping or name in "xy"))
        for name in names
    )


@st.composite
def two_layer_calls(draw):
    return network(draw, ("x", "w1", "w2", "b1", "b2")), {}


@st.composite
def two_layer_mse_loss_calls(draw):
    kwargs = {"reduction": draw(st.sampled_from(("none", "mean", "sum")))}
    return network(draw, ("x", "y", "w1", "w2", "b1", "b2")), kwargs


@st.composite
def two_layer_sgd_step_calls(draw):
    return (*network(draw, ("x", "y", "w1", "w2"), overlapping=False), 0.25), {}


@st.composite
def adadelta_step_calls(draw):
    shape, dtype = draw(st.lists(EXTENTS, max_size=3).map(tuple)), draw(FLOATING)
    param, square_avg, acc_delta = (
        draw(tensors(shape, dtype, special=True, overlapping=False)) for _ in range(3)
    )
    averages = (replace(each, squared=True) for each in (square_avg, acc_delta))
    rates = (st.sampled_from(each) for each in ((1.0, 0.25), (0.5, 0.9), (1e-6, 0.5), (0.0, 0.5)))
    grad = draw(tensors(shape, dtype, special=True))
    return (param, grad, *averages, *(draw(each) for each in rates)), {}


@st.composite
def two_layer_sgd_steps_calls(draw):
    # Of several steps, each makes the rounding errors of the one before larger.
    args = network(draw, ("x", "y", "w1", "w2"), overlapping=False)
    return (*args, 0.25, draw(st.integers(0, 1))), {}


CALLS = {
    "dropout": dropout_calls(),
    "adadelta_step": adadelta_step_calls(),
    "relu": relu_calls(),
    "relu_max_pool2d": relu_max_pool2d_calls(),
    "mse_loss": mse_loss_calls(),
    "two_layer": two_layer_calls(),
    "two_layer_mse_loss": two_layer_mse_loss_calls(),
    "two_layer_sgd_step": two_layer_sgd_step_calls(),
    "two_layer_sgd_steps": two_layer_sgd_steps_calls(),
}


def test_every_op_has_a_strategy():
    assert set(CALLS) == set(registry.ops())


def verify(op, function, args, kwargs) -> check.CheckResult:
    """``check.verify``; a result in which large terms cancel is held to the size of its terms.

    The check's tolerance is relative to the result. Of one element, say out - y with y near out,
    hardly anything is left, while the rounding errors are still those of out.
    """
    expected = check.reference(op, args, kwargs)
    result = check.verify(op, function, args, kwargs, expected=expected)
    if result.ok:
        return result
    actual = check.call(op, function, args, kwargs)
    sizes = sizes_of_terms(op, args, kwargs)
    with_size = {}, {}
    for name, value in actual.items():
        if value is None or expected[name] is None:
            continue
        size = sizes[name].to(value.dtype).reshape(1)
        for results, each in zip(with_size, (value, expected[name]), strict=True):
            results[name] = torch.cat([each.flatten(), size.to(each.dtype)])
    return check.compare(*with_size, op.reduction_length(*args, **kwargs))


def sizes_of_terms(op, args, kwargs) -> check.Named:
    """Per result, the largest sum of its terms' absolute values: no sum of these cancels."""

    def positive(name, value):
        if not torch.is_tensor(value):
            return value
        value = value.detach().double().abs().nan_to_num(0, 0, 0)
        return (-value if name in ("y", "target") else value).requires_grad_(not op.is_step)

    names = op.eager.__code__.co_varnames
    given = [positive(name, value) for name, value in zip(names, args, strict=False)]
    if op.is_step:
        results = check.call(op, op.eager, tuple(given), kwargs)
        for name, before in check.before_step(op, tuple(given)).items():
            results[name] = before + (before - results[name]).abs()  # what was, and the update
    else:
        out = op.eager(*given, **kwargs)
        out.backward(check.grad_output(out).abs())
        results = {"out": out.detach()} | {
            f"grad_{i}": each.grad for i, each in enumerate(given) if torch.is_tensor(each)
        }
    return {k: v.abs().max() if v.numel() else v.new_zeros(()) for k, v in results.items()}


def check_property(op, backend, device, examples):
    @hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(CALLS[op.name])
    def agrees_with_eager(call):
        drawn, kwargs = call
        args = tuple(
            each.tensor(device).requires_grad_(not op.is_step) if isinstance(each, Drawn) else each
            for each in drawn
        )
        if "seed" in kwargs:
            kwargs = {"seed": torch.tensor(kwargs["seed"], device=device)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using a target size")
            result = verify(op, through(op, backend), args, kwargs)
        assert result.ok, result.detail

    agrees_with_eager()


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_agrees_with_eager_whatever_is_drawn(op, backend, device):
    check_property(op, backend, device, 8 if BACKENDS[backend].interpreted else 40)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_agrees_with_eager_whatever_is_drawn_at_length(op, backend, device):
    check_property(op, backend, device, 40 if BACKENDS[backend].interpreted else 200)
