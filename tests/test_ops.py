"""Every op on every backend and device: values, derivatives, layouts, dtypes and refusals.

All cases come from the registry. The reference is ``eager`` in float64; the tolerance is derived in
``pyext.lab.check``.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from support import (
    configurations,
    dtype_id,
    raw_ops,
    sample,
    samples,
    through,
    with_visible_step,
)

from pyext import functional, registry
from pyext.backends import BACKENDS, backends
from pyext.lab import check
from pyext.lab.host_path import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


def first_order_tier(op, sample_input) -> str | None:
    """Hundreds of elements are thousands of evaluations, 20 s in Triton's interpreter; and the
    reductions repeat the same network. Of the strides, two kinds stand for all."""
    unreduced = sample_input.kwargs.get("reduction") == "none" and op.name != "mse_loss"
    large = sample_input.name.startswith(("33x65", "odd", "2x3x5x4", "channels_last"))
    other_layout = sample_input.name.startswith(("contiguous", "sliced", "unaligned"))
    return "slow" if unreduced or large or other_layout else None


def second_order_tier(op, sample_input) -> str | None:
    """Second derivatives take seconds to minutes in Triton's interpreter: few by default."""
    if sample_input.name.startswith(("small", "no_bias", "5x7", "broadcast_", "vector")):
        return first_order_tier(op, sample_input)
    large = sample_input.name.startswith(("33x65", "2x3x5x4", "channels_last", "odd"))
    other_layout = len(op.shape_names) > 1 and sample_input.name != "transposed"
    return "exhaustive" if large or other_layout else "slow"


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("op", "index"), samples())
def test_agrees_with_eager_in_float64(op, index, dtype, backend, device):
    each = sample(op, index, device, dtype, requires_grad=not op.is_step)
    result = check.verify(op, through(op, backend), each.args, each.kwargs)
    assert result.ok, result.detail


