"""By how many processes the tests run: what conftest.py decides for a plain ``pytest``."""

from __future__ import annotations

import os
from types import SimpleNamespace

import conftest
import pytest
import torch

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
EXPECTED = min(CORES, 4) if torch.cuda.is_available() else CORES


def asked(xdist=True, testpaths=True, **options) -> SimpleNamespace:
    """The options after ``conftest.pytest_cmdline_main`` has seen a command line."""
    defaults = {"numprocesses": None, "dist": "no"}
    defaults |= dict.fromkeys(("usepdb", "trace", "collectonly"), False)
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(hasplugin=lambda name: xdist),
        ArgsSource=pytest.Config.ArgsSource,
        args_source=getattr(pytest.Config.ArgsSource, "TESTPATHS" if testpaths else "ARGS"),
        option=SimpleNamespace(**defaults | options),
    )
    conftest.pytest_cmdline_main(config)
    return config.option


@pytest.fixture(autouse=True)
def controller(monkeypatch):
    """As if this were no worker, and the caller's shell had set nothing."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # (restored afterwards)
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_all_tests_are_shared_among_the_cores():
    option = asked()
    assert (option.numprocesses, option.dist) == (EXPECTED, "worksteal")
    assert os.environ["OMP_NUM_THREADS"] == str(CORES // EXPECTED)


def test_a_worker_starts_no_others(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert asked().numprocesses is None and "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    "how",
    [{"xdist": False}, {"testpaths": False}, {"usepdb": True}, {"collectonly": True}],
    ids=str,
)
def test_one_process_where_that_was_asked_for(how):
    option = asked(**how)
    assert (option.numprocesses, option.dist) == (None, "no")


def test_the_callers_number_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert asked(numprocesses=0).numprocesses == 0
    asked()
    assert os.environ["OMP_NUM_THREADS"] == "3"
