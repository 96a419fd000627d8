"""adadelta_step: one step of the optimizer Adadelta on one parameter, in place. A step op."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pyext.backends import Backend, select
from pyext.ops import _checks, _samples
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput


def adadelta_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    square_avg: torch.Tensor,
    acc_delta: torch.Tensor,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """One step of ``torch.optim.Adadelta`` on one parameter, as one pass over its memory.

    Adadelta (Zeiler, 2012, arXiv:1212.5701), with ``torch.optim``'s formulas::

        g           = grad + weight_decay * param
        square_avg  = rho * square_avg + (1 - rho) * g ** 2
        delta       = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta   = rho * acc_delta + (1 - rho) * delta ** 2
        param      -= lr * delta

    It runs as under ``torch.no_grad()``, so ``param`` may be a leaf that requires grad; the version
    counters of all that it updates are bumped, so that a graph which saved them refuses to run
    backward. Forward AD and ``torch.func`` are refused.

    Args:
        param: any shape, updated in place; any strides that do not overlap.
        grad: of ``param``'s shape, any strides.
        square_avg, acc_delta: the running averages, zeros before the first step; of ``param``'s
            shape, updated in place; any strides that do not overlap.
        lr: learning rate, not negative.
        rho: how much of the averages is kept, 0 to 1.
        eps: added to both averages before their roots are taken, not negative.
        weight_decay: L2 penalty, not negative.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    All tensors are of one dtype, float64, float32, bfloat16 or float16, and on one device. For the
    half precisions the step is computed in float32 and each result rounded once, where
    ``torch.optim`` rounds after every operation. Autocast changes nothing. It is fastest where all
    four have the same strides and no gaps; others are copied.

    Raises:
        TypeError: an operand is not a tensor, or a hyper-parameter not a number.
        RuntimeError: shapes, devices or dtypes do not agree; what is updated overlaps itself or
            another operand; it is called under ``torch.func`` or forward AD; ``backend`` is not
            available here.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError: a hyper-parameter that ``torch.optim.Adadelta`` refuses; an unknown ``backend``.

    Whatever it refuses, it has changed nothing.
    """
    op = "adadelta_step"
    rates = checked_rates(lr, rho, eps, weight_decay)
    for name, value in (
        ("param", param),
        ("grad", grad),
        ("square_avg", square_avg),
        ("acc_delta", acc_delta),
    ):
        _checks.tensor(op, name, value)
    chosen = select(backend, param.device, op)
    check_operands(param, grad, square_avg, acc_delta)
    with torch.no_grad():
        update(chosen, param, grad, square_avg, acc_delta, *rates)


def update(backend: Backend, param, grad, square_avg, acc_delta, *rates: float) -> None:
    """What :func:`adadelta_step` does once everything is checked; under ``torch.no_grad()``."""
    if backend.namespace is None:
        return eager(param, grad, square_avg, acc_delta, *rates)
    backend.raw.adadelta_step(param, grad, square_avg, acc_delta, *rates)
    _checks.count_update(param, square_avg, acc_delta)


def checked_rates(lr, rho, eps, weight_decay) -> tuple[float, float, float, float]:
    """The hyper-parameters as floats; refused with ``torch.optim.Adadelta``'s messages.

    Raises:
        TypeError: one is not a number.
        ValueError: one is out of its range.
    """
    lr, rho, eps, weight_decay = (
        _checks.number("adadelta_step", name, value)
        for name, value in (("lr", lr), ("rho", rho), ("eps", eps), ("weight_decay", weight_decay))
    )
    if not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0 <= rho <= 1:
        raise ValueError(f"Invalid rho value: {rho}")
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    return lr, rho, eps, weight_decay


def check_operands(param, grad, square_avg, acc_delta) -> None:
    """Refuses strided tensors that do not agree, or that cannot be updated in place.

    Raises:
        RuntimeError, NotImplementedError: as :func:`adadelta_step` documents.
    """
    op = "adadelta_step"
    others = {"grad": grad, "square_avg": square_avg, "acc_delta": acc_delta}
    shape, dtype, device = param.shape, param.dtype, param.device
    # What agrees is seen here: the calls would cost a small parameter's step 2 of 10 µs.
    for each in (grad, square_avg, acc_delta):
        if each.shape != shape or each.dtype != dtype or each.device != device:
            _checks.same_device(op, param=param, **others)
            for name, value in others.items():
                _checks.shape(op, name, value, shape, "as 'param' has")
            _checks.same_floating_dtype(op, param=param, **others)
    _checks.floating_dtype(op, "param", dtype)
    _checks.no_transforms(op, param, grad, square_avg, acc_delta)
    updated = {"param": param, "square_avg": square_avg, "acc_delta": acc_delta}
    _checks.updatable_in_place(op, updated, grad=grad)


def eager(param, grad, square_avg, acc_delta, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0) -> None:
    """The reference: the operations of ``torch.optim``'s loop over the parameters."""
    with torch.no_grad():
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        square_avg.mul_(rho).addcmul_(grad, grad, value=1 - rho)
        std = square_avg.add(eps).sqrt_()
        delta = acc_delta.add(eps).sqrt_().div_(std).mul_(grad)
        acc_delta.mul_(rho).addcmul_(delta, delta, value=1 - rho)
        param.add_(delta, alpha=-lr)


