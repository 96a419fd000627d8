"""Work in a process of its own: a variant timed alone, or Triton checked in its interpreter.

The parent (:func:`stream`) sends one JSON request; the child (``python -m pyext.lab.isolated``)
answers with one JSON line per case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pyext import registry
from pyext.lab import environment
from pyext.lab.cases import Case, Inputs, backend_variant
from pyext.lab.measure import Effort, Samples
from pyext.lab.peers import Peers
from pyext.lab.timing import Outcome, time_case


def time_alone(
    variant: str, cases: Sequence[Case], effort: Effort, seed: int, limit_s: float | None = None
) -> Iterator[tuple[Case, dict[str, Samples]]]:
    """Times one variant on each case in a process where nothing else ever ran.

    Args:
        variant: a backend's or peer's name.
        cases: the cases, grouped by op, shape and dtype.
        effort: how long to measure each.
        seed: the run's.
        limit_s: after so many seconds the process is stopped; finished cases have come by then.

    Yields:
        Each case with its samples by clock; none where the variant was not right or not available.
    """
    request = {
        "task": "time",
        "variant": variant,
        "cases": [case.to_json() for case in cases],
        "effort": asdict(effort),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    for case, answer in zip(cases, stream(request, limit_s=limit_s), strict=False):
        yield (
            case,
            {
                clock: Samples(np.array(each["seconds"]), each["calls_per_sample"])
                for clock, each in answer["times"].items()
            },
        )


def check_interpreted(
    cases: Sequence[Case], seed: int, limit_s: float | None = None
) -> Iterator[tuple[Case, Outcome]]:
    """Checks Triton's kernels on CPU tensors in Triton's interpreter; nothing is timed.

    Args:
        cases: small ones, for the interpreter runs a thousand times slower.
        seed: the run's.
        limit_s: as in :func:`time_alone`.

    Yields:
        Each case with its outcome, ``interpreted`` where the kernels are right.
    """
    request = {
        "task": "check",
        "variant": "triton",
        "cases": [case.to_json() for case in cases],
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    answers = stream(request, {"TRITON_INTERPRET": "1"}, limit_s)
    for case, answer in zip(cases, answers, strict=False):
        yield case, Outcome("triton", "backend", **answer)


def stream(
    request: dict[str, Any],
    variables: Mapping[str, str] | None = None,
    limit_s: float | None = None,
    command: Sequence[str] = (sys.executable, "-m", "pyext.lab.isolated"),
) -> Iterator[dict[str, Any]]:
    """Runs a child on ``request`` and yields its answers as they come; ends when it ends.

    Args:
        request: what :func:`receive` gives the child.
        variables: additions to its environment.
        limit_s: after so many seconds it is stopped.
        command: starts it.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(variables or {})},
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    timer = threading.Timer(limit_s, child.kill) if limit_s is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        for line in child.stdout:
            yield json.loads(line)
    finally:
        if timer:
            timer.cancel()
        child.kill()
        child.wait()
        child.stdout.close()


def receive() -> tuple[dict[str, Any], Callable[[str], None]]:
    """The child's side of :func:`stream`: its request, and what sends a line back."""
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return json.load(sys.stdin), lambda line: print(line, file=answers)


def main() -> None:
    """The child: reads a request from standard input and answers on standard output."""
    request, send = receive()
    torch.set_num_threads(request["threads"])
    environment.use_full_precision()
    seed = request["seed"]
    peers, inputs, key = Peers(), None, None
    for case in map(Case.from_json, request["cases"]):
        if (case.op, case.shape, case.dtype) != key:
            key, inputs = (case.op, case.shape, case.dtype), None  # frees the last one's first
            inputs = Inputs(registry.get(case.op), case, seed)
        if request["task"] == "time":
            effort = Effort(**request["effort"])
            answer = _time(case, inputs, request["variant"], peers, effort, seed)
        else:
            answer = _check(case, inputs, request["variant"])
        send(json.dumps(answer))


def _time(case, inputs, variant, peers, effort, seed) -> dict[str, Any]:
    times = {}
    for outcome in time_case(case, inputs, [variant], peers, effort, seed):
        if outcome.status == "ok":
            times = {
                clock: {
                    "seconds": samples.seconds.tolist(),
                    "calls_per_sample": samples.calls_per_sample,
                }
                for clock, samples in outcome.times.items()
                if isinstance(samples, Samples)
            }
    return {"times": times}


def _check(case: Case, inputs: Inputs, variant: str) -> dict[str, Any]:
    try:
        result = backend_variant(variant, inputs, case).verify(inputs)
    except Exception as error:  # noqa: BLE001 -- one failed check must not hide the others
        reason = str(error).splitlines() or ["no message"]
        return {"status": "error", "reason": f"{type(error).__name__}: {reason[0]}"[:300]}
    status = "interpreted" if result.ok else "wrong"
    return {
        "status": status,
        "reason": None if result.ok else result.detail,
        "rel_err": result.rel_err,
    }


if __name__ == "__main__":
    main()
