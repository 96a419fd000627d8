"""Test-wide setup: what is tested here, by how many processes, and Triton's interpreter.

On a machine without a GPU this process interprets Triton kernels, so that they are checked on CPU
tensors. With a GPU it compiles them, and ``test_triton.py`` interprets in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch

if importlib.util.find_spec("triton") and (
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
):
    # triton reads the variable while it is imported, before anything else may import it; then it
    # goes, so that the processes which tests start decide for themselves.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


# What was tuned on a machine is no part of the code that is tested there.
os.environ["PYEXT_TUNED"] = "0"

# Started in the background of a shell, this process ignores Ctrl-C, and so would those it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All the tests together are shared among a process per core: the interpreters use one each.

    Not where files, ``-n`` or a debugger were asked for, nor without pytest-xdist.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:  # this is such a process, and may start no others
        return
    option = config.option
    if (
        config.pluginmanager.hasplugin("xdist")
        and config.args_source is config.ArgsSource.TESTPATHS
        and option.numprocesses is None
        and not (option.usepdb or option.trace or option.collectonly)
    ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        option.dist = "worksteal"  # the longest tests are in one file
        # (The processes share a GPU's memory.)
        option.numprocesses = min(cores, 4) if torch.cuda.is_available() else cores
        os.environ.setdefault("OMP_NUM_THREADS", str(cores // option.numprocesses))


def pytest_report_header() -> list[str]:
    """What is tested, and what is not and why, before the first test."""
    from pyext.backends import BACKENDS

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for name, backend in BACKENDS.items():
        for device in backend.devices:
            reason = backend.unavailable(device)
            state = "interpreted" if backend.interpreted else "available"
            lines.append(f"{name} on {device}: {reason or state}")
    return lines


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``-m "slow or not slow"`` is the slow tier: exhaustive and large tests run only if named."""
    for item in items:
        if item.get_closest_marker("later_when_interpreted"):
            _move_to_a_later_tier(item)
    unnamed = [each for each in ("exhaustive", "large") if each not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unnamed))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _move_to_a_later_tier(item: pytest.Item) -> None:
    """One tier later in Triton's interpreter and the emulator; the smallest sample stays.

    A derivative of a network takes them from 5 s to minutes.
    """
    from pyext.backends import BACKENDS

    if not BACKENDS[item.callspec.params["backend"]].interpreted:
        return
    if item.get_closest_marker("slow"):
        item.add_marker("exhaustive")
    elif "-small" not in item.name:
        item.add_marker("slow")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
