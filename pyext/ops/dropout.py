"""dropout: each element is dropped with probability p, the others are scaled by 1 / (1 - p).

Which are kept follows from a seed by a counter-based generator, Philox 4x32-10 (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): element i has word i % 4 of block i // 4.
So no mask is stored, and the derivative is the same op on the gradient with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyext.backends import select
from pyext.ops import _checks, _samples
from pyext.ops._autograd import differentiable
from pyext.registry import Cost, ErrorInput, Op, RawOp, SampleInput, TimedEager


def dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Zeroes elements with probability ``p``, as :func:`torch.nn.functional.dropout`.

    Element i (in row-major order, whatever the strides) is kept where its 32 random bits are at
    least ``round(p * 2**32)``, and then multiplied by ``1 / (1 - p)``, in at least float32. The
    bits are a function of the seed and i alone: the same with every backend, device and dtype.
    Autocast changes nothing. Under ``torch.func.vmap`` a drawn seed obeys ``randomness``; a given
    one keeps the same elements of every example.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16.
        p: the probability of a zero, from 0 to 1.
        training: False returns the input.
        seed: 0-d int64 on the input's device. None draws one there from PyTorch's default
            generator, so that ``torch.manual_seed`` governs it and nothing synchronises.
        backend: ``None``, ``"eager"``, ``"extension"`` or ``"triton"``.

    Returns:
        A new contiguous tensor of the input's shape and dtype; the input itself where
        ``not training`` or ``p == 0``, as the namesake does.

    Raises:
        TypeError: ``input`` or ``seed`` is not a tensor, or ``p`` not a number.
        NotImplementedError: a dtype or layout that is not accepted.
        ValueError: ``p`` is not from 0 to 1; ``backend`` is unknown.
        RuntimeError: ``seed`` is not 0-d, not int64 or on another device; ``backend`` is not
            available here.

    Deviations from the namesake: no ``inplace``; other elements are dropped for the same
    ``torch.manual_seed``; a dropped NaN or infinity becomes 0, where the namesake's ``0 * inf`` is
    NaN; the result is contiguous, whatever the input's strides; complex dtypes are refused.
    """
    _checks.tensor("dropout", "input", input)
    if not isinstance(p, (int, float)):
        raise TypeError(f"dropout(): argument 'p' must be a float, not {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    chosen = select(backend, input.device, "dropout")
    if not training or p == 0:
        return input
    _checks.floating_dtype("dropout", "input", input.dtype)
    if seed is None:
        seed = _draw_seed(input.device)
    else:
        _check_seed(input, seed)
    if chosen.namespace is None:
        return eager(input, p, seed=seed)
    return _dropout(chosen.raw, input, seed, _threshold(p), _scale(p))


def eager(
    input: torch.Tensor, p: float = 0.5, training: bool = True, *, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: the same generator in PyTorch's int64 arithmetic."""
    if not training or p == 0:
        return input
    if seed is None:
        seed = _draw_seed(input.device)
    blocks = torch.arange((input.numel() + 3) // 4, device=input.device)
    zero = torch.zeros_like(blocks)
    counter = (blocks & _WORD, blocks >> 32, zero, zero)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), dim=1)
    kept = (words.flatten()[: input.numel()] >= _threshold(p)).view(input.shape)
    return torch.where(kept, input * _scale(p), 0).contiguous()


_WORD = 0xFFFFFFFF

Words = tuple[torch.Tensor, ...]


def philox(counter: Words, key: Words) -> Words:
    """Philox 4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors of values from 0 to 2^32 - 1, the least significant first.
        key: two of them.

    Returns:
        Four tensors of such values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _product(c0, 0xD2511F53)
        high_1, low_1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(word: torch.Tensor, factor: int) -> Words:
    """The upper and the lower 32 bits of a product of words, by halves: int64 has a sign."""
    upper, lower = (factor >> 16) * word, (factor & 0xFFFF) * word
    return (upper + (lower >> 16)) >> 16, (factor * word) & _WORD


def _draw_seed(device: torch.device) -> torch.Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _check_seed(input: torch.Tensor, seed: object) -> None:
    _checks.tensor("dropout", "seed", seed)
    _checks.same_device("dropout", input=input, seed=seed)
    if seed.dtype != torch.int64 or seed.dim():
        raise RuntimeError(
            "dropout(): argument 'seed' must be a 0-d tensor of torch.int64, but has shape "
            f"{tuple(seed.shape)} and {seed.dtype}"
        )


def _threshold(p: float) -> int:
    """Random bits below it mean a dropped element; 2^32, which all are below, for p = 1."""
    return round(p * 2**32)


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


@differentiable
class _dropout:
    """Linear in its input, so that it is its own derivative."""

    raw_op = "dropout_seeded"

    @staticmethod
    def save(inputs, outputs):
        return inputs[1:2], inputs[2:]

    @staticmethod
    def backward(raw, tensors, constants, needs, grad):
        return _dropout(raw, grad, *tensors, *constants), None, None, None

    @staticmethod
    def jvp(raw, tensors, constants, tangent, *_):
        return _dropout(raw, tangent, *tensors, *constants)


_SEED = -0x1F83D9AB5BE0CD19  # all of its bytes differ, and it is negative


def _seed(device) -> torch.Tensor:
    return torch.tensor(_SEED, device=device)


def _raw_samples(device, dtype) -> Iterator[tuple]:
    for name, x in _samples.layouts(device, dtype):
        yield x, _seed(device), _threshold(0.25 if name == "contiguous" else 0.5), 2.0
    for threshold in (0, 2**32 - 1, 2**32):
        yield _samples.normal((9,), device, dtype), _seed(device), threshold, 1.5


def sample_inputs(device, dtype, requires_grad=False) -> Iterator[SampleInput]:
    """Every layout; other probabilities, up to those that keep all or nothing; NaN and ±inf."""
    for name, x in _samples.layouts(device, dtype, requires_grad):
        yield SampleInput((x,), {"seed": _seed(device)}, name=name)
    for p in (0.25, 1e-12, 1 - 1e-12, 1, 0):
        x = _samples.normal((3, 7), device, dtype).requires_grad_(requires_grad)
        yield SampleInput((x, p), {"seed": _seed(device)}, name=f"p_{p}", gradcheckable=p == 0.25)
    x = _samples.normal((3, 7), device, dtype).requires_grad_(requires_grad)
    yield SampleInput((x, 0.5, False), name="not_training", gradcheckable=False)
    x = _samples.normal((3, 7), device, dtype).requires_grad_(requires_grad)
    yield SampleInput((x,), name="seed_drawn", gradcheckable=False)
    x = _samples.special_values(device, dtype, 9).requires_grad_(requires_grad)
    yield SampleInput((x,), {"seed": _seed(device)}, name="special_values", gradcheckable=False)


def error_inputs(device) -> Iterator[ErrorInput]:
    """What ``F.dropout`` refuses, and what is no seed."""
    x = torch.zeros(3, device=device)
    yield ErrorInput(([1.0],), TypeError, "'input' must be Tensor, not list", name="list")
    for p in (-0.1, 1.5, math.nan):
        yield ErrorInput((x, p), ValueError, "has to be between 0 and 1, but got", name=f"p_{p}")
    yield ErrorInput((x, "0.5"), TypeError, "'p' must be a float, not str", name="p_str")
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        other = torch.zeros(3, device=device).to(dtype)
        yield ErrorInput((other,), NotImplementedError, "not implemented for", name=str(dtype))
    sparse = torch.zeros(3, 3, device=device).to_sparse()
    yield ErrorInput((sparse,), NotImplementedError, "layout", name="sparse")
    for name, seed, error, message in (
        ("int", 1, TypeError, "'seed' must be Tensor, not int"),
        ("dtype", torch.tensor(1, dtype=torch.int32, device=device), RuntimeError, "torch.int64"),
        ("shape", torch.ones(1, dtype=torch.int64, device=device), RuntimeError, "0-d tensor"),
        ("device", torch.tensor(1, device="meta"), RuntimeError, "same device"),
    ):
        yield ErrorInput((x,), error, message, {"seed": seed}, name=f"seed_{name}")


def cost(direction: str, shape: tuple[int, ...], itemsize: int) -> Cost:
    """Each way reads one tensor and writes one: backward makes the mask anew. The generator's
    integer operations are no FLOPs and are not counted."""
    (n,) = shape
    passes = 2 if direction == "both" else 1
    return Cost(bytes=passes * 2 * n * itemsize, flops=passes * n, unit="elementwise")


def benchmark_inputs(shape, dtype, device, generator) -> tuple[torch.Tensor]:
    """Random normal ``input`` of ``shape`` that requires grad; p is 0.5 and the seed is drawn."""
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return (x.requires_grad_(),)


def by_hand(input: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward without autograd, for p = 0.5.

    (``torch.native_dropout`` and its backward took a fifth longer on a CPU.)
    """
    mask = torch.empty_like(input).bernoulli_(0.5).mul_(2)
    return input * mask, grad * mask


def expected_of_pytorch(
    results: dict[str, torch.Tensor], args: tuple, grad: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], str]:
    """What ``F.dropout`` (p = 0.5) should have given for the mask that its results show.

    Returns:
        The results in float64 (every element 0 or its operand times 2, at the same places in the
        output and the gradient), and what is wrong with the mask itself ("" if nothing): the share
        of zeros of n coins is within 6 standard deviations, but once in 5e8.
    """
    kept = torch.stack([each != 0 for each in results.values()]).any(0)
    operands = {"out": args[0], "grad_0": grad}
    expected = {name: 2 * operands[name].detach().double() * kept for name in results}
    zeros, allowed = 1 - kept.double().mean().item(), 3 / math.sqrt(max(kept.numel(), 1))
    wrong = abs(zeros - 0.5) > allowed
    return expected, f"{zeros:.4f} zeros, not 0.5 ± {allowed:.4f}" if wrong else ""


OP = Op(
    name="dropout",
    function=dropout,
    eager=eager,
    raw_ops=(
        RawOp(
            "dropout_seeded",
            lambda input, seed, threshold, scale: input.new_empty(input.shape),
            _raw_samples,
        ),
    ),
    sample_inputs=sample_inputs,
    error_inputs=error_inputs,
    reduction_length=lambda input, p=0.5, training=True, seed=None: 1,
    shape_names=("n",),
    benchmark_shapes={
        device: {"quick": ((64 * 9216,),), "full": ((64 * 9216,), (2**24,))}
        for device in ("cpu", "cuda")
    },
    benchmark_inputs=benchmark_inputs,
    cost=cost,
    by_hand=by_hand,
    timed_eager=TimedEager(F.dropout, expected_of_pytorch),
)
