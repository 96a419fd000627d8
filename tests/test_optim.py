"""pyext.optim: optimizers that do what their namesakes in torch.optim do, on every backend."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from support import configurations, dtype_id

import pyext.functional as P
from pyext import optim, use_backend
from pyext.backends import BACKENDS
from pyext.ops import adadelta_step

WITH_EAGER = configurations(include_eager=True)
SHAPES = ((33, 17), (17,), (), (0, 3), (2, 3, 4, 5))


def parameters(dtype=torch.float64, device="cpu"):
    """Several shapes and one channels-last; the last never gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (*SHAPES, (3,))]
    values[4] = values[4].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(each.to(device, dtype)) for each in values]


def set_gradients(params, step):
    """The same for every optimizer; the quadratic's gradient and noise, one of them transposed."""
    generator = torch.Generator().manual_seed(step)
    for param in params[:-1]:
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        grad = (param.detach().double().cpu() + noise).to(param.device, param.dtype)
        param.grad = grad.t().contiguous().t() if grad.dim() == 2 else grad


def groups(params):
    """Two groups with hyper-parameters of their own."""
    return [
        {"params": params[:2], "lr": 0.5, "weight_decay": 0.01, "eps": 1e-2},
        {"params": params[2:], "rho": 0.95},
    ]


def run(optimizer, params, steps, scheduler=None):
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        if scheduler:
            scheduler.step()


