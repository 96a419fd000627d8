"""two_layer_sgd_steps: several training steps of the two-layer network, in place. A step op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyext.backends import select
from pyext.ops import _checks, _two_layer, two_layer_sgd_step
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput


def two_layer_sgd_steps(
    x: torch.Tensor,
    y: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    lr: float,
    steps: int | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``two_layer_sgd_step`` several times, in one call: with the same bits, on the same backend.

    Gradients, version counters and transforms: as for one step.

    Args:
        x: (batch, in), the batch of every step, or (steps, batch, in), a batch for each.
        y: (batch, out) or (steps, batch, out), as ``x``.
        w1: (in, hidden), updated in place; any strides that do not overlap.
        w2: (hidden, out), updated in place; any strides that do not overlap.
        lr: learning rate, finite and not negative.
        steps: how many; 0 changes nothing. With a batch for each step, their number or ``None``.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    All tensors are of one dtype, float64, float32, bfloat16 or float16, and on one device. Autocast
    changes nothing.

    Returns:
        The loss before each update: (steps,), on the tensors' device.

    Raises:
        TypeError: an operand is not a tensor, ``lr`` not a number, or ``steps`` not an int.
        RuntimeError: shapes, devices or dtypes do not agree; a weight overlaps itself or another
            operand; it is called under ``torch.func`` or forward AD; ``backend`` is not available
            here.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError: ``lr`` is negative, NaN or infinite; ``steps`` is negative, or not the number
            of batches; an unknown ``backend``.

    Whatever it refuses, it has changed nothing.
    """
    op = "two_layer_sgd_steps"
    lr = _checks.learning_rate(op, lr)
    if isinstance(x, torch.Tensor) and x.dim() not in (2, 3):
        raise RuntimeError(
            f"{op}(): argument 'x' must be a batch (2-d) or a batch for each step (3-d), but has "
            f"shape {tuple(x.shape)}"
        )
    two_layer_sgd_step.agree(op, x, y, w1, w2)
    two_layer_sgd_step.updatable(op, x, y, w1, w2)
    steps = _number_of_steps(op, steps, x)
    chosen = select(backend, x.device, op)
    if not steps:  # what the dispatcher counts as an update is none
        return _stacked([], x)
    if chosen.namespace is None:
        with torch.autocast(x.device.type, enabled=False):
            return eager(x, y, w1, w2, lr, steps)
    with torch.no_grad():
        losses = chosen.raw.two_layer_sgd_steps(x, y, w1, w2, lr, steps)
    _checks.count_update(w1, w2)
    return losses


def _number_of_steps(op: str, steps: object, x: torch.Tensor) -> int:
    """``steps``, or the number of batches; refuses what is no number of steps for ``x``."""
    batches = x.shape[0] if x.dim() == 3 else None
    if steps is None and batches is not None:
        return batches
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{op}(): argument 'steps' must be an int, not {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"Invalid number of steps: {steps}; {op}() accepts 0 <= steps")
    if steps >= 2**63:
        raise ValueError(f"Invalid number of steps; {op}() accepts less than 2**63")
    if batches is not None and steps != batches:
        raise ValueError(
            f"{op}(): argument 'steps' must be None or {batches}, the number of batches in 'x', "
            f"but is {steps}"
        )
    return steps


def _batches(x: torch.Tensor, y: torch.Tensor, steps: int | None) -> list[tuple]:
    """(x, y) for each step."""
    return [(x, y)] * steps if x.dim() == 2 else list(zip(x, y, strict=True))


