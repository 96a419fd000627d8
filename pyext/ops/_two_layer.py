"""What the two-layer ops share: argument checks, derivative formulas, samples and costs.

The network is ``hidden = relu(x @ w1 + b1)``, ``out = hidden @ w2 + b2`` with x (N, I), w1 (I, H),
w2 (H, O), b1 (H), b2 (O).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from pyext.ops import _checks, _samples
from pyext.ops._autograd import add, differentiable, matmul
from pyext.registry import Cost, ErrorInput

NAMES = ("batch", "in", "hidden", "out")
"""What the four numbers of a two-layer shape mean."""

HEADLINE = (64, 1000, 100, 10)
MNIST_MLP = (1024, 784, 512, 10)
CPU_SHAPES = {"quick": (HEADLINE, MNIST_MLP), "full": (HEADLINE, MNIST_MLP)}
CUDA_SHAPES = {
    "quick": (HEADLINE, MNIST_MLP),
    "full": (HEADLINE, MNIST_MLP, (8192, 4096, 4096, 1024)),
}
BENCHMARK_SHAPES = {"cpu": CPU_SHAPES, "cuda": CUDA_SHAPES}


def is_usual(x: object) -> bool:
    """Whether raw ops take the operands as they are, if at all.

    They check what memory safety needs, which is all that ``prepare`` does for a matrix without
    autocast; so there it is called only to say better what a raw op has refused. Called before, in
    vain, it takes 8 of 217 µs of a forward and backward at 64 x 1000 x 100 x 10. While
    ``torch.compile`` traces, a refusal must come from what it traces, and costs nothing.
    """
    return (
        isinstance(x, torch.Tensor)
        and x.dim() == 2
        and not _is_any_autocast_enabled()  # on whatever device; prepare() asks which
        and not is_dynamo_compiling()
    )


def prepare(op: str, x, w1, w2, b1=None, b2=None, y=None) -> tuple:
    """Checks the operands of ``op`` and brings them to the raw ops' form.

    Args:
        op: the op's name, for messages.
        x: (..., I); leading dimensions are flattened.
        w1, w2, b1, b2: as above; biases may be None.
        y: (..., O) or None.

    Returns:
        The operands with x and y as matrices, cast to autocast's dtype where autocast is on.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as the ops document.
    """
    given = check(op, x, w1, w2, b1, b2, y)
    device = x.device
    if _checks.autocasts(device) and all(value.is_floating_point() for value in given):
        dtype = torch.get_autocast_dtype(device.type)
        x, w1, w2, b1, b2, y = (
            value if value is None or value.dtype == torch.float64 else value.to(dtype)
            for value in (x, w1, w2, b1, b2, y)
        )
    one_floating_dtype(op, x, w1, w2, b1, b2, y)
    if x.dim() != 2:
        rows = x.shape[:-1].numel()
        x = x.reshape(rows, w1.shape[0])
        if y is not None:
            y = y.reshape(rows, w2.shape[1])
    return x, w1, w2, b1, b2, y


def _named(x, w1, w2, b1, b2, y) -> dict[str, torch.Tensor]:
    """The operands by name, for messages; those that may be absent only if they are there."""
    optional = {"b1": b1, "b2": b2, "y": y}
    return {"x": x, "w1": w1, "w2": w2} | {k: v for k, v in optional.items() if v is not None}


def check(op: str, x, w1, w2, b1=None, b2=None, y=None) -> list[torch.Tensor]:
    """Checks that the operands are tensors, on one device and of fitting shapes; dtypes are not.

    Returns:
        Those that are not None.
    """
    # What fits is seen here: a call for each would cost a small step 1 of 20 µs.
    given = [x, w1, w2]
    for value in (b1, b2, y):
        if value is not None:
            given.append(value)
    device = x.device if isinstance(x, torch.Tensor) else None
    for value in given:
        if (
            not isinstance(value, torch.Tensor)
            or value.layout is not torch.strided
            or value.is_nested
        ):
            for name, each in _named(x, w1, w2, b1, b2, y).items():
                _checks.tensor(op, name, each)
        if value.device != device:
            _checks.same_device(op, **_named(x, w1, w2, b1, b2, y))
    x_shape, w1_shape, w2_shape = x.shape, w1.shape, w2.shape
    if not x_shape:
        raise RuntimeError(f"{op}(): argument 'x' must have at least one dimension, but is 0-d")
    if len(w1_shape) != 2 or len(w2_shape) != 2:
        name, shape = ("w1", w1_shape) if len(w1_shape) != 2 else ("w2", w2_shape)
        raise RuntimeError(
            f"{op}(): argument {name!r} must be a matrix, but has shape {tuple(shape)}"
        )
    n_in, n_hidden = w1_shape
    n_out = w2_shape[1]
    if x_shape[-1] != n_in:
        _checks.shape(op, "x", x, (*x_shape[:-1], n_in), "to be multiplied with 'w1'")
    if w2_shape[0] != n_hidden:
        _checks.shape(op, "w2", w2, (n_hidden, n_out), "to follow 'w1'")
    if b1 is not None:
        _checks.shape(op, "b1", b1, (n_hidden,), "to be added to x @ w1")
    if b2 is not None:
        _checks.shape(op, "b2", b2, (n_out,), "to be added to hidden @ w2")
    if y is not None:
        _checks.shape(op, "y", y, (*x_shape[:-1], n_out), "to be compared with the output")
    return given


def one_floating_dtype(op: str, x, w1, w2, b1=None, b2=None, y=None) -> None:
    """``RuntimeError`` if dtypes differ, ``NotImplementedError`` if theirs is not floating."""
    dtype = x.dtype
    for value in (w1, w2, b1, b2, y):
        if value is not None and value.dtype != dtype:
            _checks.same_floating_dtype(op, **_named(x, w1, w2, b1, b2, y))
    _checks.floating_dtype(op, "x", dtype)


def mask(value: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """``value`` where ``hidden > 0``, else 0: ReLU's derivative, differentiable in ``value``."""
    return None if value is None else torch.ops.aten.threshold_backward(value, hidden, 0)


