"""The parts of a small call: they add up, and each is where it belongs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from pyext import registry
from pyext.backends import BACKENDS
from pyext.lab import host_path, measure, report
from pyext.lab.cases import Inputs
from pyext.lab.measure import Effort, Samples
from pyext.ops import relu

EFFORT = Effort(warmup_s=0.002, measure_s=0.005, blocks=3)
FORWARD = {"checks", "dispatcher", "allocation", "kernel"}

pytestmark = pytest.mark.skipif(
    BACKENDS["extension"].unavailable("cpu") is not None,
    reason=f"extension on cpu: {BACKENDS['extension'].unavailable('cpu')}",
)


def take_apart(name: str) -> host_path.HostPath:
    op = registry.get(name)
    case = host_path.small_case(op, "float32", "cpu")
    assert max(case.shape) <= (4096 if len(case.shape) == 1 else 16)
    return host_path.host_path(case, Inputs(op, case, seed=0), "extension", EFFORT)


@pytest.mark.parametrize("name", registry.ops())
def test_the_parts_add_up_to_the_call(name):
    path = take_apart(name)
    parts = FORWARD if registry.get(name).is_step else set(host_path.PARTS)
    assert set(path.parts_s) == parts
    assert sum(path.parts_s.values()) == pytest.approx(path.call_s, rel=1e-9)
    assert path.call_s > 0 and path.eager_s > 0


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        ("checks", relu, "select_at_once"),
        ("function", "the shell", "forward"),
        ("allocation", torch, "empty_like"),
    ],
)
def test_what_a_part_costs_is_found_there_and_nowhere_else(monkeypatch, part, owner, name):
    if owner == "the shell":  # which is made when the backend is first used
        owner = type(relu.relu(torch.ones(1, requires_grad=True)).grad_fn)._forward_cls
    seconds, original = 0.0, getattr(owner, name)

    def costly(*args, **kwargs):
        nonlocal seconds
        seconds += 1.0
        return original(*args, **kwargs)

    def measured(subjects, *args, **kwargs):
        found = {}
        for subject in subjects:
            subject.prepare(1)
            before = seconds
            subject.call()
            found[subject.name] = Samples(np.array([[seconds - before]]), 1)
        return found

    monkeypatch.setattr(owner, name, costly)
    monkeypatch.setattr(measure, "measure", measured)
    parts = {each: value for each, value in take_apart("relu").parts_s.items() if value}
    # What is allocated is taken off the dispatcher's part, which did not pay for it here: the raw
    # ops allocate in C++.
    assert parts.pop(part) == 1.0
    expected = {}
    if part == "allocation":
        expected = {"dispatcher": -1.0, "backward dispatcher": -1.0, "backward allocation": 1.0}
    assert parts == expected


def test_the_report_shows_them():
    path = take_apart("relu").to_json()
    text = io.StringIO()
    data = {"rows": [], "mnist": None, "notes": [], "host_path": [path]}
    report.show(data, Console(file=text, width=150))
    shown = text.getvalue()
    assert "What a small call costs" in shown and "4096" in shown
    assert all(part in shown for part in host_path.PARTS)
    assert f"{1e6 * path['call_s']:.1f} µs" in shown
