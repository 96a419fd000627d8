"""Options, cases and environment for ``pytest benchmarks``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyext import registry
from pyext.backends import backends
from pyext.lab import environment as lab_environment
from pyext.lab.bench import PROFILES
from pyext.lab.cases import Case, Inputs, cases
from pyext.lab.peers import PEERS, why_unavailable

_SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lab", "the lab's benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default=_default_device())
    group.addoption(
        "--all-shapes", action="store_true", help="all shapes of the quick profile, not one per op"
    )
    group.addoption(
        "--peers", default="eager-inplace", help=f"of {', '.join(PEERS)}; separated by commas"
    )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = torch.device(config.getoption("--device"))
    chosen = [name for name in config.getoption("--peers").split(",") if name]
    if unknown := [name for name in chosen if name not in PEERS]:
        raise pytest.UsageError(f"--peers does not know {unknown}; it accepts {', '.join(PEERS)}")
    peers = [name for name in chosen if why_unavailable(name, device) is None]
    pairs = [
        (case, name)
        for case in _cases(device, config.getoption("--all-shapes"))
        for name in ("eager", *(name for name in backends(device) if name != "eager"), *peers)
    ]
    ids = [f"{case.label.replace(' ', '-')}-{name}" for case, name in pairs]
    metafunc.parametrize(("case", "variant_name"), pairs, ids=ids)


def _cases(device: torch.device, all_shapes: bool) -> Iterator[Case]:
    for op in registry.ops().values():
        shapes = op.benchmark_shapes[device.type]["quick"]
        if not all_shapes:
            shapes = (min(shapes, key=lambda shape: op.cost(op.directions[-1], shape, 4).bytes),)
        yield from cases(op, device, PROFILES["quick"].dtypes[device.type], shapes)


@pytest.fixture(scope="session", autouse=True)
def full_precision() -> None:
    """As in ``run.py``: float32 means float32."""
    lab_environment.use_full_precision()


@pytest.fixture(scope="session")
def environment(request) -> dict:
    """The whole environment, described once."""
    return lab_environment.describe(
        request.config.getoption("--device"), _SEED, "pytest benchmarks"
    )


@pytest.fixture(autouse=True)
def environment_in_extra_info(request, environment) -> None:
    """Each benchmark carries the environment, as each result file does."""
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info["environment"] = environment


@pytest.fixture(scope="session")
def latest() -> dict[tuple, Inputs]:
    """The tensors that were made last; only those, for large ones fill the memory."""
    return {}


@pytest.fixture
def inputs(case: Case, latest: dict[tuple, Inputs]) -> Inputs:
    """The case's tensors, shared by all variants and directions of one op, shape and dtype."""
    key = (case.op, case.shape, case.dtype, case.device)
    if key not in latest:
        latest.clear()
        latest[key] = Inputs(registry.get(case.op), case, _SEED)
    return latest[key]