def _raw_samples(device, dtype) -> Iterator[tuple]:
    defaults = (1.0, 0.9, 1e-6, 0.0)
    for sample in sample_inputs(device, dtype):
        yield *sample.args, *defaults[len(sample.args) - 4 :]


def _operands(shape, device, dtype, makes=(_samples.normal,) * 4) -> tuple[torch.Tensor, ...]:
    """Param, grad and averages as after few steps, which still grow: a step changes each by more
    than bfloat16 rounds away."""
    param, grad, square_avg, acc_delta = (
        make(shape, device, dtype, seed) for seed, make in enumerate(makes, 1)
    )
    return param, grad, square_avg.square_().mul_(2.0**-4), acc_delta.square_()


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Every layout but overlapping ones, each hyper-parameter, mixed strides, special values."""
    for shape in _samples.SHAPES:
        name = "x".join(map(str, shape)) or "0d"
        yield SampleInput(_operands(shape, device, dtype), name=name)
    for name, make in _samples.STRIDES.items():
        if name != "expanded":
            yield SampleInput(_operands((6, 9), device, dtype, (make,) * 4), name=name)
    makes = (_samples.channels_last,) * 4
    yield SampleInput(_operands((2, 3, 4, 5), device, dtype, makes), name="channels_last")
    for name, strides in {
        "each_its_strides": ("transposed", "sliced", "contiguous", "unaligned"),
        "param_sliced": ("sliced", "contiguous", "transposed", "sliced"),
        "grad_expanded": ("contiguous", "expanded", "contiguous", "contiguous"),
    }.items():
        makes = tuple(_samples.STRIDES[each] for each in strides)
        yield SampleInput(_operands((6, 9), device, dtype, makes), name=name)
    for name, rates in {
        "lr": (0.25,),
        "lr_zero": (0.0,),
        "rho": (1.0, 0.5),
        "rho_zero": (1.0, 0.0, 0.5),  # with a small eps, delta ** 2 is the old average
        "rho_one": (1.0, 1.0),
        "eps": (1.0, 0.9, 0.125),
        "decay": (1.0, 0.9, 1e-6, 0.5),
    }.items():
        yield SampleInput((*_operands((37,), device, dtype), *rates), name=name)
    param, grad, square_avg, acc_delta = _operands((4, 21), device, dtype)
    for row, each in enumerate((param, grad)):
        each[row] = _samples.special_values(device, dtype, 3)
    for row, each in enumerate((square_avg, acc_delta)):
        each[row + 2] = _samples.special_values(device, dtype, 3).abs()
    special = param, grad, square_avg, acc_delta
    yield SampleInput(special, name="special_values", gradcheckable=False)
    copies = tuple(each.clone() for each in special)
    decayed = (*copies, 1.0, 0.9, 1e-6, 0.5)
    yield SampleInput(decayed, name="special_values_decay", gradcheckable=False)
    zeros = torch.zeros(9, dtype=dtype, device=device)
    first = tuple(zeros.clone() for _ in range(4))
    yield SampleInput((*first, 1.0, 0.9, 0.0), name="no_gradient_no_eps")  # 0 / 0


def error_inputs(device) -> Iterator[ErrorInput]:
    """Operands that do not agree or share memory, hyper-parameters out of range."""

    def ones(*shape):
        return torch.ones(shape, device=device)

    def case(name, error_type, error_regex, *rates, **changed) -> ErrorInput:
        names = ("param", "grad", "square_avg", "acc_delta")
        operands = {each: ones(5, 4) for each in names} | changed
        return ErrorInput((*operands.values(), *rates), error_type, error_regex, name=name)

    yield case("list", TypeError, "'grad' must be Tensor", grad=[[1.0]])
    yield case("none", TypeError, "'acc_delta' must be Tensor", acc_delta=None)
    yield case("shape", RuntimeError, "'grad' must have shape", grad=ones(4, 5))
    yield case("state_shape", RuntimeError, "'square_avg' must have shape", square_avg=ones(5, 1))
    yield case("dtypes", RuntimeError, "same dtype", acc_delta=ones(5, 4).double())
    meta = torch.ones(5, 4, device="meta")
    yield case("devices", RuntimeError, "same device", square_avg=meta)
    yield case("sparse", NotImplementedError, "layout", grad=ones(5, 4).to_sparse())
    for dtype in (torch.int64, torch.complex64):
        operands = {each: ones(5, 4).to(dtype) for each in ("param", "grad", "square_avg")}
        operands["acc_delta"] = ones(5, 4).to(dtype)
        yield case(str(dtype), NotImplementedError, "not implemented for", **operands)
    for name, rates, message in (
        ("lr", (-1,), "Invalid learning rate: -1"),
        ("lr_nan", (math.nan,), "Invalid learning rate: nan"),
        ("lr_huge", (-(10**400),), "Invalid learning rate: -inf"),
        ("rho", (1.0, 1.5), "Invalid rho value: 1.5"),
        ("rho_negative", (1.0, -0.1), "Invalid rho value: -0.1"),
        ("eps", (1.0, 0.9, -1e-6), "Invalid epsilon value: -1e-06"),
        ("weight_decay", (1.0, 0.9, 1e-6, -0.5), "Invalid weight_decay value: -0.5"),
    ):
        yield case(name, ValueError, message, *rates)
    yield case("lr_str", TypeError, "'lr' must be a float", "fast")
    yield case("eps_none", TypeError, "'eps' must be a float", 1.0, 0.9, None)
    for name in ("param", "square_avg", "acc_delta"):
        expanded = {name: ones(5, 1).expand(5, 4)}
        yield case(f"expanded_{name}", RuntimeError, "single memory", **expanded)
    folded = ones(3, 4, 6).as_strided((2, 3, 4), (4, 4, 1))
    others = {each: ones(2, 3, 4) for each in ("grad", "square_avg", "acc_delta")}
    yield case("folded_3d", RuntimeError, "single memory", param=folded, **others)
    same = ones(5, 4)
    yield case("averages_are_one", RuntimeError, "passed twice", square_avg=same, acc_delta=same)
    yield case("param_is_grad", RuntimeError, "passed twice", param=same, grad=same)
    memory = ones(30)
    shared = {"grad": memory[:20].view(5, 4), "acc_delta": memory[10:].view(5, 4)}
    yield case("overlapping", RuntimeError, "shares memory", **shared)


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Four tensors read, three written; roots and the division count as one operation each."""
    (n,) = shape
    return Cost(bytes=7 * n * itemsize, flops=16 * n, unit="elementwise")


