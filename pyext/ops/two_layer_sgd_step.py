"""two_layer_sgd_step: one whole training step of the two-layer network, in place. A step op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from pyext.backends import Backend, select, select_at_once
from pyext.ops import _checks, _two_layer
from pyext.ops import two_layer as _network
from pyext.ops._autograd import direct
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput


def two_layer_sgd_step(
    x: torch.Tensor,
    y: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    lr: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Forward, sum of squared errors, backward and ``w -= lr * grad``, as one step.

    ``loss = ((relu(x @ w1) @ w2 - y) ** 2).sum()``; then both weights move against their gradient.

    It is an optimizer step: it runs as under ``torch.no_grad()``, so the weights may be leaves that
    require grad; their version counters are bumped, so that a graph which saved them refuses to run
    backward. The loss carries no graph, and forward AD and ``torch.func`` are refused.

    Args:
        x: (batch, in).
        y: (batch, out).
        w1: (in, hidden), updated in place; any strides that do not overlap.
        w2: (hidden, out), updated in place; any strides that do not overlap. The stretch of memory
            from a weight's first element to its last must hold no other operand, not even between
            its elements.
        lr: learning rate, finite and not negative.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    All tensors are of one dtype, float64, float32, bfloat16 or float16, and on one device. Autocast
    changes nothing.

    Returns:
        The loss before the update: 0-d, on the tensors' device.

    Raises:
        TypeError: an operand is not a tensor, or ``lr`` not a number.
        RuntimeError: shapes, devices or dtypes do not agree; a weight overlaps itself or another
            operand; it is called under ``torch.func`` or forward AD; ``backend`` is not available
            here.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError: ``lr`` is negative, NaN or infinite; an unknown ``backend``.

    Whatever it refuses, it has changed nothing.
    """
    op = "two_layer_sgd_step"
    lr = _checks.learning_rate(op, lr)
    if is_compiling():  # a refusal must come from what is traced
        _check(op, x, y, w1, w2)
        return _step(select(backend, x.device, op), x, y, w1, w2, lr)
    try:
        chosen = select_at_once(backend, x.device, op)
        if chosen.name in ("eager", "triton"):  # Triton's update is counted before it is refused
            _check(op, x, y, w1, w2)
        else:
            # The compiled raw ops refuse operands that do not agree or overlap, but not in good
            # words. To ask for that here as well takes 9 of 147 µs at 64 x 1000 x 100 x 10.
            _checks.no_transforms(op, x, y, w1, w2)
            _checks.writable(op, "w1", w1)
            _checks.writable(op, "w2", w2)
            if x.is_neg() or y.is_neg():  # the dispatcher hands the raw op a copy
                updatable(op, x, y, w1, w2)
        return _step(chosen, x, y, w1, w2, lr)
    except Exception:  # a raw op refuses before it changes anything
        _checks.say_better(_check, op, x, y, w1, w2)
        raise


def _step(chosen: Backend, x, y, w1, w2, lr: float) -> torch.Tensor:
    """The step, once it is checked."""
    if chosen.namespace is None:
        with torch.autocast(x.device.type, enabled=False):
            return eager(x, y, w1, w2, lr)
    raw = direct(chosen.raw)
    weights_vary = w1.requires_grad or w2.requires_grad
    if (weights_vary or x.requires_grad or y.requires_grad) and torch.is_grad_enabled():
        with torch.no_grad():
            loss = raw.two_layer_sgd_step(x, y, w1, w2, lr)
    else:
        loss = raw.two_layer_sgd_step(x, y, w1, w2, lr)
    _checks.count_update(w1, w2)
    return loss


def _check(op: str, x, y, w1, w2) -> None:
    """Everything that the step refuses of its tensors."""
    if isinstance(x, torch.Tensor) and x.dim() != 2:  # y has x's leading dimensions, so it, too
        raise RuntimeError(f"{op}(): argument 'x' must be a matrix, but has shape {tuple(x.shape)}")
    agree(op, x, y, w1, w2)
    updatable(op, x, y, w1, w2)


def agree(op: str, x, y, w1, w2) -> None:
    """Refuses operands whose types, shapes, devices or dtypes do not agree.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as :func:`two_layer_sgd_step` documents.
    """
    _two_layer.check(op, x, w1, w2, y=y)
    _two_layer.one_floating_dtype(op, x, w1, w2, y=y)


def updatable(op: str, x, y, w1, w2) -> None:
    """``RuntimeError`` unless the weights can be updated in place, beside x and y."""
    _checks.no_transforms(op, x, y, w1, w2)
    _checks.updatable_in_place(op, {"w1": w1, "w2": w2}, x=x, y=y)


def eager(x, y, w1, w2, lr) -> torch.Tensor:
    """The reference: the hand-written loop's body, with the gradients by autograd."""
    with torch.enable_grad():
        leaves = [weight.detach().requires_grad_() for weight in (w1, w2)]
        loss = F.mse_loss(_network.eager(x.detach(), *leaves), y.detach(), reduction="sum")
        grads = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        for weight, grad in zip((w1, w2), grads, strict=True):
            weight -= lr * grad
    return loss.detach()


def _fake_step(x, y, w1, w2, lr):
    agree("two_layer_sgd_step", x, y, w1, w2)
    _checks.each_element_once("two_layer_sgd_step", {"w1": w1, "w2": w2})
    return x.new_empty(())


