"""torch.compile(fullgraph=True), forward and backward: no graph break, and no second compilation.

``aot_eager`` traces and differentiates as the default compiler does and then runs PyTorch's ops, so
it tells in seconds what concerns the ops; the default compiler's turn is in the slow tier.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._inductor.config
from support import configurations, through, with_visible_step
from torch._dynamo.testing import CompileCounterWithBackend

import pyext
from pyext import functional, registry
from pyext.backends import BACKENDS
from pyext.lab import check

CONFIGURATIONS = configurations()
OPS = [pytest.param(op, id=op.name) for op in registry.ops().values()]
# By the last of a shape's names. Without 0 and 1, which torch.compile always takes for constants.
SIZES = {
    "n": ((64,), (100,), (33,)),
    "out": ((6, 9, 7, 5), (11, 4, 13, 3), (2, 17, 8, 12)),
    "kernel": ((6, 3, 8, 10, 2), (11, 2, 9, 7, 2), (3, 4, 6, 12, 2)),
    # One learning rate, which batch x hidden decides, and one number of steps: both are constants.
    "steps": ((6, 9, 7, 5, 2), (14, 4, 3, 3, 2), (2, 17, 21, 12, 2)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    # The seed that dropout draws is then the one that it draws uncompiled.
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch.compiler.reset()


def inputs(op: registry.Op, device: str) -> list[tuple]:
    """Arguments of several sizes."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        with_visible_step(
            op, op.benchmark_inputs(shape, torch.float32, torch.device(device), generator)
        )
        for shape in SIZES[op.shape_names[-1]]
    ]


def verify_without_recompiling(op, function, cases, counter):
    """All cases are right, and only the first compiles anything."""
    compilations = []
    for args in cases:
        result = check.verify(op, function, args)
        assert result.ok, result.detail
        compilations.append(counter.frame_count)
    assert compilations[0] and len(set(compilations)) == 1, compilations


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", OPS)
def test_other_sizes_need_no_other_compilation(op, backend, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through(op, backend), backend=counter, fullgraph=True, dynamic=True)
    verify_without_recompiling(op, compiled, inputs(op, device), counter)


@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", OPS)
def test_a_dimension_marked_dynamic_stays_so(op, backend, device):
    """``mark_dynamic`` raises where an op would make a constant of the batch size."""
    function = through(op, backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    first = inputs(op, device)[0]
    batched = ("x", "y", "input", "target", "param", "grad", "square_avg", "acc_delta")
    names = op.eager.__code__.co_varnames

    def mark(*args):
        for name, arg in zip(names, args, strict=False):
            if name in batched:
                torch._dynamo.mark_dynamic(arg, 0)
        return compiled(*args)

    def of_rows(rows):
        """The first arguments with another batch."""
        return tuple(
            arg.detach()[:1].repeat(rows, *(1,) * (arg.dim() - 1)).requires_grad_(arg.requires_grad)
            if name in batched
            else arg
            for name, arg in zip(names, first, strict=False)
        )

    verify_without_recompiling(op, mark, [first, of_rows(2), of_rows(12)], counter)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
@pytest.mark.parametrize("op", OPS)
def test_the_default_compiler_neither_breaks_nor_compiles_again(op, backend, device):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(through(op, backend), backend=counter, fullgraph=True, dynamic=True)
    verify_without_recompiling(op, compiled, inputs(op, device), counter)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), CONFIGURATIONS)
def test_a_compiled_step_of_several_ops_follows_eager(backend, device):
    """The ops between PyTorch's own, under autocast, with the backward in the same graph."""
    import pyext.functional as P

    def loss(x, y, w1, w2):
        with torch.autocast(device, torch.bfloat16):
            hidden = P.relu(x @ w1, backend=backend)
            return P.mse_loss(hidden @ w2, y, "sum", backend=backend).tanh()

    leaves = [
        torch.randn(s, device=device).mul_(0.1).requires_grad_()
        for s in ((6, 9), (6, 4), (9, 5), (5, 4))
    ]
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (compiled, loss):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.01)  # bfloat16 rounds to 0.008


# What has no address while it is traced cannot be seen to share memory or to be a negated view; the
# single step's raw op sees the former when it runs.
UNSEEN = {
    "two_layer_sgd_step": ("same_weight", "negated", "negated_x"),
    "two_layer_sgd_steps": (
        "step_same_weight",
        "step_overlapping",
        "step_overlapping_x",
        "step_interleaved",
        "step_negated",
        "step_negated_x",
    ),
    "adadelta_step": ("overlapping", "averages_are_one", "param_is_grad"),
}


@pytest.mark.parametrize("op", OPS)
def test_what_is_refused_is_refused_alike_when_compiled(op):
    for case in op.error_inputs(torch.device("cpu")):
        if case.name in UNSEEN.get(op.name, ()):
            continue
        torch.compiler.reset()
        compiled = torch.compile(op.function, backend="eager")
        with warnings.catch_warnings(), pytest.raises(case.error_type, match=case.error_regex):
            warnings.simplefilter("ignore")
            compiled(*case.args, **case.kwargs)


@pytest.mark.parametrize(
    "op", [pytest.param(op, id=op.name) for op in registry.ops().values() if not op.is_step]
)
def test_an_exported_program_holds_the_raw_op(op):
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return op.function(*args)

    shape = op.benchmark_shapes["cpu"]["quick"][0]
    args = op.benchmark_inputs(shape, torch.float32, "cpu", torch.Generator().manual_seed(0))
    program = torch.export.export(Module(), args, strict=False)
    (name,) = {str(node.target) for node in program.graph.nodes if "pyext" in str(node.target)}
    assert "forward_backward" not in name  # a gradient that no backward may ever ask for
    torch.manual_seed(0)
    expected = op.function(*args)
    torch.manual_seed(0)
    torch.testing.assert_close(program.module()(*args), expected)


def test_a_compiled_function_follows_use_backend():
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def function(x):
        return functional.relu(x)

    x = torch.randn(5)
    function(x)
    with pyext.use_backend("eager"):
        function(x)
    function(x)
    assert ["pyext" in graph for graph in graphs] == [True, False]
