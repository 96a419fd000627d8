"""The C++ kernels' large outputs lie in a pool: used again when nobody has them, never before."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch.testing import assert_close

import pyext
import pyext.functional as P
from pyext.backends import BACKENDS

LARGE = 2**20 + 3
"""Float32 elements: 4 MiB, more than the least that the pool holds."""


@pytest.fixture(autouse=True)
def needs_the_extension():
    if reason := BACKENDS["extension"].unavailable("cpu"):
        pytest.skip(reason)
    pyext.empty_buffer_pool()
    yield
    pyext.empty_buffer_pool()


def relu(x: torch.Tensor) -> torch.Tensor:
    return P.relu(x, backend="extension")


def test_the_memory_of_a_large_output_is_used_again():
    x = torch.randn(LARGE)
    first = relu(x)
    address = first.data_ptr()
    second = relu(-x)
    assert second.data_ptr() != address
    assert_close(first, x.clamp(min=0))
    del first
    third = relu(x)
    assert third.data_ptr() == address
    assert_close(third, x.clamp(min=0))
    assert_close(second, (-x).clamp(min=0))


def test_no_more_than_its_bound_is_kept():
    outputs = [relu(torch.ones(2**24)) for _ in range(6)]  # 384 MiB
    del outputs
    assert pyext.empty_buffer_pool() == 256 << 20
    assert pyext.empty_buffer_pool() == 0


@pytest.mark.parametrize("hold", (lambda y: y[5:9], lambda y: y.view(-1, 1), lambda y: y.numpy()))
def test_what_still_looks_at_an_output_keeps_its_memory(hold):
    x = torch.randn(LARGE)
    y = relu(x)
    held = hold(y)
    before = torch.as_tensor(held).clone()
    address = y.data_ptr()
    del y
    others = [relu(torch.ones(LARGE)) for _ in range(3)]
    assert address not in [other.data_ptr() for other in others]
    assert_close(torch.as_tensor(held), before, rtol=0, atol=0)


def test_what_is_saved_for_backward_keeps_its_memory():
    x = torch.randn(LARGE, requires_grad=True)
    y = relu(x)
    loss = y.sum()
    del y
    others = [relu(torch.ones(LARGE)) for _ in range(3)]
    loss.backward()
    assert_close(x.grad, (x.detach() > 0).float(), rtol=0, atol=0)
    assert all(bool((other == 1).all()) for other in others)


def test_a_large_output_can_be_copied_saved_and_written_to():
    x = torch.randn(LARGE)
    expected = x.clamp(min=0)
    y = relu(x)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert_close(torch.load(file, weights_only=True), expected)
    assert_close(copy.deepcopy(y), expected)
    y.mul_(2)
    y.resize_(10, 10)  # smaller
    assert_close(y, 2 * expected[:100].view(10, 10))
    assert_close(relu(x), expected)


def test_it_does_not_grow_where_it_is():
    """The deviation: its memory belongs to the pool, so PyTorch cannot exchange it."""
    with pytest.raises(RuntimeError, match="not resizable"):
        relu(torch.randn(LARGE)).resize_(2 * LARGE)


def test_it_goes_to_shared_memory():
    x = torch.randn(LARGE)
    y = relu(x).share_memory_()
    assert y.is_shared()
    assert_close(y, x.clamp(min=0))


def test_the_strides_of_a_dense_input_are_kept():
    x = torch.randn(1031, 1021).t()
    y = relu(x)
    assert y.stride() == x.stride()
    assert_close(y, x.clamp(min=0))
    x = torch.randn(16, 64, 33, 33).to(memory_format=torch.channels_last)
    y = relu(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, x.clamp(min=0))


def test_threads_share_the_pool():
    """Each result is checked while others come and go; a block given to two would show."""
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> bool:
        value = float(seed + 1)
        x = torch.full((LARGE,), value)
        return all(bool((relu(x) == value).all()) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_a_step_asks_the_system_for_no_memory():
    """Its threads come to the pool all at once; none goes without."""
    import resource

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    x, y, w1, w2 = (torch.randn(s) for s in ((1024, 784), (1024, 10), (784, 512), (512, 10)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            P.two_layer_sgd_step(x, y, w1, w2, 1e-9, backend="extension")
        before = faults()
        for _ in range(50):
            P.two_layer_sgd_step(x, y, w1, w2, 1e-9, backend="extension")
        assert faults() - before < 50 * 3
    finally:
        torch.set_num_threads(threads)


NO_MEMORY = "allocate memory|out of memory|overflow"


@pytest.mark.parametrize("count", (2**50, 2**61 + 2**20))  # of float64: the second in no int64
def test_what_no_memory_can_hold_is_refused_as_by_pytorch(count):
    x = torch.zeros(1, dtype=torch.float64).expand(count)
    relu(torch.ones(LARGE))  # a block that is kept
    for call in (
        lambda: P.dropout(x, 0.5, True, backend="extension"),
        lambda: P.mse_loss(x, x, reduction="none", backend="extension"),
    ):
        with pytest.raises(RuntimeError, match=NO_MEMORY):
            call()
    # What the system has no memory for is asked for again without what is kept; the other never.
    assert (pyext.empty_buffer_pool() == 0) == (count == 2**50)
