"""Work in a process of its own: variants timed apart, or Triton checked in its interpreter.

The parent (:func:`stream`) sends one JSON request; the child (``python -m pyext.lab.isolated``)
answers with a JSON line once it has started, and one per case. If the request says so (``turns``),
it waits to be asked for each case, so that several children can take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from pyext import registry
from pyext.lab import cores, environment, measure
from pyext.lab.cases import ALLOCATED, PREALLOCATED, Case, Inputs, backend_variant
from pyext.lab.measure import Effort
from pyext.lab.peers import Peers
from pyext.lab.results import FAILURES
from pyext.lab.timing import Outcome, failed, time_case


class ProcessDied(RuntimeError):
    """A child ended otherwise than it should, and not for lack of time. Says how, as the rest of a
    sentence about the process."""


class _DiedWaiting(ProcessDied):
    """It died between two turns: the next case is not to blame."""


class _NeverStarted(ProcessDied):
    """It died before any case: no other variant or case would fare better."""


_APART = "in a process of its own"


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
        limit_s: after so many seconds, those included in which the caller does not ask for the
            next case, the process is stopped; finished cases have come by then.

    Yields:
        Each case with its outcomes. Where the process dies, each of the case's variants is tried
        once more, by itself, and those that die again have failed; another process goes on.
    """
    left = _countdown(limit_s)

    def request(jobs: Sequence[tuple[Case, Sequence[str]]]) -> dict[str, Any]:
        return {
            "task": "time",
            "cases": [case.to_json() for case, _ in jobs],
            "variants": [list(names) for _, names in jobs],
            "effort": asdict(effort),
            "seed": seed,
            "cores": cores.known(),
        }

    def outcomes(names: Sequence[str], answer: Any) -> list[Outcome]:
        if isinstance(answer, ProcessDied):
            return [failed(name, f"{_APART}, which {answer}") for name in names]
        found = [Outcome.from_json(each) for each in answer]
        for outcome in found:
            if outcome.status in FAILURES:
                outcome.reason = f"{_APART}: {outcome.reason}"
        return found

    for outputs, variables in ((ALLOCATED, {}), (PREALLOCATED, measure.RECYCLED_MEMORY)):
        group = [job for job in jobs if job[0].outputs == outputs]
        for (case, names), answer in _answers(group, request, variables, left):
            died = isinstance(answer, ProcessDied) and not isinstance(answer, _NeverStarted)
            if not died or len(names) == 1:
                yield case, outcomes(names, answer)
                continue
            found = []
            for name in names:
                for _, alone in _answers([(case, [name])], request, variables, left):
                    found += outcomes([name], alone)
            if left() <= 0:  # some may not have had their turn
                return
            yield case, found


def check_interpreted(
    cases: Sequence[Case], seed: int, limit_s: float | None = None
) -> Iterator[tuple[Case, Outcome]]:
    """Checks Triton's kernels on CPU tensors in Triton's interpreter; nothing is timed.

    Args:
        cases: small ones, for the interpreter runs a thousand times slower.
        seed: the run's.
        limit_s: as in :func:`time_apart`.

    Yields:
        Each case with its outcome, ``interpreted`` where the kernels are right; ``error`` where the
        process died, after which another one goes on.
    """

    def request(cases: Sequence[Case]) -> dict[str, Any]:
        return {"task": "check", "cases": [case.to_json() for case in cases], "seed": seed}

    left = _countdown(limit_s)
    for case, answer in _answers(cases, request, {"TRITON_INTERPRET": "1"}, left):
        if isinstance(answer, ProcessDied):
            yield case, failed("triton", f"in its interpreter's process, which {answer}")
        else:
            yield case, Outcome("triton", "backend", **answer)


def _countdown(limit_s: float | None) -> Callable[[], float]:
    """What gives the seconds that are left; infinity without a limit."""
    end = float("inf") if limit_s is None else time.monotonic() + limit_s
    return lambda: end - time.monotonic()


