"""pyext.nn: the modules against torch.nn's, and what `swap` must keep."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pyext import nn as lab
from pyext.backends import BACKENDS

USABLE = [name for name, backend in BACKENDS.items() if backend.unavailable("cpu") is None]
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := BACKENDS[request.param].unavailable("cpu"):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


class Model(nn.Module):
    """Every kind of module that `swap` looks at, in a model that is no Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.relu = nn.ReLU()
        self.again = self.relu
        self.inplace = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
        self.loss = nn.MSELoss(reduction="sum")

    def forward(self, x, target):
        x = self.again(self.relu(self.conv(x)) - 0.1).flatten(1)
        return self.loss(self.inplace(self.head(x)), target)


def _model_and_inputs(**options):
    torch.manual_seed(0)
    return Model().to(**DOUBLE), (torch.randn(4, 1, 6, **DOUBLE), torch.randn(4, 3, **DOUBLE))


def _gradients(model, inputs):
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


# --- the modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_two_layer_net_starts_like_the_sequential(bias):
    torch.manual_seed(3)
    net = lab.TwoLayerNet(7, 5, 2, bias=bias)
    after = torch.rand(())
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(7, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2, bias=bias))
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.rand(()) == after
    names = ["0.weight", "0.bias", "2.weight", "2.bias"] if bias else ["0.weight", "2.weight"]
    assert list(net.state_dict()) == names
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
def test_two_layer_net_computes_the_sequential(backend, shape, bias):
    torch.manual_seed(0)
    net = lab.TwoLayerNet(7, 5, 2, bias=bias, backend=backend).double()
    plain = nn.Sequential(nn.Linear(7, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2, bias=bias))
    plain.double().load_state_dict(net.state_dict())
    x = torch.randn(shape, **DOUBLE)
    output, expected = net(x), plain(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    expected.sum().backward()
    for actual, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


def test_two_layer_net_runs_the_fused_op_only_while_its_modules_are_plain(monkeypatch):
    fused = []
    real = lab.functional.two_layer
    monkeypatch.setattr(
        lab.functional, "two_layer", lambda *args, **kw: fused.append(1) or real(*args, **kw)
    )
    net = lab.TwoLayerNet(7, 5, 2, backend="eager")
    x = torch.randn(3, 7)
    expected = net(x)
    assert fused == [1]
    seen = []
    handle = net[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(net(x), expected)
    assert fused == [1] and len(seen) == 1
    handle.remove()
    net(x)
    assert fused == [1, 1]
    parametrizations.orthogonal(net[0])
    assert not torch.allclose(net(x), expected)
    assert fused == [1, 1]


@pytest.mark.parametrize(
    "sizes", [(2,), (2, None, 1), ((3, 2), (2, 1), (1, 0))], ids=["2", "padded", "pairs"]
)
def test_relu_max_pool2d_computes_torch_nns(backend, sizes):
    torch.manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 6, 7, **DOUBLE).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours)
    pool = lab.ReLUMaxPool2d(*sizes, backend=backend)
    output = pool(ours)
    expected = nn.Sequential(nn.ReLU(), nn.MaxPool2d(*sizes))(theirs)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert f"kernel_size={sizes[0]}" in repr(pool) and repr(backend) in repr(pool)
    assert repr(pickle.loads(pickle.dumps(pool))) == repr(pool)
    assert type(pool[:1]) is nn.Sequential and type(pool[1]) is nn.MaxPool2d


def test_relu_and_max_pool_in_a_sequential_become_one_op(backend, monkeypatch):
    calls = []
    op = lab.functional.relu_max_pool2d
    monkeypatch.setattr(
        lab.functional, "relu_max_pool2d", lambda *args, **kw: calls.append(1) or op(*args, **kw)
    )
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    model.double()
    x = torch.randn(2, 1, 8, 8, **DOUBLE)
    expected = model(x)
    record = lab.swap(model, backend)
    assert type(model[1]) is lab.ReLUMaxPool2d and [entry.names for entry in record] == [
        ("1",),
        ("1.0",),
    ]
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    handle = model[1][0].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(model(x), expected + 1)
    handle.remove()
    assert calls == [1]


