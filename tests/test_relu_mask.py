"""ReLU of large tensors hands one bit for each element to backward, instead of its output."""

from __future__ import annotations

import pytest
import torch
from support import configurations, dtype_id
from torch import func
from torch.autograd import forward_ad, graph
from torch.testing import assert_close

import pyext.functional as P
from pyext import registry
from pyext.backends import BACKENDS
from pyext.ops import relu as relu_op

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CONFIGURATIONS = configurations()
FLOATING = registry.FLOATING_DTYPES


@pytest.fixture
def always(monkeypatch):
    """However small a tensor is."""
    monkeypatch.setattr(relu_op, "MASKED_BYTES", 0)


def values(n: int, device: str, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Random numbers, NaN, ±inf, ±0 and the smallest ones, ``offset`` behind an aligned place."""
    least = torch.finfo(dtype).smallest_normal
    nan, inf = float("nan"), float("inf")
    special = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, least, -least], dtype=dtype)
    x = torch.randn(offset + n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[offset::3] = special.repeat(n // 24 + 1)[: len(x[offset::3])]
    return x.to(device)[offset:]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, NaN and the sign of zero included."""
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_the_raw_ops_are_right_at_every_length_and_alignment(backend, device, dtype):
    raw = BACKENDS[backend].raw
    for n in (*range(20), 63, 64, 65, 127, 129, 1000, 4099):
        for offset in (0, 1):
            x, grad = values(n, device, dtype, offset), values(n, device, dtype, 1 - offset)
            out, mask = raw.relu_forward_with_mask(x)
            expected = raw.relu_forward(x)
            assert_same_bits(out, expected)
            assert torch.equal(mask, relu_op.mask_of(expected)), (n, offset)
            actual = raw.relu_backward_with_mask(grad, mask)
            assert_same_bits(actual, raw.relu_backward(grad, expected))


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_the_raw_ops_refuse_a_mask_that_does_not_fit(backend, device):
    raw = BACKENDS[backend].raw
    grad = torch.ones(17, device=device)
    for mask in (torch.ones(2), torch.ones(4), torch.ones(3)):
        dtype = torch.int8 if mask.numel() == 3 else torch.uint8
        with pytest.raises(RuntimeError, match="one bit for each element"):
            raw.relu_backward_with_mask(grad, mask.to(device, dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_results_are_those_without_a_mask(always, backend, device, dtype):
    for sample in registry.get("relu").sample_inputs(torch.device(device), dtype, True):
        (x,) = sample.args
        grad = torch.randn(x.shape, device=device).to(dtype)
        expected = torch.relu(x)
        actual = P.relu(x, backend=backend)
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()
        for ours, theirs in zip(
            torch.autograd.grad(actual, x, grad),
            torch.autograd.grad(expected, x, grad),
            strict=True,
        ):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_every_derivative(always, backend, device):
    x = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)

    def relu(x):
        return P.relu(x, backend=backend)

    assert type(relu(x).grad_fn).__name__ == "relu_with_maskBackward"
    torch.autograd.gradcheck(
        relu,
        x,
        nondet_tol=0,
        check_forward_ad=True,
        check_batched_grad=True,
        check_undefined_grad=True,
    )
    torch.autograd.gradgradcheck(relu, x, nondet_tol=0, check_fwd_over_rev=True)
    x = x.detach()
    tangent = torch.randn_like(x)
    assert_close(func.jvp(relu, (x,), (tangent,)), func.jvp(torch.relu, (x,), (tangent,)))
    assert_close(func.vmap(func.grad(lambda x: relu(x).sum()))(x), (x > 0).double())
    assert_close(
        func.hessian(lambda x: relu(x).square().sum())(x[0]),
        func.hessian(lambda x: torch.relu(x).square().sum())(x[0]),
    )


class _Relu(torch.nn.Module):
    def forward(self, x):
        return P.relu(x, backend="extension")


@pytest.mark.filterwarnings("ignore")
def test_a_size_that_is_not_known_is_not_asked_for():
    """An exported program would be for sizes on one side of the threshold only."""
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    rows = torch.export.Dim("rows", max=2**26)
    for example in (torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)):
        program = torch.export.export(_Relu(), (example,), dynamic_shapes={"x": {0: rows}})
        x = torch.randn(3, 16)
        assert torch.equal(program.module()(x), torch.relu(x))


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_compiled_functions_do_without(always, backend, device):
    torch._dynamo.reset()
    x = torch.randn(33, 5, device=device, requires_grad=True)
    graphs = []

    def keep_the_graph(module, example_inputs):
        graphs.append(module.print_readable(print_output=False))
        return module

    torch.compile(lambda x: P.relu(x, backend=backend), fullgraph=True, backend=keep_the_graph)(x)
    assert "relu_forward" in graphs[0] and "relu_forward_with_mask" not in graphs[0]
    compiled = torch.compile(lambda x: P.relu(x, backend=backend) * 2, fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    assert_close(out, 2 * torch.relu(x))
    assert_close(x.grad, 2 * (x > 0).float())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "device"),
    # (A large tensor takes the emulator seconds; what decides is the same.)
    [each for each in configurations(include_eager=True) if each.values[0] != "extension-emulated"],
)
def test_only_large_dense_tensors_that_are_recorded_get_one(backend, device):
    least = relu_op.MASKED_BYTES // 4
    large = torch.randn(least, device=device, requires_grad=True)

    def saved(x) -> list[tuple]:
        found = []
        with graph.saved_tensors_hooks(lambda t: found.append((t.dtype, t.numel())), lambda t: t):
            P.relu(x, backend=backend)
        return found

    mask = [(torch.uint8, least // 8)]
    output = [(torch.float32, least)]
    assert saved(large) == (output if backend == "eager" else mask)
    assert saved(large[1:]) == [(torch.float32, least - 1)]
    assert saved(large.view(2, -1).t()) == output
    with torch.no_grad():
        assert saved(large) == []
    assert saved(large.detach()) == []


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_forward_mode_alone(always, backend, device):
    x = torch.randn(20, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(P.relu(dual, backend=backend)).tangent
    assert_close(tangent, (x > 0).float())