@pytest.mark.later_when_interpreted
@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(
    ("op", "index"),
    samples(lambda op, each: not op.is_step and each.gradcheckable, first_order_tier),
)
def test_gradcheck(op, index, backend, device):
    function, leaves = _differentiable_call(op, index, backend, device)
    assert torch.autograd.gradcheck(
        function,
        leaves,
        nondet_tol=0.0,
        check_undefined_grad=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.later_when_interpreted
@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(
    ("op", "index"),
    samples(lambda op, each: not op.is_step and each.gradcheckable, second_order_tier),
)
def test_gradgradcheck(op, index, backend, device):
    """Reverse over reverse and forward over reverse."""
    function, leaves = _differentiable_call(op, index, backend, device)
    assert torch.autograd.gradgradcheck(
        function, leaves, nondet_tol=0.0, check_undefined_grad=True, check_fwd_over_rev=True
    )


def _differentiable_call(op, index, backend, device):
    """A function of the leaves alone, and the leaves.

    Finite differences move one element at a time, which an expanded leaf does not have: its compact
    base is the leaf, and the function expands it.
    """
    each = sample(op, index, device, torch.float64, requires_grad=True)
    leaves, rebuild = [], []
    for arg in each.args:
        if not torch.is_tensor(arg) or not arg.requires_grad:
            rebuild.append(lambda _, arg=arg: arg)
            continue
        narrow = tuple(slice(0, 1) if s == 0 else slice(None) for s in arg.stride())
        leaf = arg.detach()[narrow]
        leaf = (leaf.clone() if leaf.shape != arg.shape else leaf).requires_grad_()
        leaves.append(leaf)
        rebuild.append(lambda given, shape=arg.shape: next(given).expand(shape))

    def function(*given):
        given = iter(given)
        args = [make(given) for make in rebuild]
        return op.function(*args, **each.kwargs, backend=backend)

    return function, leaves


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(("op", "raw_op"), raw_ops())
def test_opcheck(op, raw_op, backend, device):
    overload = getattr(BACKENDS[backend].raw, raw_op.name).default
    cases = list(raw_op.samples(torch.device(device), torch.float32))
    assert cases
    # AOT dispatch traces a graph for every case, half a second each; shapes and strides that differ
    # take the same path there, so that one case stands for all.
    for number, args in enumerate(cases):
        tests = ["test_schema", "test_faketensor"]
        if number == 0:
            tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        copies = [each.clone() if torch.is_tensor(each) and op.is_step else each for each in args]
        torch.library.opcheck(overload, tuple(copies), test_utils=tests)


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(("op", "raw_op"), raw_ops())
def test_fake_has_the_strides_of_the_real_result(op, raw_op, backend, device):
    overload = getattr(BACKENDS[backend].raw, raw_op.name)
    for args in raw_op.samples(torch.device(device), torch.float32):
        real = overload(*args)
        fake = raw_op.fake(*args)
        for r, f in zip(_as_tuple(real), _as_tuple(fake), strict=True):
            assert _layout(r) == _layout(f)


def _layout(tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype


def _raw_ops_of(compute) -> list[str]:
    """The names of the extension's raw ops that a call runs, in order."""
    with Recorder("pyext") as recorder:
        compute()
    return [raw_op.__name__ for raw_op, _ in recorder.calls]


def _as_tuple(value):
    return () if value is None else value if isinstance(value, tuple) else (value,)


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
def test_mse_loss_forward_backward_is_forward_and_backward(dtype):
    (raw_op,) = registry.get("mse_loss").cpu_raw_ops
    raw = BACKENDS["extension"].raw
    one = torch.ones((), dtype=dtype)
    for args in raw_op.samples(torch.device("cpu"), dtype):
        results = raw.mse_loss_forward_backward(*args)
        separate = raw.mse_loss_forward(*args), raw.mse_loss_backward(one, *args)
        for real, fake, same in zip(results, raw_op.fake(*args), separate, strict=True):
            assert _layout(real) == _layout(fake)
            assert torch.equal(real.nan_to_num(), same.nan_to_num())
    args = next(raw_op.samples(torch.device("cpu"), dtype))
    torch.library.opcheck(raw.mse_loss_forward_backward.default, args)


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
def test_two_layer_backward_of_the_weights_alone_is_that_of_all(dtype):
    """What nothing else reads of the gradient of hidden lies as the next product packs it."""
    backward = BACKENDS["extension"].raw.two_layer_backward
    (raw_op,) = (each for each in registry.get("two_layer").raw_ops if "backward" in each.name)
    for args in raw_op.samples(torch.device("cpu"), dtype):
        *operands, _, _, _, _, _ = args
        _, *all_weights, _, _ = backward(*operands, *[True] * 5)
        for needs in ((True, True), (True, False), (False, True)):
            _, *weights, _, _ = backward(*operands, False, *needs, False, False)
            for needed, each, expected in zip(needs, weights, all_weights, strict=True):
                if needed:
                    torch.testing.assert_close(each, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
def test_two_layer_backward_weights_is_their_part_of_the_backward(dtype):
    (raw_op,) = registry.get("two_layer").cpu_raw_ops
    raw = BACKENDS["extension"].raw
    for args in raw_op.samples(torch.device("cpu"), dtype):
        grad_out, *others = args
        results = raw.two_layer_backward_weights(*args)
        needs = False, True, True, False, False
        _, *expected, _, _ = raw.two_layer_backward(grad_out, None, *others, *needs)
        for real, fake, same in zip(results, raw_op.fake(*args), expected, strict=True):
            assert _layout(real) == _layout(fake)
            torch.testing.assert_close(real, same, rtol=0, atol=0, equal_nan=True)
    args = next(raw_op.samples(torch.device("cpu"), dtype))
    torch.library.opcheck(raw.two_layer_backward_weights.default, args)
    other_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    for i, wrong in ((0, args[0][1:]), (1, args[1][:, 1:]), (4, args[4].to(other_dtype))):
        with pytest.raises(RuntimeError, match="two_layer_backward_weights"):
            raw.two_layer_backward_weights(*args[:i], wrong, *args[i + 1 :])


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize(
    ("need_grad", "biases", "backward"),
    [
        (("w1", "w2"), (), "two_layer_backward_weights"),
        (("x", "w1", "w2"), (), "two_layer_backward"),
        (("w2",), (), "two_layer_backward"),
        (("x",), (), "two_layer_backward"),
        (("w1", "w2"), ("b2",), "two_layer_backward"),
        (("w1", "w2", "b1"), ("b1",), "two_layer_backward"),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(value) or "none",
)
def test_two_layer_asks_for_what_is_needed(need_grad, biases, backward):
    """Neither an op that computes more than the gradients that are needed, nor one in vain."""
    shapes = {"x": (5, 4), "w1": (4, 3), "w2": (3, 2), "b1": (3,), "b2": (2,)}
    given = {
        name: torch.randn(shape, requires_grad=name in need_grad)
        for name, shape in shapes.items()
        if name[0] != "b" or name in biases
    }

    def out():
        return functional.two_layer(**given, backend="extension")

    needed = [given[name] for name in need_grad]
    assert _raw_ops_of(lambda: out().sum().backward()) == ["two_layer_forward", backward]
    assert all(each.grad is not None for each in needed)
    # The gradient of w2 is a function of hidden, which then needs a graph.
    first = _raw_ops_of(lambda: torch.autograd.grad(out().sum(), needed, create_graph=True))
    again = [] if biases or len(need_grad) == 1 else ["two_layer_forward"]
    assert first == ["two_layer_forward", *again, "two_layer_backward"]
    with torch.no_grad():
        assert _raw_ops_of(out) == ["two_layer_forward"]


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize(
    ("of_target", "options", "one_pass"),
    [
        ({}, {}, True),
        ({"dtype": torch.int64}, {"reduction": "sum"}, True),
        ({}, {"reduction": "none"}, False),
        ({"requires_grad": True}, {}, False),
    ],
    ids=["mean", "sum_integers", "none", "target_needs_grad"],
)
def test_mse_loss_computes_its_gradient_in_the_forward_pass(of_target, options, one_pass):
    """Where it saves a pass over memory; and nowhere where no backward can follow."""
    input, target = torch.ones(8, requires_grad=True), torch.zeros(8, **of_target)

    def loss(*tensors):
        return functional.mse_loss(*tensors, **options, backend="extension")

    two_passes = ["mse_loss_forward", "mse_loss_backward"]
    expected = ["mse_loss_forward_backward"] if one_pass else two_passes
    assert _raw_ops_of(lambda: loss(input, target).sum().backward()) == expected
    for no_backward in (torch.no_grad(), torch.inference_mode()):
        with no_backward:
            assert _raw_ops_of(lambda: loss(input, target)) == ["mse_loss_forward"]
    assert _raw_ops_of(lambda: loss(input.detach(), target.detach())) == ["mse_loss_forward"]


@pytest.mark.skipif("extension" not in backends(), reason="the extension was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_large_outputs_are_what_their_parts_are(dtype):
    """Beyond 16 MiB outputs are written past the caches, in tiles; smaller ones at once."""
    x = torch.randn(2**24 // dtype.itemsize + 77).to(dtype)[5:]
    target, grad = torch.randn_like(x), torch.randn_like(x)

    def results(x, target, grad):
        x = x.clone().requires_grad_()
        for name, args in (("relu", (x,)), ("mse_loss", (x, target, "none"))):
            out = registry.get(name).function(*args, backend="extension")
            yield from (out, *torch.autograd.grad(out, x, grad))
        loss = registry.get("mse_loss").function(x, target, "sum", backend="extension")
        yield from torch.autograd.grad(loss, x)

    def pooled(planes, grad):
        planes = planes.clone().requires_grad_()
        out = registry.get("relu_max_pool2d").function(planes, 2, backend="extension")
        return out, *torch.autograd.grad(out, planes, grad)

    planes = x[: len(x) // 1071 * 1071].view(-1, 51, 21)
    windows = grad[: len(planes) * 250].view(-1, 25, 10)
    whole_pool = pooled(planes, windows)
    parts_pool = zip(*map(pooled, planes.split(999), windows.split(999)), strict=True)
    for each, part in zip(whole_pool, parts_pool, strict=True):
        assert torch.equal(each, torch.cat(part))

    whole = results(x, target, grad)
    pieces = zip(*(each.split(2**18) for each in (x, target, grad)), strict=True)
    parts = zip(*(results(*piece) for piece in pieces), strict=True)
    for each, part in zip(whole, parts, strict=True):
        assert torch.equal(each, torch.cat(part))


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_error_inputs_are_refused_and_leave_everything_as_it_was(op, backend, device):
    cases = list(op.error_inputs(torch.device(device)))
    assert cases
    for case in cases:
        tensors = [each for each in case.args if torch.is_tensor(each) and not each.is_meta]
        before = [each.clone() for each in tensors]
        versions = [each._version for each in tensors]
        with warnings.catch_warnings(), pytest.raises(case.error_type, match=case.error_regex) as e:
            warnings.simplefilter("error")
            op.function(*case.args, **case.kwargs, backend=backend)
        assert type(e.value) is case.error_type, case.name
        # What is said in better words is not said in worse ones before.
        assert e.value.__suppress_context__ or e.value.__context__ is None, case.name
        message = str(e.value)
        assert len(message) < 400 and "\n" not in message, case.name
        for each, copy, version in zip(tensors, before, versions, strict=True):
            assert each._version == version, case.name
            torch.testing.assert_close(each, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused():
    nested = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(NotImplementedError, match="has layout nested"):
        functional.relu(nested)
    with pytest.raises(NotImplementedError, match="has layout nested"):
        functional.two_layer(torch.ones(5, 4), nested, torch.ones(3, 2))
    with pytest.raises(NotImplementedError, match="has layout nested"):
        functional.mse_loss(nested, nested)


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_inputs_are_left_alone(op, backend, device):
    for each in op.sample_inputs(torch.device(device), torch.float32):
        tensors = {i: arg for i, arg in enumerate(each.args) if torch.is_tensor(arg)}
        before = {i: arg.clone() for i, arg in tensors.items()}
        op.function(*each.args, **each.kwargs, backend=backend)
        updated = check._mutated(op) if op.is_step else set()
        for i, arg in tensors.items():
            if f"arg_{i}" not in updated:
                torch.testing.assert_close(arg, before[i], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_every_output_element_is_written_and_results_repeat(op, backend, device):
    """Twice in memory that held NaN and then ones: equal bit by bit means nothing was left over."""
    for each in op.sample_inputs(torch.device(device), torch.float32, not op.is_step):
        runs = []
        for garbage in (float("nan"), 1.0):
            poison = [torch.full((1 << size,), garbage, device=device) for size in range(2, 18)]
            del poison
            runs.append(check.call(op, through(op, backend), each.args, each.kwargs))
        for name, first in runs[0].items():
            if first is not None:
                torch.testing.assert_close(
                    runs[1][name], first, rtol=0, atol=0, equal_nan=True, msg=f"{each.name} {name}"
                )


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(("op", "raw_op"), raw_ops())
def test_nothing_outside_of_the_operands_is_read(op, raw_op, backend, device):
    """NaN lies around the operands and between their elements; one that is read spreads."""
    overload = getattr(BACKENDS[backend].raw, raw_op.name)
    for args in raw_op.samples(torch.device(device), torch.float32):
        results = []
        for surroundings in (0.0, float("nan")):
            copies = [_surrounded(each, surroundings) for each in args]
            results.append((*_as_tuple(overload(*copies)), *filter(torch.is_tensor, copies)))
        for clean, other in zip(*results, strict=True):
            torch.testing.assert_close(other, clean, rtol=0, atol=0, equal_nan=True)


def _surrounded(value, filler: float):
    """A copy with the same strides and the same offset to a 16-byte boundary, amid ``filler``."""
    if not torch.is_tensor(value) or not value.numel() or not value.is_floating_point():
        return value
    offset = 64 + value.data_ptr() % 16 // value.element_size()
    span = sum(s * (n - 1) for s, n in zip(value.stride(), value.shape, strict=True)) + 1
    filler = filler if value.is_floating_point() else int(filler != 0)  # integers know no NaN
    memory = value.new_full((offset + span + 64,), filler)
    copy = memory.as_strided(value.shape, value.stride(), offset)
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in value.stride())
    copy[once] = value[once]
    return copy


# For pooling: rows of two vectors and a rest in planes of odd extents, more than a thread's share;
# windows of another size. For the networks: beyond every block of the C++ product but that of
# depth; beyond that (1024) in each product, with so few rows for a thread that one's may take
# another path; no packing.
LARGE_SHAPES = {
    "n": [(200_003,)],
    "out": [
        (203, 700, 301, 37),
        (20, 1100, 1500, 16),
        (1100, 64, 100, 10),
        (1100, 9, 52, 3),
        (66, 301, 100, 10),
    ],
    "kernel": [(5, 7, 61, 75, 2), (3, 11, 41, 38, 3)],
    "steps": [(203, 700, 301, 37, 2)],
}


def on_thread_counts(compute) -> list:
    """What ``compute`` returns with each of several thread counts, more than cores included."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 16):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    return results


@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        pytest.param(op, shape, id=f"{op.name}-{'x'.join(map(str, shape))}")
        for op in registry.ops().values()
        for shape in LARGE_SHAPES[op.shape_names[-1]]
    ],
)
def test_large_result_is_right_and_does_not_depend_on_the_thread_count(op, shape, dtype):
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    inputs = op.benchmark_inputs(shape, dtype, "cpu", torch.Generator().manual_seed(0))
    args = with_visible_step(op, inputs)
    result = check.verify(op, through(op, "extension"), args)
    assert result.ok, result.detail
    results = on_thread_counts(lambda: check.call(op, through(op, "extension"), args))
    for other in results[1:]:
        for name, value in results[0].items():
            assert value is other[name] or torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
def test_gradients_of_all_of_a_network_do_not_depend_on_the_thread_count(dtype):
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    op = registry.get("two_layer")
    (args,) = (each.args for each in op.sample_inputs("cpu", dtype, True) if each.name == "panel")

    def compute():
        out = op.function(*args, backend="extension")
        return torch.autograd.grad(out, args, torch.ones_like(out))

    gradients = on_thread_counts(compute)
    for other in gradients[1:]:
        for gradient, same in zip(gradients[0], other, strict=True):
            assert torch.equal(gradient, same)


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_benchmark_inputs_verify(op, dtype, backend, device):
    """What the benchmarks time, at the smallest shape of each."""
    shape = min(op.benchmark_shapes[device]["quick"])
    if BACKENDS[backend].interpreted:
        shape = tuple(min(n, 96) for n in shape)
    generator = torch.Generator(device).manual_seed(0)
    inputs = op.benchmark_inputs(shape, dtype, torch.device(device), generator)
    args = with_visible_step(op, inputs)
    result = check.verify(op, through(op, backend), args)
    assert result.ok, result.detail


@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", registry.ops().values(), ids=lambda op: op.name)
def test_hand_written_peer_agrees(op, dtype):
    """``by_hand`` returns what autograd leaves behind."""
    shape = min(op.benchmark_shapes["cpu"]["quick"])
    generator = torch.Generator().manual_seed(0)
    inputs = op.benchmark_inputs(shape, dtype, torch.device("cpu"), generator)
    args = with_visible_step(op, inputs)
    if op.is_step:
        result = check.verify(op, op.by_hand, args)
        assert result.ok, result.detail
        return
    if op.timed_eager:
        grad = check.grad_output(args[0])
        results = dict(zip(("out", "grad_0"), op.by_hand(args[0].detach(), grad), strict=True))
        expected, improbable = op.timed_eager.expected(results, args, grad)
        assert check.compare(results, expected, op.reduction_length(*args)) and not improbable
        return
    double = [check._double(each) for each in args]
    out = op.eager(*double)
    leaves = [each for each in double if torch.is_tensor(each) and each.requires_grad]
    grad = () if out.dim() == 0 else (check.grad_output(out),)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, *grad)]
    detached = [each.detach() if torch.is_tensor(each) else each for each in args]
    actual = op.by_hand(*detached, *(each.to(dtype) for each in grad))
    names = [str(i) for i in range(len(expected))]
    result = check.compare(
        dict(zip(names, actual, strict=True)),
        dict(zip(names, expected, strict=True)),
        op.reduction_length(*args),
    )
    assert result.ok, result.detail


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("op", [each for each in registry.ops().values() if not each.is_step])
def test_a_gradient_of_any_strides_is_read_by_them(op, backend, device):
    """The upstream gradient transposed, and expanded from one element."""
    shapes = {"n": (35,), "out": (5, 4, 3, 7), "kernel": (1, 1, 10, 14, 2)}
    shape = shapes[op.shape_names[-1]]
    args = op.benchmark_inputs(shape, torch.float32, device, torch.Generator(device).manual_seed(0))
    if op.name == "mse_loss":
        args = (*(each.detach().view(5, 7).requires_grad_() for each in args[:2]), "none")
    elif op.name in ("dropout", "relu"):
        args = (args[0].detach().view(5, 7).requires_grad_(),)

    def gradients(function, grad):
        leaves = [each.detach().requires_grad_() for each in args if torch.is_tensor(each)]
        with check.same_random_numbers():
            out = function(*leaves, *(each for each in args if not torch.is_tensor(each)))
        return torch.autograd.grad(out, leaves, grad.expand(out.shape) if out.dim() else grad[0, 0])

    for grad in (torch.randn(7, 5).t(), torch.randn(1, 1), torch.randn(5, 1)):
        expected = gradients(op.eager, grad.to(device))
        actual = gradients(through(op, backend), grad.to(device))
        torch.testing.assert_close(actual, expected)
