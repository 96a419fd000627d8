"""The ``mnist`` suite: the backends inside a real training run, as a section of the result file.

``pyext.workloads.compare`` does the work; here it becomes rows, JSON and one sentence.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyext.backends import BACKENDS
from pyext.lab import environment, isolated
from pyext.lab.bench import OUT_OF_TIME, Progress, Section, Settings, interpreter_missing
from pyext.lab.results import COLUMNS
from pyext.workloads import compare, data

SUITE = "mnist"
# A step takes about a second in Triton's interpreter: one is enough to see that every swapped op
# runs in its place; the ops' own rows check them in depth.
_INTERPRETED_STEPS = {"quick": 1, "full": 20}
# They take about 8 s in the quick profile, on an idle machine.
_INTERPRETED_S, _LEAST_INTERPRETED_S = 8.0, 30.0
_INTERPRETED_CHECKS = (compare.check_relu_bitwise, compare.check_float64)


def run(settings: Settings, progress: Progress, limit_s: float | None = None) -> Section:
    """Compares the backends in the training of the MNIST networks.

    Args:
        settings: of the whole run.
        progress: called with what is going on.
        limit_s: the trainings are cut short to end in about so many seconds; None leaves nothing
            out.

    Returns:
        The section ``mnist`` of the result file, its rows, and notes for the reader.
    """
    progress("loading the data", 0.0)
    images, substitute = data.load_or_digits("mnist")
    # The terminal may show where the data was looked for, a result file must not.
    folder = str(data.data_root())
    notes = [] if substitute is None else [substitute.replace(folder, "the data folder")]
    device = settings.device
    names, rows = [], []
    interpreted = "triton" in settings.backends and device.type == "cpu"
    for name in settings.backends:
        reason = BACKENDS[name].unavailable(device)
        if name == "triton" and interpreted:
            reason = interpreter_missing()
            if not reason:
                continue  # below
            interpreted = False
        if reason:
            rows += [
                _row(each, name, settings, "unavailable", reason) for each in compare.WORKLOADS
            ]
        else:
            names.append(name)
    begin, training_s = time.monotonic(), limit_s
    if limit_s is not None and interpreted:
        training_s = limit_s - _INTERPRETED_S
    hyper = dataclasses.replace(compare.DEFAULTS, seed=settings.seed + 1)
    found = compare.run(
        images,
        names,
        device=device,
        profile=compare.PROFILES[settings.profile],
        hyper=hyper,
        limit_s=training_s,
        progress=progress,
    )
    section = _section(found, hyper)
    notes += _cut_short(found)
    if interpreted:
        progress("triton in its interpreter", 0.97)
        left_s = None if limit_s is None else begin + limit_s - time.monotonic()
        parity, death = _interpreted_parity(settings, left_s)
        section["parity"] += parity
        status, reason = "skipped", OUT_OF_TIME
        if death:
            status, reason = "error", f"in its interpreter's process, which {death}"
        for each in compare.WORKLOADS:
            answers = [check for check in parity if check["workload"] == each]
            if len(answers) < len(_INTERPRETED_CHECKS):
                rows.append(_row(each, "triton", settings, status, reason))
                notes.append(f"{each}, triton: not checked: {reason}.")
    section["failed"] = not all(each["ok"] for each in section["parity"])
    rows = _speed_rows(found, section, settings, rows) + rows
    networks = list(compare.WORKLOADS)
    rows.sort(key=lambda row: networks.index(row["op"]))
    return section, [row | {"data": found.data} for row in rows], notes


def _cut_short(found: compare.Comparison) -> Iterator[str]:
    """A note for each network whose training was cut short."""
    for curve in found.curves:
        if curve.cut_short and curve.backend == "eager":
            epochs = curve.tests[-1].epoch
            yield f"{curve.workload}: cut short after {epochs:.2g} epochs: {OUT_OF_TIME}."


def is_substitute(section: dict[str, Any] | None) -> bool:
    """Whether the networks were trained on other data than MNIST."""
    return section is not None and section["data"] != data.DATASETS[SUITE].title


def _section(found: compare.Comparison, hyper: Any) -> dict[str, Any]:
    """The comparison as JSON, with the numbers that answer at a glance beside the raw ones."""
    return {
        "data": found.data,
        "hyper_parameters": dataclasses.asdict(hyper),
        "parity": [dataclasses.asdict(each) for each in found.parity],
        "speed": [
            {
                **dataclasses.asdict(each),
                "steps_per_s": each.steps_per_s,
                "images_per_s": each.images_per_s,
            }
            for each in found.speed
        ],
        "shares": [{**dataclasses.asdict(each), "bound": each.bound} for each in found.shares],
        "curves": [
            {**dataclasses.asdict(each), "losses": [float(f"{loss:.6g}") for loss in each.losses]}
            for each in found.curves
        ],
    }


def _speed_rows(
    found: compare.Comparison,
    section: dict[str, Any],
    settings: Settings,
    earlier: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each timed variant, and for each that was wrong or only interpreted, unless one of
    the ``earlier`` rows says already what became of it."""
    rows = []
    for each in found.speed:
        row = _row(each.workload, each.backend, settings, "ok", None)
        low, high = each.ratio_ci
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
        row |= {
            "shape": [each.batch_size],
            "dtype": each.dtype,
            "clock": "host",
            "verified": True,
            "median_s": each.median_s,
            "p20_s": each.p20_s,
            "p80_s": each.p80_s,
            "interleaved_median_s": each.median_s,
            "samples": len(each.block_s),
            "calls_per_sample": each.steps // max(len(each.block_s), 1),
            "ratio_vs_eager": each.ratio_vs_eager,
            "ratio_ci": [low, high],
            "paired": None if each.backend == "eager" else True,
            "verdict": "baseline" if each.backend == "eager" else verdict,
        }
        rows.append(row)
    timed = {(each.workload, each.backend) for each in found.speed}
    told = {(row["op"], row["variant"]) for row in earlier}
    for workload, backend in dict.fromkeys(
        (each["workload"], each["backend"]) for each in section["parity"]
    ):
        checks = [
            each
            for each in section["parity"]
            if (each["workload"], each["backend"]) == (workload, backend)
        ]
        wrong = next((each for each in checks if not each["ok"]), None)
        mine = [row for row in rows if (row["op"], row["variant"]) == (workload, backend)]
        for row in mine:
            row["rel_err"] = _float64_distance(checks)
            if wrong:  # right before the timing, not after it: no time then
                kept = dict.fromkeys(("median_s", "p20_s", "p80_s", "interleaved_median_s"))
                row |= kept | dict.fromkeys(("ratio_vs_eager", "ratio_ci", "paired", "verdict"))
                row |= {"status": "wrong", "verified": False, "reason": wrong["detail"]}
        if (workload, backend) not in timed and (wrong or (workload, backend) not in told):
            status = "wrong" if wrong else "interpreted"
            row = _row(workload, backend, settings, status, wrong["detail"] if wrong else None)
            row |= {"shape": [checks[0]["batch_size"]], "verified": not wrong}
            rows.append(row | {"rel_err": _float64_distance(checks)})
    return rows


