"""A pytest plugin (``-p pyext.lab.mutants.witness``): says what ran, in a file, while it runs.

It is loaded from the scratch copy into the process that tests a mutant. The file named by
``PYEXT_WITNESS`` holds the test that is running (so that a crash or a hang has a name), the first
that failed, and which of the project's files and libraries the process has loaded, with hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

REPORT = "PYEXT_WITNESS"
FIRST = "PYEXT_WITNESS_FIRST"
"""Tests with one of these words in their name run first."""

_said: dict[str, Any] = {"running": None, "passed": 0, "failed": None, "message": ""}


def sha256(path: str | Path) -> str:
    """The hash of a file's contents."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def loaded() -> dict[str, str]:
    """Path -> hash of every module and library of the project that this process has loaded."""
    modules = (
        getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "pyext"
    )
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = (line.split(maxsplit=5)[5] for line in maps if line.count("/") and ".so" in line)
    libraries = (path for path in mapped if "/pyext/" in path or Path(path).name[:3] == "_C_")
    return {path: sha256(path) for path in sorted({*filter(None, modules), *libraries})}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = os.environ.get(FIRST, "").split()
    items.sort(key=lambda item: not any(word in item.nodeid for word in first))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _fail(report)


def pytest_collection_finish() -> None:
    _write(loaded=loaded())


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(running=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _fail(report)
    elif report.when == "call" and report.passed:
        _said["passed"] += 1


def pytest_sessionfinish() -> None:
    _write(running=None, loaded=loaded())


def _fail(report: pytest.CollectReport | pytest.TestReport) -> None:
    if _said["failed"] is None:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        _write(failed=report.nodeid, message=(message.strip() or "?").splitlines()[0][:300])


def _write(**changed: Any) -> None:
    _said.update(changed)
    path = Path(os.environ[REPORT])
    new = path.with_suffix(".new")
    new.write_text(json.dumps(_said))
    new.replace(path)