def _stacked(losses: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.stack(losses) if losses else x.new_empty(0)


def eager(x, y, w1, w2, lr, steps=None) -> torch.Tensor:
    """The reference: the eager step in a loop."""
    step = two_layer_sgd_step.eager
    return _stacked([step(*batch, w1, w2, lr) for batch in _batches(x, y, steps)], x)


def by_hand(x, y, w1, w2, lr, steps=None) -> torch.Tensor:
    """The step that is written by hand, in a loop."""
    step = two_layer_sgd_step.by_hand
    return _stacked([step(*batch, w1, w2, lr) for batch in _batches(x, y, steps)], x)


def _raw_samples(device, dtype) -> Iterator[tuple]:
    for sample in sample_inputs(device, dtype):
        x, *rest, steps = sample.args
        yield x, *rest, x.shape[0] if steps is None else steps


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """One batch for all steps, and a batch for each; weights with several kinds of strides.

    In 16 bits one step alone: what rounding a weight changes puts other elements on ReLU's other
    side in the next step, and a float64 reference cannot tell that from an error. That further
    steps are right is tested bit by bit against single ones.
    """
    narrow = dtype.is_floating_point and torch.finfo(dtype).bits == 16
    for name, operands, smooth in _two_layer.sample_operands(device, dtype, requires_grad):
        if name not in _SAMPLES:
            continue
        x, y, w1, w2 = (operands[each] for each in ("x", "y", "w1", "w2"))
        lr = 0.125 if narrow else _stable_rate(x.shape[0], w1.shape[1])
        steps = 1 if narrow else 2
        yield SampleInput((x, y, w1, w2, lr, steps), name=name, gradcheckable=smooth)
        if name in ("odd", "sliced"):
            # Other pairs of rows in each step.
            x = torch.stack([x.detach()] * steps)
            y = torch.stack([y.detach().roll(step, 0) for step in range(steps)])
            if name == "sliced":
                x, y = (each.mT.contiguous().mT for each in (x, y))
            x, y = (each.requires_grad_(requires_grad) for each in (x, y))
            args = (x, y, w1, w2, lr, None if name == "odd" else steps)
            yield SampleInput(args, name=f"{name}_batches", gradcheckable=smooth)
        if name == "small":
            yield SampleInput((x, y, w1, w2, lr, 0), name="no_step")


_SAMPLES = {
    *("small", "odd", "one", "empty_batch", "empty_in", "empty_hidden", "empty_out"),
    *("panel", "transposed", "sliced", "unaligned", "special_values"),
}


def _stable_rate(batch: int, hidden: int) -> float:
    """A learning rate with which steps neither diverge nor get lost in float32.

    The loss's curvature in w2 is 2 hiddenᵀ @ hidden, which grows with batch x hidden.
    """
    return 2.0**-4 / max(batch * hidden, 1)


def error_inputs(device) -> Iterator[ErrorInput]:
    """What the single step refuses, and numbers of steps that are none."""
    for case in two_layer_sgd_step.error_inputs(device):
        if case.name != "x_3d":
            yield ErrorInput(
                (*case.args, 2), case.error_type, case.error_regex, name=f"step_{case.name}"
            )
    x, y, w1, w2 = (torch.ones(each, device=device) for each in ((5, 4), (5, 2), (4, 3), (3, 2)))
    for steps, error_type, message in (
        (-1, ValueError, "Invalid number of steps"),
        (2**63, ValueError, "Invalid number of steps"),
        (2.0, TypeError, "'steps' must be an int"),
        (True, TypeError, "'steps' must be an int"),
        (None, TypeError, "'steps' must be an int"),
    ):
        name = f"steps_{steps}"[:12]
        yield ErrorInput((x, y, w1, w2, 0.1, steps), error_type, message, name=name)
    many = torch.stack([x] * 3), torch.stack([y] * 3)
    yield ErrorInput((*many, w1, w2, 0.1, 2), ValueError, "number of batches", name="steps_not_3")
    yield ErrorInput(
        (x[None, None], y, w1, w2, 0.1, 1), RuntimeError, "'x' must be a batch", name="x_4d"
    )
    yield ErrorInput(
        (many[0], y, w1, w2, 0.1, 3), RuntimeError, "'y' must have shape", name="y_one_batch"
    )
    yield ErrorInput(
        (x, many[1], w1, w2, 0.1, 3), RuntimeError, "'y' must have shape", name="x_one_batch"
    )


def reduction_length(x, y, w1, w2, lr, steps=None) -> int:
    """A step's, as often as there are steps."""
    batches = _batches(x, y, steps)
    one = sum(two_layer_sgd_step.OP.reduction_length(*batch, w1, w2, lr) for batch in batches[:1])
    return max(one * len(batches), 1)


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """The FLOPs of all steps; one batch, the same for all, and both weights move once."""
    *size, steps = shape
    step = _two_layer.cost(direction, tuple(size), itemsize, y=True)
    return Cost(bytes=step.bytes + steps * itemsize, flops=steps * step.flops, unit=step.unit)


def benchmark_inputs(shape, dtype, device, generator) -> tuple:
    """x, y, w1, w2, a learning rate and the number of steps, each on the same batch."""
    *size, steps = shape
    operands = _two_layer.benchmark_operands(
        tuple(size), dtype, device, generator, requires_grad=False
    )
    lr = _stable_rate(size[0], size[2])
    return *(operands[name] for name in ("x", "y", "w1", "w2")), lr, steps


STEPS = 10
BENCHMARK_SHAPES = {
    device: {profile: ((*_two_layer.HEADLINE, STEPS),) for profile in ("quick", "full")}
    for device in ("cpu", "cuda")
}

OP = Op(
    name="two_layer_sgd_steps",
    function=two_layer_sgd_steps,
    eager=eager,
    raw_ops=(
        RawOp(
            "two_layer_sgd_steps",
            lambda x, y, w1, w2, lr, steps: x.new_empty((steps,)),
            _raw_samples,
            mutates=("w1", "w2"),
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=reduction_length,
    shape_names=(*_two_layer.NAMES, "steps"),
    benchmark_shapes=BENCHMARK_SHAPES,
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    directions=("step",),
    is_step=True,
    # It takes the 16-bit ones as well: `sample_inputs` says why no benchmark could verify them.
    dtypes=(torch.float64, torch.float32),
    by_hand=by_hand,
)