def _raw_samples(device, dtype) -> Iterator[tuple]:
    for sample in sample_inputs(device, dtype):
        yield sample.args


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """As ``two_layer`` without biases; weights with every kind of strides but overlapping ones."""
    for name, operands, smooth in _two_layer.sample_operands(device, dtype, requires_grad):
        if name in ("expanded", "no_bias"):
            continue
        args = tuple(operands[each] for each in ("x", "y", "w1", "w2"))
        yield SampleInput((*args, 0.125), name=name, gradcheckable=smooth)
    _, operands, _ = next(_two_layer.sample_operands(device, dtype, requires_grad))
    args = tuple(operands[each] for each in ("x", "y", "w1", "w2"))
    yield SampleInput((*args, 0.0), name="lr_zero")


def error_inputs(device) -> Iterator[ErrorInput]:
    """What does not agree, a bad learning rate, and weights that cannot be updated in place."""
    for case in _two_layer.common_error_inputs(device, ("x", "y", "w1", "w2")):
        args = (*case.args, 0.1)
        yield ErrorInput(args, case.error_type, case.error_regex, name=case.name)
    x, y, w1, w2 = (torch.ones(each, device=device) for each in ((5, 4), (5, 2), (4, 3), (3, 2)))
    for lr in (-0.1, float("nan"), float("inf"), 10**400):
        name = f"lr_{lr}"[:8]
        yield ErrorInput((x, y, w1, w2, lr), ValueError, "Invalid learning rate", name=name)
    yield ErrorInput((x, y, w1, w2, "fast"), TypeError, "'lr' must be a float", name="lr_str")
    yield ErrorInput((x[None], y, w1, w2, 0.1), RuntimeError, "'x' must be a matrix", name="x_3d")
    expanded = torch.ones(4, 1, device=device).expand(4, 3)
    yield ErrorInput((x, y, expanded, w2, 0.1), RuntimeError, "single memory", name="expanded")
    square = torch.ones(4, 4, device=device)
    yield ErrorInput((x, x, square, square, 0.1), RuntimeError, "passed twice", name="same_weight")
    both = torch.ones(18, device=device)
    shared = both[:12].view(4, 3), both[10:16].view(3, 2)
    yield ErrorInput((x, y, *shared, 0.1), RuntimeError, "shares memory", name="overlapping")
    both = torch.ones(32, device=device)
    w1, x = both[:12].view(4, 3), both[10:30].view(5, 4)
    yield ErrorInput((x, y, w1, w2, 0.1), RuntimeError, "shares memory", name="overlapping_x")
    both = torch.ones(4, 6, device=device)
    interleaved = both[:, ::2]
    y = both[:, 1::2][:, :2]
    args = (torch.ones(4, 4, device=device), y, interleaved, torch.ones(3, 2, device=device), 0.1)
    yield ErrorInput(args, RuntimeError, "shares memory", name="interleaved")
    x, y, w1, w2 = (torch.ones(each, device=device) for each in ((5, 4), (5, 2), (4, 3), (3, 2)))
    negated = torch.ones(4, 3, dtype=torch.complex64, device=device).conj().imag
    yield ErrorInput((x, y, negated, w2, 0.1), RuntimeError, "negated view", name="negated")
    both = torch.ones(4, 4, dtype=torch.complex64, device=device)
    y, w2 = (torch.ones(4, 2, device=device) for _ in range(2))
    args = (both.conj().imag, y, both.imag, w2, 0.1)
    yield ErrorInput(args, RuntimeError, "shares memory", name="negated_x")


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Five products; x, y read and both weights read and written once."""
    return _two_layer.cost(direction, shape, itemsize, y=True)


def benchmark_inputs(shape, dtype, device, generator) -> tuple:
    """x, y, w1, w2 and a learning rate.

    At 1e-6 thousands of steps stay finite. A bfloat16 weight would not move by that, and a step
    that cannot be seen cannot be checked; 2**-11 shows, though long runs of a large batch diverge.
    """
    operands = _two_layer.benchmark_operands(shape, dtype, device, generator, requires_grad=False)
    lr = 1e-6 if dtype in (torch.float32, torch.float64) else 2.0**-11
    return *(operands[name] for name in ("x", "y", "w1", "w2")), lr


def by_hand(x, y, w1, w2, lr) -> torch.Tensor:
    """The step in PyTorch ops without autograd, in place wherever that is possible."""
    hidden = x.mm(w1).relu_()
    error = hidden.mm(w2).sub_(y)
    loss = error.square().sum()
    grad_w1, grad_w2 = _two_layer.by_hand_gradients(x, w1, w2, hidden, error.mul_(2))
    w1.sub_(grad_w1, alpha=lr)
    w2.sub_(grad_w2, alpha=lr)
    return loss


OP = Op(
    name="two_layer_sgd_step",
    function=two_layer_sgd_step,
    eager=eager,
    raw_ops=(
        RawOp(
            "two_layer_sgd_step",
            _fake_step,
            _raw_samples,
            mutates=("w1", "w2"),
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda x, y, w1, w2, lr: _two_layer.reduction_length(x, w1, w2) + y.numel(),
    shape_names=_two_layer.NAMES,
    benchmark_shapes=_two_layer.BENCHMARK_SHAPES,
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    directions=("step",),
    is_step=True,
    by_hand=by_hand,
)
