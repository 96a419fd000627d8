"""Several threads, streams, graphs and processes at once: the same bits as one alone.

docs/autograd.md states what is promised.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from support import configurations, through, with_visible_step

from pyext import nn as lab
from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import check

ON_GPU = [each for each in configurations() if each.values[1] == "cuda"]
OPS = [pytest.param(op, id=op.name) for op in registry.ops().values()]
TWO_MINUTES = datetime.timedelta(minutes=2)
# By the last of the names in a shape.
SHAPES = {
    "n": (1001,),
    "out": (9, 20, 17, 5),
    "kernel": (2, 3, 12, 10, 2),
    "steps": (9, 20, 17, 5, 2),
}


def some_args(op: registry.Op, device: str, seed: int) -> tuple:
    """Small benchmark arguments, different for each seed."""
    shape = SHAPES[op.shape_names[-1]]
    generator = torch.Generator(device).manual_seed(seed)
    inputs = op.benchmark_inputs(shape, torch.float32, torch.device(device), generator)
    return with_visible_step(op, inputs)


def assert_same_bits(actual: check.Named, expected: check.Named) -> None:
    for name, value in expected.items():
        other = actual[name]
        assert value is other or torch.equal(value, other), name


@pytest.mark.parametrize(("backend", "device"), configurations(include_eager=True))
@pytest.mark.parametrize("op", OPS)
def test_threads_that_work_at_once_do_not_disturb_each_other(op, backend, device):
    threads, rounds = 4, 3 if BACKENDS[backend].interpreted else 20
    args = [some_args(op, device, seed) for seed in range(threads)]
    # (All threads draw from one generator.)
    kwargs = {"seed": torch.tensor(5, device=device)} if op.name == "dropout" else {}
    expected = [check.call(op, through(op, backend), each, kwargs) for each in args]
    start = threading.Barrier(threads)

    def work(number):
        start.wait()
        return [check.call(op, through(op, backend), args[number], kwargs) for _ in range(rounds)]

    with ThreadPoolExecutor(threads) as pool:
        for number, results in enumerate(pool.map(work, range(threads))):
            for result in results:
                assert_same_bits(result, expected[number])


@pytest.mark.parametrize(("backend", "device"), ON_GPU)
@pytest.mark.parametrize("op", OPS)
def test_kernels_run_on_the_current_stream(op, backend, device):
    """Its input is written late on the same stream, so that another stream would read NaN."""
    args = some_args(op, device, 0)
    expected = check.call(op, through(op, backend), args)
    late = [torch.full_like(a, torch.nan) if torch.is_tensor(a) else a for a in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        for to, value in zip(late, args, strict=True):
            if torch.is_tensor(to):
                to.copy_(value)
        late = [
            a.requires_grad_(b.requires_grad) if torch.is_tensor(a) else a
            for a, b in zip(late, args, strict=True)
        ]
        with torch.enable_grad():
            actual = check.call(op, through(op, backend), tuple(late))
    stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(("backend", "device"), ON_GPU)
@pytest.mark.parametrize("op", OPS)
def test_a_captured_graph_replays_with_new_inputs(op, backend, device):
    function = through(op, backend)
    given, other = some_args(op, device, 0), some_args(op, device, 1)
    static = [a.detach().clone() if torch.is_tensor(a) else a for a in given]

    def load(source):
        for to, value in zip(static, source, strict=True):
            if torch.is_tensor(to):
                to.copy_(value.detach())

    def run():
        leaves = [
            a.detach().requires_grad_(b.requires_grad) if torch.is_tensor(a) else a
            for a, b in zip(static, given, strict=True)
        ]
        out = function(*leaves)
        wanted = [a for a in leaves if torch.is_tensor(a) and a.requires_grad]
        grads = torch.autograd.grad(out, wanted, check.grad_output(out)) if wanted else ()
        return [out, *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # warms up: libraries and compiled kernels load outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    load(given)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = run()
    for source in (given, other):
        load(source)
        captured.replay()
        replayed = [each.clone() for each in (*results, *static) if torch.is_tensor(each)]
        load(source)
        expected = [each for each in (*run(), *static) if torch.is_tensor(each)]
        for ours, theirs in zip(replayed, expected, strict=True):
            assert torch.equal(ours, theirs)


def _network(backend: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3), torch.nn.ReLU()
    ).double()
    lab.swap(model, backend)
    return model


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    return x, torch.randn(8, 3, dtype=torch.float64, generator=generator)


def _gradients_of_one_rank(rank: int, port: int, backend: str, results) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TWO_MINUTES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TWO_MINUTES)
    model = torch.nn.parallel.DistributedDataParallel(_network(backend))
    x, y = (each.chunk(2)[rank] for each in _batch())
    lab.MSELoss(backend=backend)(model(x), y).backward()
    results.put((rank, [parameter.grad.numpy() for parameter in model.parameters()]))
    dist.destroy_process_group()
    # Without the interpreter's end: a thread of PyTorch's that still asks for the interpreter then
    # is ended within C++ ("terminate called without an active exception", seen twice under load).
    os._exit(0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")
def test_two_processes_get_the_gradients_of_one(monkeypatch):
    """DistributedDataParallel over gloo on the loopback, each with half of the batch."""
    backend = "eager" if BACKENDS["extension"].unavailable("cpu") else "extension"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    ranks = multiprocessing.spawn(
        _gradients_of_one_rank, (store.port, backend, results), nprocs=2, join=False
    )
    end = time.monotonic() + TWO_MINUTES.total_seconds()
    while not ranks.join(timeout=max(end - time.monotonic(), 0), grace_period=5):
        if time.monotonic() >= end:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the two processes did not finish within two minutes")
    x, y = _batch()
    model = _network("eager")
    torch.nn.MSELoss()(model(x), y).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for _ in range(2):
        rank, gradients = results.get()
        torch.testing.assert_close([torch.from_numpy(each) for each in gradients], expected)
