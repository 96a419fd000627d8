"""What autograd asks of every op beyond gradcheck: torch.func, hooks, checkpoints, reuse.

docs/autograd.md states these promises. gradcheck and gradgradcheck are in test_ops.py.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import configurations, through
from torch import func
from torch.autograd import forward_ad, graph
from torch.utils.checkpoint import checkpoint

import pyext.functional as P
from pyext import registry

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # vmap loops over raw ops

CONFIGURATIONS = configurations()
WITH_EAGER = configurations(include_eager=True)
DIFFERENTIABLE = [pytest.param(op, id=op.name) for op in registry.ops().values() if not op.is_step]
SMALL = ("5x7", "5x7_none", "5x7_mean", "small", "small_sum", "no_bias", "no_bias_mean")


def small_samples(op: registry.Op, device: str, requires_grad: bool = False):
    """A few differentiable samples in float64: with and without biases, reduced and not."""
    for each in op.sample_inputs(torch.device(device), torch.float64, requires_grad):
        if each.name in SMALL:
            yield each


def of_tensors(function, each: registry.SampleInput):
    """``function`` of the sample's tensors alone, and the tensors."""
    primals = tuple(arg for arg in each.args if torch.is_tensor(arg))
    rest = each.args[len(primals) :]
    return lambda *given: function(*given, *rest, **each.kwargs), primals


def _tangents(primals):
    generator = torch.Generator(primals[0].device).manual_seed(1)
    return tuple(
        torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator) for p in primals
    )


def _loss(f):
    return lambda *given: f(*given).square().sum()


def _every(primals):
    return tuple(range(len(primals)))


def _batch(primals):
    return tuple(torch.stack([each, each + 0.5, -each]) for each in primals)


def _vjp(f, primals):
    out, pull_back = func.vjp(f, *primals)
    return pull_back(*_tangents((out,)))


def _jvp_of_each_alone(f, primals):
    """An op's other inputs, and those of its outputs that do not vary, then have no tangent."""
    results = []
    for i, tangent in enumerate(_tangents(primals)):

        def of_one(given, i=i):
            return f(*primals[:i], given, *primals[i + 1 :])

        results += func.jvp(of_one, (primals[i],), (tangent,))
    return results


def _vmap_over_each_alone(f, primals):
    return [
        func.vmap(f, in_dims=tuple(0 if i == j else None for j in _every(primals)))(
            *primals[:i], torch.stack([primals[i], -primals[i]]), *primals[i + 1 :]
        )
        for i in _every(primals)
    ]


def _forward_over_reverse(f, primals):
    return func.jvp(func.grad(_loss(f), _every(primals)), primals, _tangents(primals))


def _forward_ad(f, primals):
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, primals, _tangents(primals))
        return forward_ad.unpack_dual(f(*duals)).tangent


TRANSFORMS = {
    "vjp": _vjp,
    "jvp": lambda f, primals: func.jvp(f, primals, _tangents(primals)),
    "jvp_of_each_alone": _jvp_of_each_alone,
    "forward_ad": _forward_ad,
    "grad": lambda f, primals: func.grad(_loss(f), _every(primals))(*primals),
    "jacrev": lambda f, primals: func.jacrev(f, _every(primals))(*primals),
    "jacfwd": lambda f, primals: func.jacfwd(f, _every(primals))(*primals),
    "hessian": lambda f, primals: func.hessian(_loss(f))(*primals),
    "forward_over_reverse": _forward_over_reverse,
    "vmap": lambda f, primals: func.vmap(f)(*_batch(primals)),
    "vmap_over_each_alone": _vmap_over_each_alone,
    "vmap_of_grad": lambda f, primals: func.vmap(func.grad(_loss(f), _every(primals)))(
        *_batch(primals)
    ),
}


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_torch_func_agrees_with_eager(op, transform, backend, device):
    for each in small_samples(op, device):
        ours, primals = of_tensors(through(op, backend), each)
        reference, _ = of_tensors(op.eager, each)
        torch.testing.assert_close(transform(ours, primals), transform(reference, primals))


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_worked_example_of_a_jacobian(backend, device):
    """The example of docs/autograd.md: y = x², whose Jacobian has 2x on its diagonal."""

    def square(x):
        return P.mse_loss(x, torch.zeros_like(x), reduction="none", backend=backend)

    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    v = torch.tensor([1.0, 10.0, 100.0], device=device)
    assert square(x).tolist() == [1, 4, 9]

    # Row i of the Jacobian holds the derivatives of y[i]. Each y depends on its own x alone.
    jacobian = torch.func.jacrev(square)(x)
    assert jacobian.tolist() == [[2, 0, 0], [0, 4, 0], [0, 0, 6]]
    assert torch.equal(jacobian, torch.diag(2 * x))

    # Backward never builds the Jacobian: it multiplies it by a vector from the left, vᵀJ.
    _, vjp = torch.func.vjp(square, x)
    (v_times_jacobian,) = vjp(v)
    assert v_times_jacobian.tolist() == (v @ jacobian).tolist() == [2, 40, 600]

    # That is what y.backward(v) leaves in x.grad.
    x.requires_grad_()
    square(x).backward(v)
    assert x.grad.tolist() == [2, 40, 600]

    # Forward mode multiplies from the right, Jv: here the same, because J is diagonal.
    _, jacobian_times_v = torch.func.jvp(square, (x.detach(),), (v,))
    assert jacobian_times_v.tolist() == [2, 40, 600]


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_each_gradient_alone_is_that_among_all(op, backend, device):
    """What is not asked for is not computed; what is must not depend on that."""
    for each in small_samples(op, device):
        f, primals = of_tensors(through(op, backend), each)
        expected = _gradients(f, primals)
        for i in _every(primals):
            leaves = [primal.detach().requires_grad_(i == j) for j, primal in enumerate(primals)]
            f(*leaves).sum().backward()
            assert [leaf.grad is not None for leaf in leaves] == [i == j for j in _every(primals)]
            torch.testing.assert_close(leaves[i].grad, expected[i])