@pytest.mark.parametrize(
    ("relu", "pool", "why"),
    [
        (nn.ReLU(inplace=True), nn.MaxPool2d(2), "its ReLU is inplace"),
        (nn.ReLU(), nn.MaxPool2d(2, dilation=2), "a dilation"),
        (nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.ReLU(), nn.MaxPool2d(2, return_indices=True), "return_indices"),
    ],
)
def test_pooling_that_the_op_does_not_do_stays(backend, relu, pool, why):
    model = nn.Sequential(relu, pool)
    record = lab.swap(model, backend)
    assert type(model) is nn.Sequential and type(model[0]) is lab.ReLU
    assert len(record) == 1 and why in record.left[0].note


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mse_loss_computes_torch_nns(backend, reduction):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3, **DOUBLE)
    loss = lab.MSELoss(reduction, backend=backend)
    torch.testing.assert_close(loss(a, b), nn.MSELoss(reduction=reduction)(a, b))


def test_mse_loss_refuses_an_unknown_reduction_when_called():
    with pytest.raises(ValueError, match="median"):
        lab.MSELoss("median")(torch.ones(2), torch.ones(2))


def test_inplace_relu_writes_to_its_input_and_returns_it(backend):
    x = torch.tensor([-1.0, 0.0, 2.0], **DOUBLE)
    assert lab.ReLU(inplace=True, backend=backend)(x) is x
    assert x.tolist() == [0.0, 0.0, 2.0]
    leaf = torch.randn(3, **DOUBLE, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        lab.ReLU(inplace=True, backend=backend)(leaf)


def test_dropout_drops_in_training_what_every_backend_drops(backend):
    x = torch.randn(50, 20, **DOUBLE)
    layer, eager = lab.Dropout(0.25, backend=backend), lab.Dropout(0.25, backend="eager")
    outputs = []
    for each in (layer, eager):
        torch.manual_seed(1)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert 150 < (outputs[0] == 0).sum() < 350
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="between 0 and 1"):
        lab.Dropout(1.5)


def test_inplace_dropout_writes_to_its_input_and_returns_it(backend):
    x = torch.ones(40, **DOUBLE)
    layer = lab.Dropout(inplace=True, backend=backend)
    assert layer(x) is x and set(x.tolist()) == {0.0, 2.0}
    version = x._version
    assert layer.eval()(x) is x and x._version == version


def test_modules_show_their_backend():
    assert repr(lab.Dropout(0.2)) == "Dropout(p=0.2, inplace=False, backend=None)"
    assert repr(lab.ReLU(backend="eager")) == "ReLU(backend='eager')"
    assert "inplace=True, backend=None" in repr(lab.ReLU(inplace=True))
    assert repr(lab.MSELoss("sum")) == "MSELoss(reduction='sum', backend=None)"
    assert "backend='eager'" in repr(lab.TwoLayerNet(1, 1, 1, backend="eager"))


# --- swap ----------------------------------------------------------------------------------------


def test_swap_changes_every_module_it_has_an_op_for_and_no_result(backend):
    model, inputs = _model_and_inputs()
    expected = _gradients(model, inputs)
    record = lab.swap(model, backend)
    assert {entry.names: entry.now for entry in record} == {
        ("relu", "again"): "pyext.nn.ReLU",
        ("inplace",): "pyext.nn.ReLU",
        ("head",): "pyext.nn.TwoLayerNet",
        ("head.1",): "pyext.nn.ReLU",
        ("loss",): "pyext.nn.MSELoss",
    }
    assert len(record) == 5 and not record.left
    assert type(model.relu) is lab.ReLU and model.again is model.relu
    assert type(model.head) is lab.TwoLayerNet and type(model.loss) is lab.MSELoss
    assert model.loss.reduction == "sum" and model.inplace.inplace
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {backend}
    torch.testing.assert_close(_gradients(model, inputs), expected)


def test_swap_takes_exactly_dropout_with_what_it_was(backend):
    """Neither its relatives, which drop whole channels, nor its subclasses."""

    class Mine(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.1, inplace=True), nn.Dropout1d(), nn.AlphaDropout(), Mine())
    record = lab.swap(model.eval(), backend)
    assert [type(each) for each in model] == [lab.Dropout, nn.Dropout1d, nn.AlphaDropout, Mine]
    assert (model[0].p, model[0].inplace, model[0].training) == (0.1, True, False)
    assert model[0].backend == backend and "inplace=True is kept" in str(record)
    assert "left 3: Mine is a subclass of torch.nn.Dropout" in str(record)


def test_swap_says_what_it_did():
    text = str(lab.swap(_model_and_inputs()[0], "eager"))
    assert text.startswith("swapped 5 modules of Model to backend 'eager'")
    assert "relu, again: torch.nn.ReLU → pyext.nn.ReLU" in text
    assert "head: torch.nn.Sequential → pyext.nn.TwoLayerNet" in text
    assert "inplace: torch.nn.ReLU → pyext.nn.ReLU (inplace=True is kept by copying" in text


