"""What is special to the Triton kernels: tiles and splits, rounding, registration.

That they agree with ``eager`` is tested with the other backends in test_ops.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from support import configurations, dtype_id, raw_ops, through, with_visible_step

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab.check import verify
from pyext.lab.small_tiles import SHAPES, small_tiles

pytest.importorskip("triton", reason="Triton is not installed")

TRITON = BACKENDS["triton"]
DEVICES = [
    pytest.param(parameter.values[1], id=parameter.id, marks=parameter.marks)
    for parameter in configurations()
    if parameter.values[0] == TRITON.name
]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_import_pyext_imports_no_triton():
    code = "import sys, pyext, pyext.kernels, pyext.functional; print('triton' in sys.modules)"
    assert run_python(code) == "False"


@pytest.mark.parametrize(("op", "raw_op"), raw_ops())
def test_schema_is_that_of_the_compiled_op(op, raw_op):
    if reason := BACKENDS["extension"].unavailable("cpu", op.name):
        pytest.skip(reason)
    ours = str(getattr(TRITON.raw, raw_op.name).default._schema)
    compiled = str(getattr(BACKENDS["extension"].raw, raw_op.name).default._schema)
    assert ours.removeprefix("pyext_triton::") == compiled.removeprefix("pyext::")


def test_torch_compile_sees_the_kernels_of_every_raw_op():
    """Not in Triton's interpreter, hence in a process of its own."""
    code = """
from pyext import registry
from pyext.backends import BACKENDS
from torch._library.triton import get_triton_kernels_for_op
raw = BACKENDS["triton"].raw
names = [raw_op.name for op in registry.ops().values() for raw_op in op.raw_ops]
print([name for name in names if not get_triton_kernels_for_op(f"pyext_triton::{name}")])
"""
    assert run_python(code, TRITON_INTERPRET="0") == "[]"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", registry.FLOATING_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", registry.ops().values(), ids=registry.ops())
def test_many_tiles_and_split_sums(op, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    shape = SHAPES[op.shape_names[-1]]
    inputs = op.benchmark_inputs(shape, dtype, torch.device(device), generator)
    args = with_visible_step(op, inputs)
    with small_tiles():
        result = verify(op, through(op, "triton"), args)
    assert result, result.detail


@pytest.fixture
def fences(monkeypatch):
    """Puts every new tensor between two fences; yields a function that places one there, and says
    whether all fences still stand."""
    buffers = []
    empty = torch.empty

    def fenced(tensor):
        fence = 64
        buffer = empty(tensor.numel() + 2 * fence, dtype=tensor.dtype, device=tensor.device)
        buffer.fill_(77)
        inside = buffer[fence : fence + tensor.numel()]
        buffers.append((buffer, fence, tensor.numel()))
        # Fresh tensors are dense, so their strides fit the same number of elements.
        return inside.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def stand():
        return all(
            bool((buffer[:fence] == 77).all()) and bool((buffer[fence + n :] == 77).all())
            for buffer, fence, n in buffers
        )

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fenced(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fenced(new_empty(*a, **k)))
    yield fenced, stand
    assert buffers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "raw_op"), raw_ops())
def test_nothing_is_written_outside_the_results(op, raw_op, device, fences):
    fenced, stand = fences
    call = getattr(TRITON.raw, raw_op.name)
    for args in raw_op.samples(torch.device(device), torch.float32):
        if op.is_step:  # its arguments are results
            args = [fenced(each.contiguous()) if torch.is_tensor(each) else each for each in args]
        with small_tiles():
            call(*args)
        assert stand(), [tuple(each.shape) for each in args if torch.is_tensor(each)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=dtype_id)
def test_results_are_rounded_to_nearest_even(dtype, device):
    """Triton's interpreter truncates bfloat16; the kernels must round in both modes."""
    x = torch.randn(4096, device=device).to(dtype)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    squared = TRITON.raw.mse_loss_forward(x, torch.zeros_like(x), 0)
    expected = x.float().square().to(dtype)
    assert torch.equal(squared.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
def test_learning_rate_is_not_rounded_to_float32(device):
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    w1, w2 = one.clone(), one.clone()
    TRITON.raw.two_layer_sgd_step(one, 2 * one, w1, w2, 0.1)  # each gradient is 2 (1 - 2) = -2
    assert abs(w1.item() - 1.2) < 1e-15 and abs(w2.item() - 1.2) < 1e-15


@pytest.mark.parametrize("device", DEVICES)
def test_raw_ops_refuse_what_would_read_out_of_bounds(device):
    x, w1, w2 = (torch.ones(s, device=device) for s in ((5, 4), (4, 3), (3, 2)))
    y = torch.ones(5, 2, device=device)
    raw = TRITON.raw
    for name, call in {
        "w1": lambda: raw.two_layer_forward(x, w1[:3], w2, None, None),
        "w2": lambda: raw.two_layer_forward(x, w1, w2.double(), None, None),
        "b2": lambda: raw.two_layer_forward(x, w1, w2, None, w1[0]),
        "y": lambda: raw.two_layer_sgd_step(x, y[:4], w1, w2, 0.1),
        "target": lambda: raw.mse_loss_forward(x, x[:4], 1),
        "grad": lambda: raw.relu_backward(x[:4], x),
        "relu_max_pool2d_backward: grad": lambda: raw.relu_max_pool2d_backward(
            x, x.byte(), (2, 2), (2, 2), (0, 0), 12, 9
        ),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected shape"):
            call()
    assert w1.eq(1).all() and w2.eq(1).all()
    for seed in (torch.tensor([1, 1]), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="seed must be one int64"):
            raw.dropout_seeded(x, seed.to(device), 1, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU this process interprets")
def test_interpreted_on_a_machine_with_a_gpu():
    """There this process compiles the kernels, so the interpreted checks get one of their own."""
    folder = os.path.dirname(__file__)
    files = [os.path.join(folder, name) for name in ("test_ops.py", "test_triton.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton-cpu", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
