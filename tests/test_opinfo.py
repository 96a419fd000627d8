"""PyTorch's own OpInfo entries for the namesakes: their samples and references, on every backend.

What the entries ask for and the lab's ops refuse is in ``DEVIATIONS``, and in the docstrings.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support import configurations, dtype_id, through

from pyext import registry
from pyext.lab import check

# PyTorch's helpers forbid the whole process to set flags such as TF32's; run.py, tested in the same
# process, does set them.
with mock.patch.object(torch.backends, "disable_global_flags"):
    op_db = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", exc_type=ImportError
    ).op_db

NAMESAKES = {"relu": "nn.functional.relu", "mse_loss": "nn.functional.mse_loss"}

DEVIATIONS = {
    ("relu", "inplace"): "no inplace: the lab's ops never write to their arguments",
    ("relu", "sparse"): "sparse layouts are refused",
    ("mse_loss", "weight"): "no weight",
    ("mse_loss", "size_average"): "no size_average, which PyTorch deprecates",
    ("mse_loss", "reduce"): "no reduce, which PyTorch deprecates",
}
"""(op, what of its entry) -> why it does not hold here. Keyword arguments go by their name."""

# The largest of PyTorch's reference inputs has 2^20 elements, which takes the interpreter seconds.
MOST_ELEMENTS = 1 << 16


def entry(op: registry.Op):
    """The OpInfo of the op's namesake."""
    (found,) = (each for each in op_db if each.name == NAMESAKES[op.name])
    return found


def cases() -> list:
    """(op, dtype) for every dtype that the namesake supports on any device."""
    return [
        pytest.param(registry.get(name), dtype, id=f"{name}-{dtype_id(dtype)}")
        for name in NAMESAKES
        for dtype in sorted(entry(registry.get(name)).dtypes, key=str)
    ]


def accepted(op: registry.Op, samples) -> list:
    """The samples but for those with a keyword argument of DEVIATIONS; there must be some."""
    kept = [
        each for each in samples if not any((op.name, name) in DEVIATIONS for name in each.kwargs)
    ]
    assert kept
    return kept


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(("op", "dtype"), cases())
def test_samples_agree_with_the_namesake(op, dtype, backend, device):
    """Values, gradients and dtypes. PyTorch itself rounds half-precision differences before it
    squares them, so both are held to the lab's tolerance and not to the same bits."""
    differentiable = dtype.is_floating_point
    info = entry(op)
    for each in accepted(op, info.sample_inputs(device, dtype, requires_grad=differentiable)):
        args = (each.input, *each.args)
        result = check.verify(op, through(op, backend), args, each.kwargs)
        assert result.ok, f"{result.detail}, for {each}"
        ours = check.call(op, through(op, backend), args, each.kwargs)
        theirs = check.call(op, info.op, args, each.kwargs)
        assert [each.dtype for each in ours.values()] == [each.dtype for each in theirs.values()]
        theirs = {name: value.double() for name, value in theirs.items()}
        result = check.compare(ours, theirs, op.reduction_length(*args, **each.kwargs))
        assert result.ok, f"{result.detail}, for {each}"


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize(("op", "dtype"), cases())
def test_reference_inputs_agree_with_the_reference(op, dtype, backend, device):
    """``ref`` is NumPy; PyTorch compares it in float64, and so does this."""
    info = entry(op)
    done = 0
    for each in accepted(op, info.reference_inputs(device, dtype)):
        args = (each.input, *each.args)
        if max(arg.numel() for arg in args) > MOST_ELEMENTS:
            continue
        done += 1
        ours = through(op, backend)(*args, **each.kwargs)
        assert ours.dtype == dtype
        expected = torch.as_tensor(info.ref(*map(_numpy, args), **each.kwargs), device=device)
        if dtype.is_floating_point:
            terms = op.reduction_length(*args, **each.kwargs)
            result = check.compare({"out": ours}, {"out": expected.double()}, terms)
            assert result.ok, f"{result.detail}, for {each}"
        else:
            assert torch.equal(ours, expected.to(dtype)), each
    assert done >= 6


def _numpy(tensor):
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy(force=True)


@pytest.mark.parametrize(("backend", "device"), configurations())
@pytest.mark.parametrize("name", NAMESAKES)
def test_error_inputs_are_refused(name, backend, device):
    """PyTorch 2.15 has none for either op; the refusals of a later one are held to, too."""
    op = registry.get(name)
    info = entry(op)
    if info.error_inputs_func is None:
        pytest.skip(f"PyTorch {torch.__version__} lists no error inputs for {info.name}")
    for error in info.error_inputs(device):
        each = error.sample_input
        with pytest.raises(error.error_type):
            through(op, backend)(each.input, *each.args, **each.kwargs)


@pytest.mark.parametrize(("name", "what"), DEVIATIONS, ids="-".join)
def test_deviations_are_real_and_documented(name, what):
    op = registry.get(name)
    _, _, documented = op.function.__doc__.partition("Deviations from the namesake:")
    assert what in documented
    x = torch.ones(2, 2)
    if what == "sparse":
        assert entry(op).supports_sparse
        with pytest.raises(NotImplementedError, match="layout"):
            op.function(x.to_sparse())
        return
    args = (x,) if name == "relu" else (x, x)
    with pytest.raises(TypeError, match=what):
        op.function(*args, **{what: True})