def test_swap_keeps_parameters_for_the_optimizer():
    model, inputs = _model_and_inputs()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lab.swap(model, "eager")
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    old = before["head.0.weight"].clone()
    model(*inputs).backward()
    optimizer.step()
    assert not torch.equal(model.head[0].weight, old)


def test_swap_keeps_hooks_and_their_handles():
    model, inputs = _model_and_inputs()
    calls = []
    note = calls.append
    relu = model.relu
    handles = [
        relu.register_forward_pre_hook(lambda module, inputs: note("forward pre")),
        relu.register_forward_hook(lambda module, inputs, output: note("forward")),
        relu.register_full_backward_pre_hook(lambda module, grad: note("backward pre")),
        relu.register_full_backward_hook(lambda module, grad_in, grad_out: note("backward")),
        relu.register_state_dict_pre_hook(lambda module, prefix, keep: note("state_dict pre")),
        relu.register_state_dict_post_hook(lambda module, *rest: note("state_dict")),
        relu.register_load_state_dict_pre_hook(lambda module, *rest: note("load pre")),
        relu.register_load_state_dict_post_hook(lambda module, keys: note("load")),
    ]
    model.head.register_forward_hook(lambda module, inputs, output: note(type(module).__name__))
    lab.swap(model, "eager")
    model(*inputs).backward()
    model.load_state_dict(model.state_dict())
    kinds = ("forward pre", "forward", "backward pre", "backward")
    kinds += ("state_dict pre", "state_dict", "load pre", "load")
    assert set(calls) == {*kinds, "TwoLayerNet"}
    for handle in handles:
        handle.remove()
    calls.clear()
    model(*inputs)
    assert calls == ["TwoLayerNet"]


def test_swap_keeps_the_training_flag():
    model, _ = _model_and_inputs()
    model.head.eval()
    lab.swap(model, "eager")
    assert not model.head.training and model.relu.training
    model.eval()
    assert not model.relu.training


@pytest.mark.parametrize(
    "root, kind",
    [
        (lambda: nn.ReLU(), lab.ReLU),
        (lambda: nn.MSELoss(), lab.MSELoss),
        (lambda: nn.Dropout(0.3), lab.Dropout),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), lab.TwoLayerNet),
    ],
)
def test_swap_reaches_the_model_itself(root, kind):
    model = root()
    record = lab.swap(model, "eager")
    assert record.model is model and type(model) is kind
    assert "(the model itself)" in str(record)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: (nn.Linear(3, 3), nn.ReLU()),
        lambda: (nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()),
        lambda: (nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3)),
        lambda: (nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)),
        lambda: (nn.Linear(3, 3), nn.ReLU(), nn.Bilinear(3, 3, 3)),
    ],
)
def test_swap_leaves_other_sequentials(inner):
    model = nn.Sequential(*inner())
    record = lab.swap(model, "eager")
    assert type(model) is nn.Sequential and not record.left
    assert all(type(module) is not nn.ReLU for module in model)


def _with_hook(model):
    model[2].register_forward_hook(lambda *_: None)


def _with_parametrization(model):
    parametrizations.weight_norm(model[0])


def _with_pruning(model):
    prune.random_unstructured(model[0], "weight", amount=0.5)


def _with_forward(model):
    model[2].forward = lambda x: x


@pytest.mark.parametrize(
    "change", [_with_hook, _with_parametrization, _with_pruning, _with_forward]
)
def test_swap_does_not_fuse_modules_that_are_more_than_their_weights(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    change(model)
    x = torch.randn(2, 4, **DOUBLE)
    expected = model(x)
    record = lab.swap(model, "eager")
    assert type(model) is nn.Sequential and type(model[1]) is lab.ReLU
    assert len(record) == 1 and len(record.left) == 1 and "left Sequential" in str(record)
    torch.testing.assert_close(model(x), expected)


def test_swap_fuses_shared_linears():
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU(), shared), shared)
    x = torch.randn(2, 3, **DOUBLE)
    expected = _gradients(nn.Sequential(model, nn.Flatten(0), _Sum()), (x,))
    lab.swap(model, "eager")
    assert type(model[0]) is lab.TwoLayerNet and len(list(model.parameters())) == 2
    actual = _gradients(nn.Sequential(model, nn.Flatten(0), _Sum()), (x,))
    torch.testing.assert_close(actual, expected)


