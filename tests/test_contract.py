"""What ops promise beyond agreement: PyTorch's corner cases, in-place steps, transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import configurations, dtype_id, with_visible_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import pyext.functional as P
from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import check
from pyext.ops.dropout import philox
from pyext.ops.relu import INTEGER_DTYPES

CONFIGURATIONS = configurations()
WITH_EAGER = configurations(include_eager=True)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
def test_relu_special_values_are_bit_identical_to_pytorch(dtype, backend, device):
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0] * 9
    ours, theirs = (
        torch.tensor(values, dtype=dtype, device=device, requires_grad=True) for _ in range(2)
    )
    out, expected = P.relu(ours, backend=backend), F.relu(theirs)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    if device == "cpu":  # PyTorch's CUDA kernel does not promise the sign of a zero, nobody a NaN's
        numbers = ~out.isnan()
        assert torch.equal(out[numbers].signbit(), expected[numbers].signbit())
    grad = torch.full_like(out, 3.0)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    kink = torch.tensor(values, device=device) == 0
    assert kink.sum() == 18 and not ours.grad[kink].any()


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=dtype_id)
def test_relu_accepts_integers(dtype, backend, device):
    info = torch.iinfo(dtype)
    values = [info.min, -3, -1, 0, 1, 5, info.max]
    x = torch.tensor([max(each, info.min) for each in values] * 5, dtype=dtype, device=device)
    assert torch.equal(P.relu(x, backend=backend), torch.relu(x))


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [(2,), (3, 1, 1), ((2, 3), 2)], ids=["2x2", "dense", "2x3"])
def test_relu_max_pool2d_picks_the_winners_of_pytorchs_cpu_kernel(sizes, dtype, backend, device):
    """Among ties, NaNs, infinities and zeros of either sign; each window has its own gradient."""
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([nan, nan, inf, -inf, 0.0, -0.0, 1.0, 1.0, 2.0, -1.0], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    x = values[torch.randint(len(values), (3, 4, 9, 24), generator=generator)]
    ours, theirs = x.to(device, copy=True).requires_grad_(), x.clone().requires_grad_()
    out, expected = (
        P.relu_max_pool2d(ours, *sizes, backend=backend),
        F.max_pool2d(F.relu(theirs), *sizes),
    )
    assert torch.equal(out.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.isnan().cpu(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out.cpu()[numbers].signbit(), expected[numbers].signbit())
    # Small integers, so that sums are exact in every dtype.
    grad = (torch.arange(out.numel()) % 13 + 1).to(dtype).view(out.shape)
    out.backward(grad.to(device))
    expected.backward(grad)
    assert torch.equal(ours.grad.cpu(), theirs.grad)
    assert ours.grad.any() and not ours.grad.cpu()[x <= 0].any()


@pytest.mark.parametrize(("backend", "device"), configurations(include_eager=True))
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (3, 6, 8), (0, 3, 6, 8)], ids=str)
def test_relu_max_pool2d_takes_batches_and_planes_and_returns_them_contiguous(
    shape, backend, device
):
    x = torch.randn(shape, device=device)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    out = P.relu_max_pool2d(x, 2, backend=backend)
    assert out.shape == (*shape[:-2], 3, 4) and out.is_contiguous()
    torch.testing.assert_close(out, F.max_pool2d(F.relu(x), 2), rtol=0, atol=0)
    assert torch.equal(out, P.relu_max_pool2d(x, [2, 2], (2,), backend=backend))


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_relu_max_pool2d_tells_apart_every_element_of_the_largest_window(backend, device):
    for winner in (0, 16, 253, 254):
        x = torch.full((1, 15, 17), 0.5, device=device)
        x.view(-1)[winner] = 2
        x.requires_grad_()
        out = P.relu_max_pool2d(x, (15, 17), backend=backend)
        out.backward(torch.full_like(out, 3))
        assert out.item() == 2 and x.grad.sum() == x.grad.view(-1)[winner] == 3


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_relu_max_pool2d_saves_a_byte_for_each_window(backend, device):
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        P.relu_max_pool2d(x, 2, backend=backend)
    (index,) = saved
    assert index.dtype == torch.uint8 and index.numel() == x.numel() // 4


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_relu_max_pool2d_gathers_nothing_from_beyond_a_plane(backend, device):
    """Positions that no forward writes: of padding, of rows below the input, of no window."""
    raw = BACKENDS[backend].raw
    x = torch.ones(1, 3, 3, device=device)
    index = torch.tensor([[[0, 8], [254, 255]]], dtype=torch.uint8, device=device)
    out = raw.relu_max_pool2d_gather(x, index, (3, 3), (2, 2), (1, 1))
    assert out.tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mse_loss_promotes_and_broadcasts_as_pytorch(reduction, backend, device):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
    for a in dtypes:
        for b in dtypes:
            if not torch.promote_types(a, b).is_floating_point:
                continue
            input = torch.arange(6, device=device).reshape(2, 3).to(a)
            target = torch.arange(3, device=device).to(b)
            for tensor in (input, target):
                tensor.requires_grad_(tensor.is_floating_point())
            with pytest.warns(UserWarning, match="different to the input size"):
                ours = P.mse_loss(input, target, reduction, backend=backend)
            leaves = [each for each in (input, target) if each.requires_grad]
            with pytest.warns(UserWarning, match="different to the input size"):
                theirs = F.mse_loss(input, target, reduction=reduction)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs)
            if a != b:  # "Found dtype Long but expected Double" says PyTorch 2.11's gradient
                with pytest.warns(UserWarning, match="different to the input size"):
                    theirs = F.mse_loss(
                        input.to(ours.dtype), target.to(ours.dtype), reduction=reduction
                    )
            for ours_grad, theirs_grad in zip(
                torch.autograd.grad(ours.sum(), leaves),
                torch.autograd.grad(theirs.sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(ours_grad, theirs_grad)


# Philox 4x32-10 of Random123's kat_vectors: counter, key, random words.
PHILOX = (
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)


@pytest.mark.parametrize("vector", PHILOX)
def test_philox_gives_the_published_words(vector):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in vector)
    words = philox(*(tuple(map(torch.tensor, numbers)) for numbers in (counter, key)))
    assert [word.item() for word in words] == expected


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_dropout_keeps_where_the_published_words_are_at_least_the_threshold(backend, device):
    seed = torch.tensor(0, device=device)
    words = [int(word, 16) for word in PHILOX[0][2].split()]
    x = torch.ones(4, dtype=torch.float64, device=device)
    for i, word in enumerate(words):
        for threshold, kept in ((word, True), (word + 1, False)):
            p = threshold / 2**32
            out = P.dropout(x, p, seed=seed, backend=backend)
            assert bool(out[i]) == kept
            assert out.tolist() == [1 / (1 - p) if each >= threshold else 0 for each in words]


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
def test_dropout_drops_the_same_whatever_the_backend_dtype_and_strides(dtype, backend, device):
    """Bit by bit what ``eager`` gives; and an element's index is its place in row-major order."""
    x = torch.randn(50, 41, device=device).to(dtype)
    seed = torch.tensor(2**63 - 12345, device=device)
    expected = P.dropout(x, 0.3, seed=seed, backend="eager")
    assert torch.equal(expected == 0, P.dropout(x.double(), 0.3, seed=seed, backend="eager") == 0)
    unaligned = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    for same in (x, x.t().contiguous().t(), unaligned, torch.stack([x, x], -1)[..., 0]):
        out = P.dropout(same, 0.3, seed=seed, backend=backend)
        assert torch.equal(out, expected) and out.is_contiguous()


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_dropout_is_governed_by_manual_seed_and_independent_of_the_backend(backend, device):
    x = torch.ones(2, 3000, device=device)

    def two(backend):
        torch.manual_seed(7)
        return [P.dropout(x, 0.25, backend=backend) for _ in range(2)]

    (first, second), again, eager = two(backend), two(backend), two("eager")
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert torch.equal(first, eager[0]) and torch.equal(second, eager[1])
    for one, other in ((first, second), (first[0], first[1])):
        both = ((one == 0) & (other == 0)).double().mean().item()
        assert abs(both - 0.25**2) < 6 * (0.0625 * 0.9375 / one.numel()) ** 0.5
    zeros = (first == 0).double().mean().item()
    assert abs(zeros - 0.25) < 6 * (0.25 * 0.75 / x.numel()) ** 0.5


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_dropout_that_does_nothing_returns_its_input_and_draws_nothing(backend, device):
    x = torch.arange(5, device=device)  # of a dtype that is refused otherwise
    state = torch.get_rng_state()
    assert P.dropout(x, 0.5, training=False, backend=backend) is x is F.dropout(x, 0.5, False)
    assert P.dropout(x, 0, backend=backend) is x is F.dropout(x, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_dropout_of_infinity_and_nan_is_0_or_itself(backend, device):
    values = [torch.inf, -torch.inf, torch.nan] * 20
    x = torch.tensor(values, device=device, requires_grad=True)
    seed = torch.tensor(3, device=device)
    kept = P.dropout(torch.ones_like(x), 0.5, seed=seed, backend=backend) != 0
    out = P.dropout(x, 0.5, seed=seed, backend=backend)
    torch.testing.assert_close(out[kept], x[kept], rtol=0, atol=0, equal_nan=True)
    assert kept.any() and not out[~kept].any()
    out.backward(x.detach())
    torch.testing.assert_close(x.grad, out.detach(), rtol=0, atol=0, equal_nan=True)
    assert not P.dropout(x, 1.0, backend=backend).any()


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_dropout_refuses_a_probability_in_the_words_of_its_namesake(p):
    x = torch.ones(3)
    with pytest.raises(ValueError) as theirs:
        F.dropout(x, p)
    with pytest.raises(ValueError) as ours:
        P.dropout(x, p)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_dropout_under_vmap_obeys_randomness(backend, device):
    x = torch.ones(3, 400, device=device)

    def vmapped(**options):
        return torch.func.vmap(lambda x: P.dropout(x, backend=backend), **options)(x)

    with pytest.raises(RuntimeError, match="randomness"):
        vmapped()
    same, different = vmapped(randomness="same"), vmapped(randomness="different")
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    seed = torch.tensor(5, device=device)
    given = torch.func.vmap(lambda x: P.dropout(x, seed=seed, backend=backend))(x)
    assert torch.equal(given[2], P.dropout(x[2], seed=seed, backend=backend))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_can_be_differentiated_again_and_again(dtype, reduction, backend, device):
    """The gradient may have been computed in the forward pass, for one backward and a grad of 1."""
    target = torch.linspace(0.25, 2, 8, dtype=dtype, device=device)
    input, reference = (target.mul(-2).requires_grad_() for _ in range(2))
    loss = P.mse_loss(input, target, reduction, backend=backend)
    expected = F.mse_loss(reference, target, reduction=reduction)
    for scale in (1.0, 64.0, 0.5):
        upstream = torch.tensor(scale, dtype=dtype, device=device)
        (grad,) = torch.autograd.grad(loss, input, upstream, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, reference, upstream, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=4 * torch.finfo(dtype).eps, atol=0)
        grad.fill_(torch.nan)  # the caller's own: the next one must not see it
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), input)
    per_element = 2 / 8 if reduction == "mean" else 2
    torch.testing.assert_close(second, torch.full_like(second, per_element))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_scales_its_first_gradient_and_frees_the_graph(scale, backend, device):
    target = torch.ones(7, device=device)
    input = torch.full((7,), 2.0, device=device, requires_grad=True)
    loss = P.mse_loss(input, target, "sum", backend=backend)
    (loss * scale).backward()
    assert input.grad.tolist() == [2 * scale] * 7
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_of_the_input_alone_can_be_transformed(reduction, backend, device):
    """Where the gradient would be computed in the forward pass, were it an everyday call."""
    target = torch.zeros(8, device=device)
    input, tangent = (torch.linspace(first, 2, 8, device=device) for first in (0.25, -1))

    def results(loss_of):
        leaf = input.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss_of(forward_ad.make_dual(leaf, tangent)))
        return (
            *dual,
            torch.func.grad(loss_of)(input),
            torch.func.hessian(loss_of)(input),
            torch.func.vmap(torch.func.grad(loss_of))(torch.stack([input, tangent])),
            *torch.func.jvp(loss_of, (leaf,), (tangent,)),
            torch.func.vmap(loss_of)(torch.stack([leaf, 2 * leaf])),
        )

    torch.testing.assert_close(
        results(lambda x: P.mse_loss(x, target, reduction, backend=backend)),
        results(lambda x: F.mse_loss(x, target, reduction=reduction)),
    )


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_passes_a_tangent_on_in_its_first_backward(backend, device):
    """The gradient of the forward pass has none."""
    input = torch.linspace(0.25, 2, 8, device=device, requires_grad=True)
    loss = P.mse_loss(input, torch.zeros_like(input), backend=backend)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(*(torch.tensor(each, device=device) for each in (1.0, 3.0)))
        (grad,) = torch.autograd.grad(loss, input, upstream)
        primal, tangent = forward_ad.unpack_dual(grad)
    torch.testing.assert_close(tangent, 3 * primal)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_tensors_without_data_broadcast_and_are_refused_as_others(backend, device):
    with FakeTensorMode():
        x, row = torch.ones(5, 7, device=device), torch.ones(7, device=device)
        with pytest.warns(UserWarning, match="different to the input size"):
            assert P.mse_loss(x, row, "none", backend=backend).shape == (5, 7)
        x, y, w1, w2 = (torch.ones(s, device=device) for s in ((5, 4), (5, 2), (4, 1), (3, 2)))
        with pytest.raises(RuntimeError, match="single memory"):
            P.two_layer_sgd_step(x, y, w1.expand(4, 3), w2, 0.1, backend=backend)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_refuses_backward_after_an_operand_was_changed(backend, device):
    input = torch.ones(7, device=device, requires_grad=True)
    target = torch.zeros(7, device=device)
    loss = P.mse_loss(input, target, backend=backend)
    target.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_sums_of_half_precision_are_kept_in_float32(dtype, backend, device):
    """Equal terms, all of whose sums float32 holds exactly: nothing averages out."""
    x = torch.full((100_003,), 1.25, dtype=dtype, device=device)
    assert P.mse_loss(x, torch.zeros_like(x), backend=backend).item() == 1.25**2
    row = torch.full((1, 4096), 1.25, dtype=dtype, device=device)
    one = torch.full((1, 1), 2.0**-6, dtype=dtype, device=device)
    assert P.two_layer(row, row.t(), one, backend=backend).item() == 1.25**2 * 64


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_mse_loss_of_nothing(backend, device):
    empty = torch.ones(0, 3, device=device)
    assert P.mse_loss(empty, empty, "mean", backend=backend).isnan()
    assert P.mse_loss(empty, empty, "sum", backend=backend) == 0
    assert P.mse_loss(empty, empty, "none", backend=backend).shape == (0, 3)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_loss_stays_a_0d_tensor_on_its_device(backend, device):
    x, y, w1, w2 = (torch.randn(s, device=device) for s in ((5, 4), (5, 2), (4, 3), (3, 2)))
    for loss in (
        P.mse_loss(x, x, backend=backend),
        P.two_layer_mse_loss(x, y, w1, w2, backend=backend),
        P.two_layer_sgd_step(x, y, w1, w2, 0.1, backend=backend),
    ):
        assert loss.shape == () and loss.device.type == device


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_linear_weights_work_transposed_without_a_copy(backend, device):
    first, second = torch.nn.Linear(9, 7, device=device), torch.nn.Linear(7, 3, device=device)
    x = torch.randn(5, 9, device=device)
    args = (x, first.weight.t(), second.weight.t(), first.bias, second.bias)
    out = P.two_layer(*args, backend=backend)
    torch.testing.assert_close(out, second(torch.relu(first(x))))
    out.square().sum().backward()
    grads = [each.grad.clone() for each in (*first.parameters(), *second.parameters())]
    first.zero_grad(), second.zero_grad()
    second(torch.relu(first(x))).square().sum().backward()
    for grad, parameter in zip(grads, (*first.parameters(), *second.parameters()), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def hand_written_loop(x, y, w1, w2, lr, steps):
    """The loop that the step op replaces; yields the losses."""
    w1.requires_grad_(), w2.requires_grad_()
    for _ in range(steps):
        loss = (x.mm(w1).clamp(min=0).mm(w2) - y).pow(2).sum()
        loss.backward()
        yield loss.item()
        with torch.no_grad():
            for weight in (w1, w2):
                weight -= lr * weight.grad
                weight.grad.zero_()


FOLLOWED = [(torch.float64, 500, 1e-8), (torch.float32, 100, 1e-5)]


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize(("dtype", "steps", "bound"), FOLLOWED, ids=str)
def test_sgd_step_follows_the_hand_written_loop(dtype, steps, bound, backend, device):
    # A step takes 0.2 s in Triton's interpreter: here a few, in the slow tier all of them.
    steps = 10 if BACKENDS[backend].interpreted else steps
    follow_the_hand_written_loop(dtype, steps, bound, backend, device)


@pytest.mark.slow
@pytest.mark.skipif(not BACKENDS["triton"].interpreted, reason="compiled: not slow, done above")
@pytest.mark.parametrize(("dtype", "steps", "bound"), FOLLOWED, ids=str)
def test_interpreted_sgd_step_follows_the_hand_written_loop_to_its_end(dtype, steps, bound):
    follow_the_hand_written_loop(dtype, steps, bound, "triton", "cpu")


def follow_the_hand_written_loop(dtype, steps, bound, backend, device):
    generator = torch.Generator().manual_seed(0)
    x, y, w1, w2 = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)
        for s in ((64, 1000), (64, 10), (1000, 100), (100, 10))
    )
    reference = hand_written_loop(x, y, first := w1.clone(), second := w2.clone(), 1e-6, steps)
    for step, expected in enumerate(reference):
        loss = P.two_layer_sgd_step(x, y, w1, w2, 1e-6, backend=backend).item()
        assert loss == pytest.approx(expected, rel=bound), f"step {step}"
    for ours, theirs in ((w1, first), (w2, second)):
        assert ((ours - theirs).norm() / theirs.norm()).item() < bound