def _answers(
    jobs: Sequence[Any],
    request: Callable[[Sequence[Any]], dict[str, Any]],
    variables: Mapping[str, str],
    left: Callable[[], float],
) -> Iterator[tuple[Any, Any]]:
    """Each job with the answer to it, or with the death of the process that was at it.

    Args:
        jobs: what to ask for.
        request: makes the request for some of them; after a death another process gets the rest.
        variables: additions to the processes' environment.
        left: how many seconds there are; when they are up, the rest of the jobs is left out.
    """
    todo = list(jobs)
    while todo:
        asked = request(todo) | {"threads": torch.get_num_threads(), "turns": True}
        started = answered = False
        try:
            for answer in stream(asked, variables, left()):
                if started:
                    yield todo.pop(0), answer
                    answered = True
                started = True  # says the first line
            if todo and left() > 0:
                raise ProcessDied("ended before it had answered")
            return
        except ProcessDied as death:
            if not started:
                yield from ((job, _NeverStarted(str(death))) for job in todo)
                return
            # One that dies before it has answered anything might do so for ever.
            if todo and not (answered and isinstance(death, _DiedWaiting)):
                yield todo.pop(0), death


def stream(
    request: dict[str, Any],
    variables: Mapping[str, str] | None = None,
    limit_s: float | None = None,
    command: Sequence[str] = (sys.executable, "-m", "pyext.lab.isolated"),
) -> Iterator[dict[str, Any]]:
    """Runs a child on ``request`` and yields its answers as they come; ends when it ends.

    With ``turns`` in the request, it asks the child when the caller wants the next answer
    (:func:`wait_for_turn`), and otherwise takes what comes.

    Args:
        request: what :func:`receive` gives the child.
        variables: additions to its environment.
        limit_s: after so many seconds it is stopped.
        command: starts it.

    Raises:
        ProcessDied: it ended with a signal or an exit code other than 0, and not because of
            ``limit_s``.
    """
    errors = tempfile.TemporaryFile()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **(variables or {})},
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    out_of_time = threading.Event()

    def stop() -> None:
        out_of_time.set()
        child.kill()

    timer = None
    if limit_s is not None and limit_s < threading.TIMEOUT_MAX:
        timer = threading.Timer(max(limit_s, 0.0), stop)
        timer.daemon = True
        timer.start()

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the exit code tells how
            print(line, file=child.stdin, flush=True)

    try:
        say(json.dumps(request))
        was_gone = False  # when it was asked last
        for line in child.stdout:
            if line.endswith("\n"):  # else it died, or was stopped, while writing
                yield json.loads(line)
            if request.get("turns"):
                was_gone = child.poll() is not None
                say("")
        if child.wait() != 0 and not out_of_time.is_set():
            kind = _DiedWaiting if was_gone else ProcessDied
            raise kind(_death(child.returncode, errors))
    finally:
        if timer:
            timer.cancel()
        child.kill()
        child.wait()
        with contextlib.suppress(BrokenPipeError):  # what it was not there to read
            child.stdin.close()
        child.stdout.close()
        errors.close()


def _death(returncode: int, errors: BinaryIO) -> str:
    """How a process ended, as the rest of a sentence about it, with its last words."""
    if returncode < 0:
        names = {each.value: each.name for each in signal.Signals}
        text = f"was ended by {names.get(-returncode, f'signal {-returncode}')}"
    else:
        text = f"ended with exit code {returncode}"
    end = errors.seek(0, os.SEEK_END)
    errors.seek(max(end - 4096, 0))
    words = errors.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(words) if line.strip()), "")
    if not last or returncode == -signal.SIGKILL:  # somebody else's doing, it knew nothing of it
        return text
    # It may stand in a result file, which names nobody's folders.
    return f"{text}: {last[:200].replace(str(Path.home()), '~')}"


def receive() -> tuple[dict[str, Any], Callable[[str], None]]:
    """The child's side of :func:`stream`: its request, and what sends a line back."""
    global _from_parent
    # Whatever a library prints must not get between the answers, and what it reads not be a turn.
    answers, _from_parent = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return json.loads(_from_parent.readline()), lambda line: print(line, file=answers)


_from_parent: TextIO


def wait_for_turn() -> bool:
    """The child's side: waits until the parent wants the next answer; False if it is gone."""
    return bool(_from_parent.readline())


def main() -> None:
    """The child: reads a request from standard input and answers on standard output."""
    request, send = receive()
    torch.set_num_threads(request["threads"])
    environment.use_full_precision()
    send(json.dumps("started"))
    seed = request["seed"]
    cores.learn(request.get("cores", {}))
    peers, inputs, key = Peers(), None, None
    if any(case["outputs"] == PREALLOCATED for case in request["cases"]):
        measure.map_memory()
    for number, case in enumerate(map(Case.from_json, request["cases"])):
        if (case.op, case.shape, case.dtype) != key:
            key, inputs = (case.op, case.shape, case.dtype), None  # frees the last one's first
        if not wait_for_turn():
            return
        if inputs is None:
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