def _gradients(f, primals):
    leaves = [primal.detach().clone().requires_grad_() for primal in primals]
    f(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_saved_tensor_hooks_see_what_is_saved_and_may_replace_it(op, backend, device):
    for each in small_samples(op, device):
        f, primals = of_tensors(through(op, backend), each)
        expected = _gradients(f, primals)
        packed, unpacked = [], []

        def pack(tensor, packed=packed):
            packed.append(tensor)
            return tensor.numpy(force=True).copy()

        def unpack(array, unpacked=unpacked):
            unpacked.append(array)
            return torch.from_numpy(array).to(device)

        with graph.saved_tensors_hooks(pack, unpack):
            actual = _gradients(f, primals)
        assert packed and len(unpacked) == len(packed)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        with graph.save_on_cpu():
            actual = _gradients(f, primals)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["graph", "reentrant"])
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_activation_checkpointing_recomputes_the_same_gradients(op, backend, device, use_reentrant):
    for each in small_samples(op, device):
        f, primals = of_tensors(through(op, backend), each)
        calls = []

        def counted(*given, f=f, calls=calls):
            calls.append(1)
            return f(*given)

        def checkpointed(*given, counted=counted):
            return checkpoint(counted, *given, use_reentrant=use_reentrant)

        actual = _gradients(checkpointed, primals)
        assert len(calls) == 2
        torch.testing.assert_close(actual, _gradients(f, primals), rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_retained_graph_runs_backward_again_and_a_freed_one_refuses(op, backend, device):
    for each in small_samples(op, device, requires_grad=True):
        f, leaves = of_tensors(through(op, backend), each)
        out = f(*leaves).sum()
        once = torch.autograd.grad(out, leaves, retain_graph=True)
        twice = torch.autograd.grad(out, leaves, retain_graph=True)
        out.backward()
        torch.testing.assert_close(twice, once, rtol=0, atol=0)
        torch.testing.assert_close([leaf.grad for leaf in leaves], [*once], rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_two_uses_add_up(op, backend, device):
    for each in small_samples(op, device):
        f, primals = of_tensors(through(op, backend), each)
        doubled = [2 * grad for grad in _gradients(f, primals)]
        twice = _gradients(lambda *given, f=f: f(*given) + f(*given), primals)
        torch.testing.assert_close(twice, doubled, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_one_tensor_may_be_several_arguments(backend, device):
    square = torch.randn(4, 4, dtype=torch.float64, device=device)
    for name, times in {"mse_loss": 2, "two_layer": 3, "two_layer_mse_loss": 4}.items():
        op = registry.get(name)
        ours, theirs = (
            _gradients(lambda x, f=f, times=times: f(*[x] * times), (square,))
            for f in (through(op, backend), op.eager)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_with_a_constant_target_keeps_the_contract(reduction, backend, device):
    """Forward may then compute the gradient, too, and the first backward use it up."""
    shape = {"dtype": torch.float64, "device": device}
    x, y = torch.randn(5, 7, **shape).requires_grad_(), torch.randn(5, 7, **shape)
    v = torch.tensor(3.0, **shape)

    def loss(x):
        return P.mse_loss(x, y, reduction, backend=backend)

    def reference(x):
        return torch.nn.functional.mse_loss(x, y, reduction=reduction)

    (expected,) = torch.autograd.grad(reference(x), x, v)
    for create_graph in ((False, False, False), (True, False, False), (False, True, False)):
        out = loss(x)
        for each in create_graph:
            (grad,) = torch.autograd.grad(out, x, v, retain_graph=True, create_graph=each)
            torch.testing.assert_close(grad, expected)
    batch = torch.stack([v, -v])
    (batched,) = torch.autograd.grad(loss(x), x, batch, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, -expected]))
    (grad,) = torch.autograd.grad(loss(x), x, v, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    (again,) = torch.autograd.grad(reference(x), x, v, create_graph=True)
    (expected_second,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close((grad, second), (again, expected_second))
    out = loss(x)
    start = threading.Barrier(4)

    def backward(_):
        start.wait()
        return torch.autograd.grad(out, x, v, retain_graph=True)[0]

    with ThreadPoolExecutor(4) as pool:
        for grad in pool.map(backward, range(4)):
            torch.testing.assert_close(grad, expected)


NEEDS = [("x",), ("w1",), ("w2",), ("x", "w1"), ("x", "w2"), ("w1", "w2"), ("x", "w1", "w2")]


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("by_columns", [False, True], ids=["by_rows", "by_columns"])
@pytest.mark.parametrize("need_grad", NEEDS, ids="_".join)
def test_two_layer_without_biases_to_the_second_derivative(need_grad, by_columns, backend, device):
    """It hands autograd its output alone, and computes hidden again where that needs a graph."""
    shapes = {"x": (5, 4), "w1": (4, 3), "w2": (3, 2)}
    given = {
        name: torch.randn(shape, dtype=torch.float64, device=device)
        for name, shape in shapes.items()
    }
    if by_columns:
        given |= {name: given[name].t().contiguous().t() for name in ("w1", "w2")}
    v = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    needed = [given[name].requires_grad_() for name in need_grad]

    def derivatives(backend) -> tuple:
        out = P.two_layer(**given, backend=backend)
        alone = torch.autograd.grad(out, needed, v, retain_graph=True)
        first = torch.autograd.grad(out, needed, v, create_graph=True)
        torch.testing.assert_close(alone, first, rtol=0, atol=0)
        squares = sum(each.square().sum() for each in first)
        second = torch.autograd.grad(squares, [*needed, v], materialize_grads=True)
        return *first, *second

    torch.testing.assert_close(derivatives(backend), derivatives("eager"))


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_what_needs_a_gradient_only_after_the_forward_gets_none(backend, device):
    x, w1, w2 = (torch.randn(shape, device=device) for shape in ((5, 4), (4, 3), (3, 2)))
    out = P.two_layer(x.requires_grad_(), w1, w2.requires_grad_(), backend=backend)
    w1.requires_grad_()
    (grad,) = torch.autograd.grad(out.sum(), w2, create_graph=True)
    of_x, of_w1 = torch.autograd.grad(grad.sum(), (x, w1), allow_unused=True)
    assert of_x is not None and of_w1 is None


SAVED = {
    "dropout": set(),  # but its seed
    "mse_loss": {"input", "target"},
    "relu": {"out"},
    "relu_max_pool2d": set(),
    "two_layer": {"x", "w1", "w2"},
    "two_layer_mse_loss": {"x", "w1", "w2"},
}
"""What backward needs as it was. Everything else may change in place between forward and backward.

(``relu_max_pool2d`` saves where each maximum was, ``two_layer`` and its loss save hidden, too, and
the loss its error: nobody else can reach these.)
"""


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_changing_a_saved_tensor_in_place_makes_backward_an_error(op, backend, device):
    for each in small_samples(op, device):
        f, primals = of_tensors(through(op, backend), each)
        expected = _gradients(f, primals)
        names = op.eager.__code__.co_varnames[: len(primals)]
        for changed in (*names, "out"):
            leaves = [primal.detach().clone().requires_grad_() for primal in primals]
            out = f(*leaves)
            victims = dict(zip(names, leaves, strict=True), out=out)
            with torch.no_grad():
                victims[changed].add_(1)
            if changed in SAVED[op.name]:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.sum().backward()
            else:
                out.sum().backward()
                grads = [leaf.grad for leaf in leaves]
                torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_nothing_is_recorded_without_need(op, backend, device):
    each = next(small_samples(op, device, requires_grad=True))
    f, leaves = of_tensors(through(op, backend), each)
    assert f(*leaves).requires_grad
    assert not f(*(leaf.detach() for leaf in leaves)).requires_grad
    with torch.no_grad():
        assert not f(*leaves).requires_grad
    with torch.inference_mode():
        assert f(*leaves).is_inference()


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_the_engine_calls_a_shell_s_backward_itself(backend, device):
    """Not by a class's method that looks it up; PyTorch may come to ignore what says so."""
    out = P.relu(torch.ones(3, device=device, requires_grad=True), backend=backend)
    assert type(out.grad_fn).apply is type(out.grad_fn)._forward_cls.backward