STEPS = [pytest.param(op, id=op.name) for op in registry.ops().values() if op.is_step]


def step_arguments(op, device):
    shape = {"n": (7,), "out": (5, 4, 3, 2), "steps": (5, 4, 3, 2, 2)}[op.shape_names[-1]]
    generator = torch.Generator(device).manual_seed(0)
    inputs = op.benchmark_inputs(shape, torch.float32, torch.device(device), generator)
    return list(with_visible_step(op, inputs))


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("op", STEPS)
def test_a_step_bumps_versions_so_that_a_stale_graph_is_an_error(op, backend, device):
    args = step_arguments(op, device)
    tensors = {f"arg_{i}": each for i, each in enumerate(args) if torch.is_tensor(each)}
    graphs = {name: each.requires_grad_().square().sum() for name, each in tensors.items()}
    versions = {name: each._version for name, each in tensors.items()}
    loss = op.function(*args, backend=backend)
    assert loss is None or not loss.requires_grad
    for name, each in tensors.items():
        assert each.requires_grad and each.is_leaf and each.grad is None
        if name in check._mutated(op):
            assert each._version > versions[name]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graphs[name].backward()
        else:
            assert each._version == versions[name]
            graphs[name].backward()


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("op", STEPS)
def test_a_step_refuses_transforms_and_forward_ad(op, backend, device):
    args = step_arguments(op, device)
    position = min(int(name.removeprefix("arg_")) for name in check._mutated(op))
    updated = args[position]

    def step(value):
        return op.function(*args[:position], value, *args[position + 1 :], backend=backend)

    with pytest.raises(RuntimeError, match="is a step op"):
        torch.func.grad(step)(updated)
    with pytest.raises(RuntimeError, match="is a step op"):
        torch.func.vmap(step)(torch.stack([updated, updated]))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="is a step op"):
        step(torch.autograd.forward_ad.make_dual(updated, torch.ones_like(updated)))


