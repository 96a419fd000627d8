"""Work in a process of its own: variants timed apart, or Triton checked in its interpreter.

The parent (:func:`stream`) sends one JSON request; the child (``python -m pyext.lab.isolated``)
answers with one JSON line per case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pyext import registry
from pyext.lab import environment, measure
from pyext.lab.cases import ALLOCATED, PREALLOCATED, Case, Inputs, backend_variant
from pyext.lab.measure import Effort
from pyext.lab.peers import Peers
from pyext.lab.timing import Outcome, time_case


def time_apart(
    jobs: Sequence[tuple[Case, Sequence[str]]],
    effort: Effort,
    seed: int,
    limit_s: float | None = None,
) -> Iterator[tuple[Case, list[Outcome]]]:
    """Times variants, those of a case interleaved, in processes where nothing else ever ran.

    Args:
        jobs: each case with the names of its variants; grouped by op, shape and dtype. Those with
            preallocated outputs come last, in a process of their own that recycles its memory.
        effort: how long to measure each.
        seed: the run's.
        limit_s: after so many seconds the process is stopped; finished cases have come by then.

    Yields:
        Each case with its outcomes.
    """
    begin = time.monotonic()
    for outputs, variables in ((ALLOCATED, {}), (PREALLOCATED, measure.RECYCLED_MEMORY)):
        group = [job for job in jobs if job[0].outputs == outputs]
        if not group:
            continue
        request = {
            "task": "time",
            "cases": [case.to_json() for case, _ in group],
            "variants": [list(names) for _, names in group],
            "effort": asdict(effort),
            "seed": seed,
            "threads": torch.get_num_threads(),
        }
        left = None if limit_s is None else limit_s - (time.monotonic() - begin)
        answers = stream(request, variables, left)
        for (case, _), answer in zip(group, answers, strict=False):
            yield case, [Outcome.from_json(each) for each in answer]


def check_interpreted(
    cases: Sequence[Case], seed: int, limit_s: float | None = None
) -> Iterator[tuple[Case, Outcome]]:
    """Checks Triton's kernels on CPU tensors in Triton's interpreter; nothing is timed.

    Args:
        cases: small ones, for the interpreter runs a thousand times slower.
        seed: the run's.
        limit_s: as in :func:`time_apart`.

    Yields:
        Each case with its outcome, ``interpreted`` where the kernels are right.
    """
    request = {
        "task": "check",
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
    if any(case["outputs"] == PREALLOCATED for case in request["cases"]):
        measure.map_memory()
    for number, case in enumerate(map(Case.from_json, request["cases"])):
        if (case.op, case.shape, case.dtype) != key:
            key, inputs = (case.op, case.shape, case.dtype), None  # frees the last one's first
            inputs = Inputs(registry.get(case.op), case, seed)
        if request["task"] == "time":
            names, effort = request["variants"][number], Effort(**request["effort"])
            outcomes = time_case(case, inputs, names, peers, effort, seed)
            answer = [outcome.to_json() for outcome in outcomes]
        else:
            answer = _check(case, inputs)
        send(json.dumps(answer))


def _check(case: Case, inputs: Inputs) -> dict[str, Any]:
    try:
        result = backend_variant("triton", inputs, case).verify(inputs)
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