def tangents(x, w1, w2, hidden, tangent_x, tangent_w1, tangent_w2, tangent_b1, tangent_b2):
    """The tangents of out (None where nothing varies) and of hidden (zeros: PyTorch takes no None
    for one of several outputs)."""
    pre_activation = add(matmul(tangent_x, w1), matmul(x, tangent_w1))
    if tangent_b1 is not None:
        pre_activation = add(pre_activation, tangent_b1.expand_as(hidden))
    tangent_hidden = mask(pre_activation, hidden)
    tangent_out = add(matmul(tangent_hidden, w2), matmul(hidden, tangent_w2))
    if tangent_b2 is not None:
        tangent_out = add(tangent_out, tangent_b2.expand(x.shape[0], -1))
    return tangent_out, torch.zeros_like(hidden) if tangent_hidden is None else tangent_hidden


@differentiable
class two_layer_backward:
    """With d = (grad_out @ w2ᵀ + grad_hidden) where hidden > 0:

    grad_x = d @ w1ᵀ, grad_w1 = xᵀ @ d, grad_w2 = hiddenᵀ @ grad_out, grad_b1 = Σ d,
    grad_b2 = Σ grad_out. Its own derivative is in PyTorch's ops, hence differentiable to any order.
    """

    raw_op = "two_layer_backward"

    @staticmethod
    def save(inputs, outputs):
        return inputs[:6], inputs[6:]

    @staticmethod
    def backward(raw, tensors, constants, needs, v_x, v_w1, v_w2, v_b1, v_b2):
        grad_out, grad_hidden, x, w1, w2, hidden = tensors
        needed = dict(zip(("x", "w1", "w2", "b1", "b2"), constants, strict=True))
        # What was not asked for came back empty, and so does what flows into it.
        v_x = v_x if needed["x"] else None
        v_w1 = v_w1 if needed["w1"] else None
        v_w2 = v_w2 if needed["w2"] else None
        v_b1 = v_b1 if needed["b1"] else None
        v_b2 = v_b2 if needed["b2"] else None
        d = mask(add(grad_out @ w2.t(), grad_hidden), hidden)
        v_d = add(matmul(v_x, w1), matmul(x, v_w1))
        if v_b1 is not None:
            v_d = add(v_d, v_b1.expand_as(hidden))
        v_d = mask(v_d, hidden)
        v_grad_out = add(matmul(v_d, w2), matmul(hidden, v_w2))
        if v_b2 is not None:
            v_grad_out = add(v_grad_out, v_b2.expand_as(grad_out))
        return (
            v_grad_out,
            v_d if grad_hidden is not None else None,
            None if v_w1 is None else d @ v_w1.t(),
            None if v_x is None else v_x.t() @ d,
            None if v_d is None else v_d.t() @ grad_out,
            None if v_w2 is None else grad_out @ v_w2.t(),
            *(None for _ in constants),
        )

    @staticmethod
    def jvp(raw, tensors, constants, t_grad_out, t_grad_hidden, t_x, t_w1, t_w2, t_hidden, *_):
        grad_out, grad_hidden, x, w1, w2, hidden = tensors
        need_x, need_w1, need_w2, need_b1, need_b2 = constants
        d = mask(add(grad_out @ w2.t(), grad_hidden), hidden)
        t_w2_transposed = None if t_w2 is None else t_w2.t()
        t_d = add(matmul(t_grad_out, w2.t()), matmul(grad_out, t_w2_transposed), t_grad_hidden)
        t_d = mask(t_d, hidden)

        def transposed(matrix):
            return None if matrix is None else matrix.t()

        def dense(tangent, needed, shape):
            if not needed:
                return x.new_zeros(0)
            return x.new_zeros(shape) if tangent is None else tangent

        return (
            dense(add(matmul(t_d, w1.t()), matmul(d, transposed(t_w1))), need_x, x.shape),
            dense(add(matmul(transposed(t_x), d), matmul(x.t(), t_d)), need_w1, w1.shape),
            dense(
                add(matmul(transposed(t_hidden), grad_out), matmul(hidden.t(), t_grad_out)),
                need_w2,
                w2.shape,
            ),
            dense(None if t_d is None else t_d.sum(0), need_b1, w1.shape[1:]),
            dense(None if t_grad_out is None else t_grad_out.sum(0), need_b2, w2.shape[1:]),
        )