# On CUDA the first takes one launch for all steps, of three blocks; the second three for each step
# where 125 blocks are not resident at once, as in the emulator; the third (2100 rows of w1 are more
# slices than that allows) a launch for each product.
@pytest.mark.parametrize("shape", [(17, 21, 33, 5), (3, 1000, 4, 2), (3, 2100, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_sgd_steps_are_single_steps_to_the_bit(backend, device, dtype, shape):
    n, n_in, n_hidden, n_out = shape
    generator = torch.Generator().manual_seed(0)
    x, y, w1, w2 = (
        torch.randn(s, generator=generator).to(device, dtype)
        for s in ((3, n, n_in), (3, n, n_out), (n_in, n_hidden), (n_hidden, n_out))
    )
    w1 /= n_in**0.5
    for batches in ((x[0], y[0]), (x, y)):
        one, many = (w1.clone(), w2.clone()), (w1.clone(), w2.clone())
        losses = [
            P.two_layer_sgd_step(*batch, *one, 2.0**-12, backend=backend)
            for batch in (zip(*batches, strict=True) if batches[0].dim() == 3 else [batches] * 3)
        ]
        together = P.two_layer_sgd_steps(*batches, *many, 2.0**-12, 3, backend=backend)
        assert together.dtype == dtype and torch.equal(together, torch.stack(losses))
        assert all(map(torch.equal, one, many)) and not torch.equal(many[0], w1)
        assert len(set(together.tolist())) == 3


# The second fits the registers of a CPU, whichever way a weight lies.
@pytest.mark.parametrize("shape", [(6, 5, 7, 3), (9, 100, 100, 3)], ids=str)
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_gradients_of_weights_lie_as_the_weights_do(backend, device, shape):
    n, n_in, n_hidden, n_out = shape
    # Small integers, so that every sum is exact in any order.
    x, y, *by_rows = (
        torch.randint(-2, 3, each, device=device).float()
        for each in ((n, n_in), (n, n_out), (n_in, n_hidden), (n_hidden, n_out))
    )
    by_columns = [each.mT.contiguous().mT for each in by_rows]
    assert not any(each.is_contiguous() for each in by_columns)
    ops = (
        lambda w1, w2, name: P.two_layer(x, w1, w2, backend=name).square().sum(),
        lambda w1, w2, name: P.two_layer_mse_loss(x, y, w1, w2, backend=name),
    )
    for op, w1, w2 in itertools.product(ops, *zip(by_rows, by_columns, strict=True)):
        w1, w2 = w1.detach().requires_grad_(), w2.detach().requires_grad_()
        expected = torch.autograd.grad(op(w1, w2, "eager"), (w1, w2))
        both = torch.autograd.grad(op(w1, w2, backend), (w1, w2))
        (first,) = torch.autograd.grad(op(w1, w2.detach(), backend), w1)
        (second,) = torch.autograd.grad(op(w1.detach(), w2, backend), w2)
        for grads in (both, (first, second)):
            assert [each.stride() for each in grads] == [w1.stride(), w2.stride()]
            torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_an_error_of_the_callers_own_is_left_as_it_is(backend, device):
    cause = KeyError("reason")

    def fails(tensor):
        raise LookupError("no room") from cause

    x, w1, w2 = (torch.ones(s, device=device) for s in ((5, 4), (4, 3), (3, 2)))
    hooks = torch.autograd.graph.saved_tensors_hooks(fails, fails)
    with hooks, pytest.raises(LookupError, match="no room") as e:
        P.two_layer(x, w1.requires_grad_(), w2, backend=backend)
    assert e.value.__cause__ is cause


def test_a_result_that_does_not_fit_memory_says_so():
    x, w1, w2 = torch.empty(2**40, 0), torch.empty(0, 2**12), torch.empty(2**12, 1)
    with pytest.raises(RuntimeError, match="allocate"):
        P.two_layer(x, w1, w2, backend="extension")


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_no_sgd_step_changes_nothing(backend, device):
    x, y, w1, w2 = (torch.randn(s, device=device) for s in ((5, 4), (5, 2), (4, 3), (3, 2)))
    before, versions = (w1.clone(), w2.clone()), (w1._version, w2._version)
    assert P.two_layer_sgd_steps(x, y, w1, w2, 0.1, 0, backend=backend).shape == (0,)
    none = x[None][:0], y[None][:0]
    assert P.two_layer_sgd_steps(*none, w1, w2, 0.1, backend=backend).shape == (0,)
    assert torch.equal(w1, before[0]) and torch.equal(w2, before[1])
    assert (w1._version, w2._version) == versions


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_adadelta_step_computes_in_float32_and_its_rates_are_exact(backend, device):
    """In bfloat16 only the results are rounded; in float64 no rate has passed through float32.

    All terms of a result have one sign, so that nothing cancels: acc_delta, the longest chain, is
    rounded up to 17 times on the way, and then once more when it is stored.
    """
    for dtype in registry.FLOATING_DTYPES:
        values = torch.linspace(0.1, 3, 35, dtype=torch.float64, device=device)
        ours = [(sign * values + i / 4).to(dtype) for i, sign in enumerate((1, -1, 1, 1))]
        ours[1] -= 0.5
        exact = [each.double() for each in ours]
        for args, name in ((ours, backend), (exact, "eager")):
            P.adadelta_step(*args, 0.3, 0.7, 1e-3, backend=name)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        rtol = torch.finfo(dtype).eps / 2 + 17 * torch.finfo(computed).eps / 2
        for each, expected in zip(ours, exact, strict=True):
            torch.testing.assert_close(each.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_adadelta_step_is_the_same_under_autocast(backend, device):
    plain, cast = ([torch.rand(9, device=device) for _ in range(4)] for _ in range(2))
    for to, each in zip(cast, plain, strict=True):
        to.copy_(each)
    P.adadelta_step(*plain, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        P.adadelta_step(*cast, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