def _float64_distance(checks: list[dict[str, Any]]) -> float | None:
    return next((each["distance"] for each in checks if each["check"] == "float64"), None)


def _row(
    workload: str, backend: str, settings: Settings, status: str, reason: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    return row | {
        "suite": SUITE,
        "op": workload,
        "direction": "step",
        "shape": [compare.DEFAULTS.batch_size],
        "dtype": "float32",
        "device": str(settings.device),
        "outputs": "allocated",
        "variant": backend,
        "kind": "backend",
        "status": status,
        "verified": False,
        "tf32": False,
        "reason": reason,
    }


def _interpreted_parity(
    settings: Settings, left_s: float | None
) -> tuple[list[dict[str, Any]], isolated.ProcessDied | None]:
    """The parity checks of Triton's kernels, in a process that interprets them, and its death. With
    little time left they get half a minute all the same."""
    brief = settings.profile == "quick" or left_s is not None
    request = {"steps": _INTERPRETED_STEPS["quick" if brief else "full"]}
    request["threads"] = torch.get_num_threads()
    command = [sys.executable, str(Path(__file__).resolve())]
    variables = {"TRITON_INTERPRET": "1"}
    found: list[dict[str, Any]] = []
    try:
        limit_s = max(left_s or 0.0, _LEAST_INTERPRETED_S) if brief else None
        for answer in isolated.stream(request, variables, limit_s, command):
            found.append(answer)
    except isolated.ProcessDied as death:
        return found, death
    return found, None


def _child() -> None:
    request, answer = isolated.receive()
    torch.set_num_threads(request["threads"])
    environment.use_full_precision()
    images, _ = data.load_or_digits("mnist")
    steps = request["steps"]
    for workload in compare.WORKLOADS:
        for check in _INTERPRETED_CHECKS:
            found = check(
                workload,
                images,
                "triton",
                steps=steps,
                batch_size=compare.INTERPRETED_BATCH_SIZE,
            )
            answer(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    _child()