class _Sum(nn.Module):
    def forward(self, x):
        return x.sum()


class MyReLU(nn.ReLU):
    pass


class MyNet(nn.Sequential):
    pass


def test_swap_leaves_subclasses_and_replaced_forwards_and_says_so():
    patched = nn.ReLU()
    patched.forward = torch.sigmoid
    model = nn.Sequential(MyReLU(), MyNet(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), patched)
    record = lab.swap(model, "eager")
    assert [type(module) for module in model] == [MyReLU, MyNet, nn.ReLU]
    assert type(model[1][1]) is lab.ReLU
    assert "left 0: MyReLU is a subclass of torch.nn.ReLU" in str(record)
    assert "left 2: its forward was replaced by hand" in str(record)
    assert model[2](torch.zeros(1)) == 0.5


def test_swap_again_changes_the_backend():
    model, _ = _model_and_inputs()
    lab.swap(model, "eager")
    record = lab.swap(model, None)
    assert len(record) == 5
    assert "backend was 'eager'" in str(record)
    assert model.relu.backend is None and model.head.backend is None


@pytest.mark.parametrize("bad", ["cuda", "", 3])
def test_swap_refuses_an_unknown_backend_and_changes_nothing(bad):
    model, _ = _model_and_inputs()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="backend"):
        lab.swap(model, bad)
    assert [type(module) for module in model.modules()] == kinds


def test_swap_refuses_an_unavailable_backend_and_changes_nothing(monkeypatch):
    def refuse(name, device, op):
        if op == "mse_loss":
            raise RuntimeError("mse_loss: backend 'extension' is not available")

    monkeypatch.setattr(lab, "select", refuse)
    model, _ = _model_and_inputs()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="not available"):
        lab.swap(model, "extension")
    assert [type(module) for module in model.modules()] == kinds


def test_swap_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="Module"):
        lab.swap([nn.ReLU()], "eager")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch.load(_saved(module), weights_only=False),
}


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_of_swapped_models_compute_the_same_and_share_nothing(backend, make_copy):
    model, inputs = _model_and_inputs()
    lab.swap(model, backend)
    expected = _gradients(model, inputs)
    other = make_copy(model)
    assert other.head.backend == other.relu.backend == backend and other.relu is other.again
    torch.testing.assert_close(_gradients(other, inputs), expected, rtol=0, atol=0)
    other.head[0].weight.data.zero_()
    torch.testing.assert_close(_gradients(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_of_the_modules_keep_their_options(backend, make_copy):
    relu = make_copy(lab.ReLU(inplace=True, backend=backend))
    assert type(relu) is lab.ReLU and relu.inplace and relu.backend == backend
    loss = make_copy(lab.MSELoss("sum", backend=backend))
    assert type(loss) is lab.MSELoss and (loss.reduction, loss.backend) == ("sum", backend)
    net = lab.TwoLayerNet(7, 5, 2, backend=backend)
    other = make_copy(net)
    assert type(other) is lab.TwoLayerNet and other.backend == backend
    x = torch.randn(3, 7)
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


def test_state_dicts_go_to_swapped_models_and_back():
    model, inputs = _model_and_inputs()
    swapped = copy.deepcopy(model)
    lab.swap(swapped, "eager")
    assert list(swapped.state_dict()) == list(model.state_dict())
    for source, target in ((model, swapped), (swapped, model)):
        with torch.no_grad():
            source.head[0].weight.add_(1)
        state = torch.load(_saved(source.state_dict()), weights_only=True)
        assert target.load_state_dict(state, strict=True)
        torch.testing.assert_close(target(*inputs), source(*inputs))


def test_swapped_models_compile():
    model, inputs = _model_and_inputs()
    name = "extension" if "extension" in USABLE else "eager"
    expected = model(*inputs)
    lab.swap(model, name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)


def test_a_slice_of_a_swapped_sequential_is_what_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model[:2](x)
    lab.swap(model, "eager")
    assert type(model[:2]) is torch.nn.Sequential and len(model[:-1]) == 2
    assert model[1:].state_dict().keys() == {"2.weight", "2.bias"}
    torch.testing.assert_close(model[:2](x), expected, rtol=0, atol=0)


def test_an_unknown_backend_is_refused_on_meta_too():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).to("meta")
    with pytest.raises(ValueError, match="unknown backend 'foo'"):
        lab.swap(model, "foo")
    assert type(model[1]) is torch.nn.ReLU