def gradients(raw, grad_out, grad_hidden, x, w1, w2, hidden, needs: tuple) -> tuple:
    """Those of x, w1, w2, b1 and b2; None for each that is not needed."""
    grad_x, grad_w1, grad_w2, grad_b1, grad_b2 = two_layer_backward(
        raw, grad_out, grad_hidden, x, w1, w2, hidden, *needs
    )
    need_x, need_w1, need_w2, need_b1, need_b2 = needs
    return (
        grad_x if need_x else None,
        grad_w1 if need_w1 else None,
        grad_w2 if need_w2 else None,
        grad_b1 if need_b1 else None,
        grad_b2 if need_b2 else None,
    )


def fake_two_layer_forward(x, w1, w2, b1, b2):
    """(out, hidden) without data; refuses what a kernel would."""
    check("two_layer_forward", x, w1, w2, b1, b2)
    one_floating_dtype("two_layer_forward", x, w1, w2, b1, b2)
    hidden = x.new_empty((x.shape[0], w1.shape[1]))
    return x.new_empty((x.shape[0], w2.shape[1])), hidden


def fake_two_layer_backward(
    grad_out, grad_hidden, x, w1, w2, hidden, need_x, need_w1, need_w2, need_b1, need_b2
):
    """(grad_x, grad_w1, grad_w2, grad_b1, grad_b2) without data."""
    grads = (
        (x.new_empty(x.shape), need_x),
        (_empty_like_weight(w1), need_w1),
        (_empty_like_weight(w2), need_w2),
        (x.new_empty(w1.shape[1:]), need_b1),
        (x.new_empty(w2.shape[1:]), need_b2),
    )
    return tuple(grad if needed else x.new_empty(0) for grad, needed in grads)


def fake_two_layer_backward_weights(grad_out, x, w1, w2, hidden):
    """(grad_w1, grad_w2) without data."""
    return _empty_like_weight(w1), _empty_like_weight(w2)


def _empty_like_weight(weight: torch.Tensor) -> torch.Tensor:
    """By columns where the weight lies so (an ``nn.Linear``'s ``weight.t()``), else by rows: a
    gradient in another layout than its parameter's is copied by autograd."""
    rows, columns = weight.shape
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        return weight.new_empty((columns, rows)).t()
    return weight.new_empty((rows, columns))


