"""Which backend computes a call, what is said when one cannot, and that a bare import works."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import pyext
import pyext.functional as P
from pyext import registry
from pyext.backends import BACKENDS, select

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_backends_lists_what_is_available_in_order_of_preference():
    found = pyext.backends("cpu")
    assert found[-1] == "eager"
    assert found == [each for each in ("extension", "eager") if each in found]
    assert "triton" not in found  # interpreted or unavailable on a CPU, never for real work


def test_argument_beats_context_beats_default():
    best = pyext.backends("cpu")[0]
    assert select(None, CPU, "relu").name == best
    with pyext.use_backend("eager"):
        assert select(None, CPU, "relu").name == "eager"
        assert select(best, CPU, "relu").name == best
    assert select(None, CPU, "relu").name == best


def test_use_backend_nests_and_survives_an_exception():
    with pyext.use_backend("eager"):
        with pytest.raises(KeyError), pyext.use_backend(pyext.backends()[0]):
            raise KeyError
        assert select(None, CPU, "relu").name == "eager"


def test_use_backend_is_per_thread():
    seen = []
    with pyext.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(select(None, CPU, "relu").name))
        thread.start()
        thread.join()
    assert seen == [pyext.backends("cpu")[0]]


def test_use_backend_none_is_as_outside_of_any_block():
    x = torch.ones(2, requires_grad=True)
    with pyext.use_backend("eager"), pyext.use_backend(None):
        assert type(P.relu(x).grad_fn) is type(P.relu(x, backend=pyext.backends()[0]).grad_fn)


@pytest.mark.parametrize("name", ["cuda", "", "Eager", 3])
def test_unknown_backend_is_a_value_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match="unknown backend .*'extension', 'triton', 'eager'"):
        P.relu(torch.ones(2), backend=name)
    with pytest.raises(ValueError, match="unknown backend"), pyext.use_backend(name):
        pass


def test_unavailable_backend_says_why():
    x = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="'extension' is not available for meta: the lab has no"):
        P.relu(x, backend="extension")
    assert P.relu(x).is_meta  # PyTorch's own op knows what to do
    if not torch.cuda.is_available():
        assert "GPU" in BACKENDS["eager"].unavailable("cuda") or torch.version.cuda is None


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_triton_on_a_cpu_needs_its_interpreter_and_says_so():
    pytest.importorskip("triton")
    code = "import torch, pyext.functional as P; P.relu(torch.ones(2), backend='triton')"
    done = run_python(code, TRITON_INTERPRET="")
    assert done.returncode == 1
    assert "start Python with TRITON_INTERPRET=1" in done.stderr
    assert run_python(code, TRITON_INTERPRET="1").returncode == 0


@pytest.mark.parametrize("name", ("extension", "extension-emulated"))
def test_raw_ops_are_there_in_a_process_that_has_used_nothing_else(name):
    if reason := BACKENDS[name].unavailable("cpu"):
        pytest.skip(reason)
    code = (
        "import torch; from pyext.backends import BACKENDS; "
        f"print(BACKENDS[{name!r}].raw.relu_forward(torch.tensor([-1.0, 2.0])).tolist())"
    )
    assert run_python(code).stdout == "[0.0, 2.0]\n"


def test_import_brings_neither_triton_nor_the_compiler():
    code = (
        "import sys, torch, pyext, pyext.functional as P, pyext.nn\n"
        "P.relu(torch.ones(2, requires_grad=True)).sum().backward()\n"
        "print([each for each in ('triton', 'torch._dynamo') if each in sys.modules])"
    )
    done = run_python(code, TRITON_INTERPRET="")
    assert done.stdout == "[]\n", done.stderr


def test_import_works_with_nothing_built_and_says_what_to_do(tmp_path):
    """A copy of the Python files alone: eager works, the extension says how to build it."""
    for path in (ROOT / "pyext").rglob("*.py"):
        copy = tmp_path / "pyext" / path.relative_to(ROOT / "pyext")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, pyext, pyext.functional as P\n"
        f"assert pyext.__file__.startswith({str(tmp_path)!r}), pyext.__file__\n"
        "assert pyext.backends() == ['eager'], pyext.backends()\n"
        "print(P.relu(torch.tensor([-1.0, 2.0])).tolist())\n"
        "P.relu(torch.ones(2), backend='extension')"
    )
    done = run_python(code)
    assert done.stdout == "[0.0, 2.0]\n", done.stderr
    assert "was not built" in done.stderr and "pip install -e ." in done.stderr


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3"])
def test_narrower_instruction_sets_agree(isa):
    """The other versions of the kernels in the binary, which this CPU would not choose."""
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    code = """
import torch
from pyext import registry
from pyext.lab import check
for op in registry.ops().values():
    for dtype in op.dtypes:
        for each in op.sample_inputs(torch.device("cpu"), dtype, requires_grad=not op.is_step):
            if each.kwargs.get("reduction", "sum") != "sum":
                continue
            def call(*args, **kwargs):
                return op.function(*args, **kwargs, backend="extension")
            result = check.verify(op, call, each.args, each.kwargs)
            assert result.ok, (op.name, dtype, each.name, result.detail)
"""
    done = run_python(code, "-W", "ignore", PYEXT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_every_op_is_written_three_ways_under_one_name():
    for name, op in registry.ops().items():
        assert op.name == name and op.function.__name__ == name
        for way in (f"kernels/{name}.py", f"csrc/cpu/{name}.cpp", f"csrc/cuda/{name}.cu"):
            assert (ROOT / way).is_file(), f"{name} lacks {way}"
    assert sorted(P.__all__) == list(registry.ops())
    with pytest.raises(ValueError, match="unknown op 'tanh'; the ops are .*mse_loss, relu"):
        registry.get("tanh")


def test_the_buffer_pool_can_be_emptied():
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    w1, w2 = torch.randn(784, 512), torch.randn(512, 10)
    P.two_layer(torch.randn(1024, 784), w1, w2, backend="extension")
    assert 0 < pyext.empty_buffer_pool() <= 256 << 20
    assert pyext.empty_buffer_pool() == 0