def benchmark_inputs(shape, dtype, device, generator) -> tuple:
    """A random normal parameter and gradient, and averages as after few steps."""

    def normal():
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return normal(), normal(), normal().square_().mul_(2.0**-4), normal().square_(), 1.0


def by_hand(param, grad, square_avg, acc_delta, lr) -> None:
    """What ``torch.optim`` does by default: each operation over a list of tensors at once."""
    with torch.no_grad():
        params, grads, square_avgs, acc_deltas = [param], [grad], [square_avg], [acc_delta]
        torch._foreach_mul_(square_avgs, 0.9)
        torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - 0.9)
        std = torch._foreach_add(square_avgs, 1e-6)
        torch._foreach_sqrt_(std)
        deltas = torch._foreach_add(acc_deltas, 1e-6)
        torch._foreach_sqrt_(deltas)
        torch._foreach_div_(deltas, std)
        torch._foreach_mul_(deltas, grads)
        torch._foreach_mul_(acc_deltas, 0.9)
        torch._foreach_addcmul_(acc_deltas, deltas, deltas, value=1 - 0.9)
        torch._foreach_add_(params, deltas, alpha=-lr)


OP = Op(
    name="adadelta_step",
    function=adadelta_step,
    eager=eager,
    raw_ops=(
        RawOp(
            "adadelta_step",
            lambda param, grad, square_avg, acc_delta, lr, rho, eps, weight_decay: None,
            _raw_samples,
            mutates=("param", "square_avg", "acc_delta"),
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    # Three sums of two terms, one after the other: g, square_avg, acc_delta.
    reduction_length=lambda *args: 6,
    shape_names=("n",),
    benchmark_shapes={
        device: {"quick": ((9216 * 128,),), "full": ((9216 * 128,), (2**24,))}
        for device in ("cpu", "cuda")
    },
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    directions=("step",),
    is_step=True,
    by_hand=by_hand,
)
