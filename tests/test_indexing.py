"""Offsets beyond 2^31 elements, without the memory: huge strides over pages that nobody touches.

Memory that is only reserved costs nothing until it is written, and what is only read shares one
page of zeros. So a matrix of a few elements can lie 2^31 elements and more apart, and a kernel can
start at its last programs. For real, with every element written, it is done in ``-m large``.
"""

from __future__ import annotations

import builtins
import contextlib
import mmap
import sys
from unittest import mock

import pytest
import torch
from support import configurations, through

import pyext.functional as P
from pyext import registry
from pyext.backends import BACKENDS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reserves memory without taking it"
)

BEYOND = 2**31
MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.12 on
ON_CPU = [each for each in configurations() if each.values[1] == "cpu"]


def reserved(count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve {count * dtype.itemsize / 2**30:.0f} GiB: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def spread(values: torch.Tensor, stride: int, transposed: bool) -> torch.Tensor:
    """The same matrix, its rows (columns if transposed) ``stride`` elements apart.

    It lies behind as much memory, so that an offset that wrapped around would read zeros.
    """
    if values.dim() != 2:
        return values
    many = values.shape[transposed]
    before = stride * many
    memory = reserved(before + stride * (many - 1) + values.numel(), values.dtype)
    strides = (1, stride) if transposed else (stride, 1)
    return memory.as_strided(values.shape, strides, before).copy_(values)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("backend", "device"), ON_CPU)
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_rows_and_columns_may_lie_far_apart(op, transposed, backend, device):
    stride = BEYOND + 8
    names = {"5x7", "5x7_mean", "small", "small_sum"}
    (each,) = (s for s in op.sample_inputs(device, torch.float32) if s.name in names)
    far = [spread(a, stride, transposed) if torch.is_tensor(a) else a for a in each.args]
    near = [a.clone() if torch.is_tensor(a) else a for a in each.args]
    results = []
    for args in (far, near):
        tensors = [a for a in args if torch.is_tensor(a)]
        if not op.is_step:
            tensors = [a.requires_grad_() for a in tensors]
        out = through(op, backend)(*args, **each.kwargs)
        if not op.is_step:
            tensors = torch.autograd.grad(out.sum(), tensors)
        results.append([out, *tensors])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("backend", "device"), ON_CPU)