def distance(ours, theirs) -> float:
    """The largest error relative to the largest value of a tensor."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
        if b.numel() and b.any()
    )


def states(optimizer, params):
    return [
        optimizer.state[each][name]
        for each in params
        if each in optimizer.state
        for name in ("step", "square_avg", "acc_delta")
    ]


# By float32: a step's relative error is at most 9 roundings of delta, of half an epsilon each
# (pyext.lab.check derives the same for one step). They add up over the steps, and feed back through
# the averages, which shrinks them.
@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 50 * 4.5 * torch.finfo(torch.float32).eps)],
    ids=["float64", "float32"],
)
def test_fifty_steps_are_those_of_torch(dtype, bound, backend, device):
    """Groups, weight decay, a scheduler, an empty parameter, one without a gradient."""
    steps = 5 if BACKENDS[backend].interpreted else 50  # 50 take 13 s in Triton's interpreter
    ours, theirs = parameters(dtype, device), parameters(dtype, device)
    optimizer = optim.Adadelta(groups(ours), lr=0.9, backend=backend)
    reference = torch.optim.Adadelta(groups(theirs), lr=0.9)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(each, step_size=steps // 2, gamma=0.5)
        for each in (optimizer, reference)
    ]
    run(optimizer, ours, steps, schedulers[0])
    run(reference, theirs, steps, schedulers[1])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.9 / 4)
    start = parameters(dtype, device)
    assert distance(ours[:1], start[:1]) > 1e-3 * steps
    assert distance(ours, theirs) < bound
    assert distance(states(optimizer, ours), states(reference, theirs)) < bound
    assert torch.equal(ours[-1], start[-1]) and ours[-1] not in optimizer.state


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_precision_is_nearer_to_the_exact_step_than_torch(dtype, backend, device):
    ours, theirs, exact = (parameters(dtype, device) for _ in range(3))
    exact = [torch.nn.Parameter(each.detach().double()) for each in exact]
    for params, kind in ((ours, optim), (theirs, torch.optim), (exact, torch.optim)):
        extra = {"backend": backend} if kind is optim else {}
        optimizer = kind.Adadelta(params, **extra)
        set_gradients(exact if params is exact else ours, 0)
        for to, each in zip(params, ours, strict=True):
            to.grad = None if each.grad is None else each.grad.to(to.dtype)
        optimizer.step()
    # Stored once: half a unit in the last place, of values that a step hardly changes.
    assert distance(ours, exact) <= torch.finfo(dtype).eps
    if backend != "eager":
        assert distance(ours, exact) <= distance(theirs, exact)


@pytest.mark.parametrize("kinds", [(optim, torch.optim), (torch.optim, optim)], ids=["to", "from"])
def test_state_dict_goes_to_torch_and_back(kinds):
    ours, theirs = parameters(), parameters()
    first = kinds[0].Adadelta(groups(ours), lr=0.9)
    run(first, ours, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = kinds[1].Adadelta(groups(theirs), lr=0.1)
    second.load_state_dict(torch.load(file))
    for to, each in zip(theirs, ours, strict=True):
        to.data.copy_(each.data)
    for optimizer, params in ((first, ours), (second, theirs)):
        set_gradients(params, 3)
        optimizer.step()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert first.state_dict()["param_groups"] == second.state_dict()["param_groups"]
    assert distance(ours, theirs) < 1e-12
    (step,) = {each["step"].item() for each in second.state.values()}
    assert step == 4 and second.state[theirs[0]]["step"].dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_keeps_everything(copied):
    params = parameters()
    optimizer = optim.Adadelta(groups(params), lr=0.9, backend="eager")
    run(optimizer, params, 2)
    other, other_params = copied((optimizer, params))
    assert other.backend == "eager" and other.state_dict().keys() == optimizer.state_dict().keys()
    for each, those in ((optimizer, params), (other, other_params)):
        set_gradients(those, 2)
        each.step()
    for a, b in zip(params, other_params, strict=True):
        assert torch.equal(a, b) and a is not b


def test_closure_and_hooks():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.Adadelta([param])
    torch.optim.Adadelta([torch.nn.Parameter(torch.ones(3))])  # patches its own step
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure) == 3
    assert calls == ["before", "closure", "after"]
    assert param.grad.tolist() == [2, 2, 2] and param.requires_grad and param.is_leaf


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_a_stale_graph_is_an_error(backend, device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = optim.Adadelta([param], backend=backend)
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    state_version = None
    for _ in range(2):
        optimizer.step()
        versions = [optimizer.state[param][name]._version for name in ("square_avg", "acc_delta")]
        assert state_version is None or min(versions) > state_version
        state_version = max(versions)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def count_updates(monkeypatch):
    """A list that gets an entry for each parameter that the op updates."""
    updates, update = [], adadelta_step.update
    monkeypatch.setattr(
        adadelta_step, "update", lambda *args: (updates.append(args[0].name), update(*args))
    )
    return updates


OPTIONS = ({"maximize": True}, {"differentiable": True}, {"lr": torch.tensor(0.5)})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_torch_do_what_they_do_there(options, monkeypatch):
    updates = count_updates(monkeypatch)
    ours, theirs = parameters(), parameters()
    if "differentiable" in options:
        ours, theirs = ([each.clone() for each in some] for some in (ours, theirs))
    for kind, params in ((optim, ours), (torch.optim, theirs)):
        run(kind.Adadelta(params, **options), params, 3)
    assert distance([each.detach() for each in ours], [each.detach() for each in theirs]) < 1e-12
    assert len(updates) == (15 if "lr" in options else 0)


def test_complex_parameters_go_through_torch(monkeypatch):
    updates = count_updates(monkeypatch)
    results = []
    for kind in (optim, torch.optim):
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex128)), parameters()[0]]
        for each in params:
            each.grad = torch.full_like(each, 0.5)
        kind.Adadelta([{"params": params[:1]}, {"params": params[1:]}]).step()
        results.append(params)
    torch.testing.assert_close(*results)
    assert len(updates) == 1


def test_backend_is_the_argument_then_the_context(monkeypatch):
    updates = count_updates(monkeypatch)
    params = parameters()[:1]
    set_gradients([*params, None], 0)
    with use_backend("eager"):
        optim.Adadelta(params).step()
    if BACKENDS["extension"].unavailable("cpu") is None:
        with use_backend("eager"):
            optim.Adadelta(params, backend="extension").step()
        assert updates == ["eager", "extension"]
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        optim.Adadelta(params, backend="cudnn")


@pytest.mark.parametrize(
    "options",
    [{"lr": -1}, {"rho": 1.5}, {"eps": -1e-9}, {"weight_decay": -1}, {"lr": math.nan}],
    ids=str,
)
def test_refusals_are_those_of_torch(options):
    params = parameters()[:1]
    with pytest.raises(ValueError) as theirs:
        torch.optim.Adadelta(params, **options)
    with pytest.raises(ValueError) as ours:
        optim.Adadelta(params, **options)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError) as of_the_op:
        P.adadelta_step(*(torch.ones(1) for _ in range(4)), **options)
    assert str(of_the_op.value).split(":")[0] == str(theirs.value).split(":")[0]


def test_what_cannot_be_updated_is_refused_and_nothing_has_changed():
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(1).expand(4))]
    for each in params:
        each.grad = torch.ones(4)
    optimizer = optim.Adadelta(params)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert all(each.eq(1).all() for each in params)
    params[1].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(each.eq(1).all() for each in params)