# Beyond one block of rows (96) and of columns (2048, which are the depth of other products: beyond
# one of 1024, too) of the C++ product, and beyond one tile of the others; too many elements for
# finite differences.
LARGE_SAMPLE_SHAPES = {
    "blocks": (130, 530, 70, 33),
    "panel": (66, 301, 100, 10),  # all of hidden in one panel of registers on AVX-512
    "wide": (3, 5, 2100, 3),
    # Rows of x that the C++ product reads in place, in two blocks of the depth; then rows that lie
    # as far apart as pages, which it packs.
    "deep": (15, 1100, 20, 3),
    "page": (15, 1024, 20, 3),
    # Two blocks of the depth for the gradient of w1, of a d in two panels or more.
    "batch": (1100, 3, 40, 2),
}
# (N, I, H, O): usual, odd around tiles and vectors, one element, and each extent empty.
SAMPLE_SHAPES = {
    "small": (5, 4, 3, 2),
    "odd": (17, 9, 33, 5),
    "one": (1, 1, 1, 1),
    "empty_batch": (0, 4, 3, 2),
    "empty_in": (3, 0, 4, 2),
    "empty_hidden": (3, 4, 0, 2),
    "empty_out": (3, 4, 5, 0),
}


def _scaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled without losing the strides."""
    return values if scale == 1 else values.mul_(scale)


def sample_operands(device, dtype, requires_grad=False) -> Iterator[tuple[str, dict, bool]]:
    """(name, operands x, y, w1, w2, b1, b2, whether finite differences are meaningful)."""

    def operands(shape, biases=True, make=_samples.normal) -> dict:
        """Standard normal, the weights scaled down where float16 gradients would overflow."""
        n, n_in, n_hidden, n_out = shape
        scale = 1 if n_in < 100 else 2**-5
        made = {
            "x": make((n, n_in), device, dtype, 1),
            "y": make((n, n_out), device, dtype, 2),
            "w1": _scaled(make((n_in, n_hidden), device, dtype, 3), scale),
            "w2": _scaled(make((n_hidden, n_out), device, dtype, 4), scale),
            # A row, with the strides that ``make`` gives it.
            "b1": make((3, n_hidden), device, dtype, 5)[1] if biases else None,
            "b2": make((3, n_out), device, dtype, 6)[1] if biases else None,
        }
        return {k: v if v is None else v.requires_grad_(requires_grad) for k, v in made.items()}

    for name, shape in SAMPLE_SHAPES.items():
        yield name, operands(shape), True
    for name, shape in LARGE_SAMPLE_SHAPES.items():
        yield name, operands(shape), False
    yield "no_bias", operands(SAMPLE_SHAPES["small"], biases=False), True
    for name, make in _samples.STRIDES.items():
        yield name, operands((6, 5, 7, 4), make=make), True
    special = operands((4, 21, 6, 3), biases=False)
    with torch.no_grad():
        special["x"][0] = _samples.special_values(device, dtype, 3)
        special["x"][1] = 0  # pre-activations exactly on the kink
    yield "special_values", special, False


def common_error_inputs(device, order: tuple[str, ...]) -> Iterator[ErrorInput]:
    """What every two-layer op refuses; ``order`` names its positional tensor arguments."""

    ones = torch.ones
    ones_of = {
        "x": ones(5, 4, device=device),
        "y": ones(5, 2, device=device),
        "w1": ones(4, 3, device=device),
        "w2": ones(3, 2, device=device),
        "b1": ones(3, device=device),
        "b2": ones(2, device=device),
    }

    def case(name, error_type, error_regex, **changed) -> ErrorInput:
        operands = {k: v.clone() for k, v in ones_of.items()} | changed
        args = tuple(operands[each] for each in order)
        return ErrorInput(args, error_type, error_regex, name=name)

    yield case("list", TypeError, "'x' must be Tensor", x=[[1.0]])
    yield case("none", TypeError, "'w1' must be Tensor", w1=None)
    yield case("x_0d", RuntimeError, "'x' must", x=ones((), device=device))
    yield case("x_columns", RuntimeError, "'x' must have shape", x=ones(5, 6, device=device))
    yield case("w2_rows", RuntimeError, "'w2' must have shape", w2=ones(4, 2, device=device))
    present = [name for name in order if name != "x"]
    for name in present:
        double = ones_of[name].double()
        yield case(f"dtype_of_{name}", RuntimeError, "same dtype", **{name: double})
    for name in order:
        meta = ones_of[name].to("meta")
        yield case(f"device_of_{name}", RuntimeError, "same device", **{name: meta})
    for name in ("w1", "w2"):
        for shape in ((), (3,), (4, 3, 2)):
            yield case(
                f"{name}_{len(shape)}d",
                RuntimeError,
                f"{name!r} must be a matrix",
                **{name: ones(shape, device=device)},
            )
    yield case("sparse", NotImplementedError, "layout", x=ones(5, 4, device=device).to_sparse())
    integers = {name: value.long() for name, value in ones_of.items()}
    yield case("integers", NotImplementedError, "not implemented for", **integers)
    if "b1" in order:
        yield case("b1_size", RuntimeError, "'b1' must have shape", b1=ones(4, device=device))
        yield case("b1_2d", RuntimeError, "'b1' must have shape", b1=ones(1, 3, device=device))
        yield case("b2_size", RuntimeError, "'b2' must have shape", b2=ones(3, device=device))
    if "y" in order:
        yield case("y_size", RuntimeError, "'y' must have shape", y=ones(5, 3, device=device))


def reduction_length(x, w1, w2) -> int:
    """Terms in the longest chain of sums from an operand to any gradient."""
    n = x.shape[:-1].numel() if x.dim() else 1
    n_in, n_hidden = w1.shape
    return max(n + n_in + n_hidden + w2.shape[1], 1)


def cost(direction: str, shape: tuple[int, ...], itemsize: int, y: bool = False) -> Cost:
    """The products' FLOPs (x needs no gradient) and each operand and result once.

    forward: x @ w1, hidden @ w2; backward: grad_out @ w2ᵀ, xᵀ @ d, hiddenᵀ @ grad_out.
    """
    n, n_in, n_hidden, n_out = shape
    first, second = n * n_in * n_hidden, n * n_hidden * n_out
    flops = {
        "forward": 2 * (first + second),
        "backward": 2 * (first + 2 * second),
    }
    flops["both"] = flops["step"] = flops["forward"] + flops["backward"]
    x, out, hidden = n * n_in, n * n_out, n * n_hidden
    weights = n_in * n_hidden + n_hidden * n_out
    items = {
        "forward": x + weights + out,
        "backward": x + weights + hidden + out + weights,
        "both": x + 2 * weights + out,
        "step": x + 2 * weights + out,
    }
    moved = items[direction] + (out if y and direction != "backward" else 0)
    return Cost(bytes=moved * itemsize, flops=flops[direction], unit="matmul")


def benchmark_operands(shape, dtype, device, generator, requires_grad=True) -> dict:
    """Random normal x, y, w1, w2; weights are scaled as in a network that is being trained.

    x and w1 are rounded to odd multiples of 1/32 (w1 times a power of two near in**-0.5): never
    zero, exact in every dtype, and with x @ w1 exact in float32 in any order of summation. Else a
    pre-activation within rounding of 0 flips between two right variants about once in 2 million
    and moves a whole column of the gradient.
    """
    n, n_in, n_hidden, n_out = shape

    def normal(rows, columns):
        return torch.randn((rows, columns), dtype=dtype, device=device, generator=generator)

    def on_grid(values, scale=1.0):
        return ((values.float() * 16).floor().clamp(-120, 119) * 2 + 1).div(32).mul(scale).to(dtype)

    return {
        "x": on_grid(normal(n, n_in)),
        "y": normal(n, n_out),
        "w1": on_grid(
            normal(n_in, n_hidden), 2.0 ** round(math.log2(max(n_in, 1) ** -0.5))
        ).requires_grad_(requires_grad),
        "w2": (normal(n_hidden, n_out) * max(n_hidden, 1) ** -0.5).requires_grad_(requires_grad),
    }


def by_hand_gradients(x, w1, w2, hidden, grad_out) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_w1 and grad_w2 in PyTorch ops without autograd."""
    grad_w2 = hidden.t().mm(grad_out)
    grad_hidden = torch.ops.aten.threshold_backward(grad_out.mm(w2.t()), hidden, 0)
    return x.t().mm(grad_hidden), grad_w2