def test_a_long_product_steps_over_far_rows(backend, device, transposed):
    """Stride and depth fit 32 bits each, a step over a block of the depth does not."""
    stride = 2**27 + 8
    if backend == "triton":
        BACKENDS[backend].raw  # noqa: B018  imports the kernels
        from pyext.kernels import _tiling, _tuned

        tiling = _tiling.Tiling(16, 16, 16, splits=1, warps=1, stages=1)
        small_tiles = mock.patch.object(_tuned, "tiling_of", lambda *_: tiling)
    else:
        small_tiles = contextlib.nullcontext()
    x, w1, w2 = (torch.randn(s, dtype=torch.bfloat16) for s in ((3, 40), (40, 5), (5, 2)))
    far_x = spread(x, stride, transposed=True)
    far_w1 = spread(w1, stride, transposed)
    with small_tiles:
        actual = P.two_layer(far_x, far_w1, w2, backend=backend)
        expected = P.two_layer(x, w1, w2, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def first_and_last_programs(monkeypatch):
    """Triton's interpreter then runs a grid's first program and its last three; of partial sums,
    the others leave 0."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is missing")
    if not BACKENDS["triton"].interpreted:
        pytest.skip("this process compiles Triton kernels; they run for real in -m large")

    grid_loop = interpreter.GridExecutor.__call__.__code__

    def chosen(*bounds):
        every = builtins.range(*bounds)
        if sys._getframe(1).f_code is not grid_loop or len(every) <= 4:
            return every
        return every[0], *every[-3:]

    monkeypatch.setattr(interpreter, "range", chosen, raising=False)
    new_empty = torch.Tensor.new_empty

    def with_zeros(*args, **options):
        result = new_empty(*args, **options)
        # What no program writes of a large result takes no memory as long as nobody zeroes it.
        return result.zero_() if result.numel() < 2**24 else result

    monkeypatch.setattr(torch.Tensor, "new_empty", with_zeros)


def marked(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros but for 2 at the start and -3, 3 around element 2^31 and at the end."""
    x = reserved(count, dtype)
    x[0] = 2
    x[BEYOND - 1], x[BEYOND], x[-1] = 3, -3, 3
    return x


def test_triton_elementwise_programs_reach_beyond_two_to_the_31(first_and_last_programs):
    raw = BACKENDS["triton"].raw
    x = marked(BEYOND + 70_001, torch.bfloat16)
    zeros, one = reserved(len(x), torch.bfloat16), torch.ones((), dtype=torch.bfloat16)
    mask = raw.relu_forward_with_mask(x)[1]
    for call, expected in (
        (lambda: raw.relu_forward(x), [2, 3, 0, 3]),
        (lambda: raw.relu_backward(x, x), [2, 3, 0, 3]),
        (lambda: raw.relu_forward_with_mask(x)[0], [2, 3, 0, 3]),
        (lambda: raw.relu_backward_with_mask(x, mask), [2, 3, 0, 3]),
        (lambda: raw.mse_loss_forward(x, zeros, 0), [4, 9, 9, 9]),
        (lambda: raw.mse_loss_backward(one, x, zeros, 2), [4, 6, -6, 6]),
        (lambda: raw.dropout_seeded(x, torch.tensor(1), 0, 1.0), [2, 3, -3, 3]),
    ):
        result = call()
        assert [result[i].item() for i in (0, BEYOND - 1, BEYOND, -1)] == expected
        del result


def test_triton_pooling_reaches_beyond_two_to_the_31(first_and_last_programs):
    """In a row that long, and among rows."""
    raw = BACKENDS["triton"].raw
    one, none = (1, 1), (0, 0)
    count = BEYOND + 70_000
    for shape in ((1, count), (count // 16, 16)):
        x = marked(count, torch.bfloat16).view(1, *shape)
        out, index = raw.relu_max_pool2d_forward(x, one, one, none)
        for result in (
            out,
            raw.relu_max_pool2d_backward(x, index, one, one, none, *shape),
            raw.relu_max_pool2d_gather(x, index, one, one, none),
        ):
            flat = result.view(-1)
            assert [flat[i].item() for i in (0, BEYOND - 1, BEYOND, -1)] == [2, 3, 0, 3]


def test_triton_sums_reach_beyond_two_to_the_31(first_and_last_programs):
    x = marked(BEYOND + 5, torch.bfloat16)
    zeros = reserved(len(x), torch.bfloat16)
    assert BACKENDS["triton"].raw.mse_loss_forward(x, zeros, 2) == 4 + 3 * 9


@pytest.mark.slow
def test_cpp_sums_reach_beyond_two_to_the_31():
    """Only read, so that it takes no memory: 4 GiB of one page of zeros."""
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    x = marked(BEYOND + 5, torch.bfloat16)
    zeros = reserved(len(x), torch.bfloat16)
    assert BACKENDS["extension"].raw.mse_loss_forward(x, zeros, 2) == 4 + 3 * 9


def _relu_forward(raw, device):
    return raw.relu_forward(_marked_on(device, torch.int8)), [2, 3, 0, 3]


def _relu_backward(raw, device):
    x = _marked_on(device, torch.bfloat16)
    return raw.relu_backward(x, x), [2, 3, 0, 3]


def _relu_with_mask(raw, device):
    x = _marked_on(device, torch.bfloat16)
    out, mask = raw.relu_forward_with_mask(x)
    del out
    return raw.relu_backward_with_mask(x, mask), [2, 3, 0, 3]


def _dropout(raw, device):
    x = _marked_on(device, torch.bfloat16)
    return raw.dropout_seeded(x, torch.tensor(1, device=device), 0, 1.0), [2, 3, -3, 3]


def _mse_loss_forward(raw, device):
    x = _marked_on(device, torch.bfloat16)
    return raw.mse_loss_forward(x, torch.zeros_like(x), 0), [4, 9, 9, 9]


def _mse_loss_backward(raw, device):
    x, one = _marked_on(device, torch.bfloat16), torch.ones((), dtype=torch.bfloat16, device=device)
    return raw.mse_loss_backward(one, x, torch.zeros_like(x), 2), [4, 6, -6, 6]


def _marked_on(device, dtype):
    return marked(BEYOND + 70_001, dtype).to(device)


@pytest.mark.large
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(
    ("call", "gibibytes"),
    [
        (_relu_forward, 4),
        (_relu_backward, 8),
        (_relu_with_mask, 9),
        (_dropout, 8),
        (_mse_loss_forward, 12),
        (_mse_loss_backward, 12),
    ],
    ids=lambda each: each.__name__.strip("_") if callable(each) else "",
)
def test_every_one_of_more_than_two_to_the_31_elements(call, gibibytes, backend, device):
    free = available_memory(device)
    if free < (gibibytes + 1) * 2**30:
        pytest.skip(f"needs {gibibytes + 1} GiB of {device} memory, {free / 2**30:.1f} are free")
    result, expected = call(BACKENDS[backend].raw, device)
    assert [result[i].item() for i in (0, BEYOND - 1, BEYOND, -1)] == expected
    result[0] = result[BEYOND - 1] = result[BEYOND] = result[-1] = 0
    assert not any(part.any() for part in result.split(2**28))


def available_memory(device: str) -> int:
    """Bytes that a test may take on a device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kibibytes * 1024
