"""Rows and result files. A file is replaced as a whole after every case, so nothing is lost."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from pyext.lab import roofline
from pyext.lab.cases import Case, floor_of
from pyext.lab.measure import Samples, speedup

SCHEMA = "pyext-lab/results/1"

COLUMNS = (
    "suite",
    "op",
    "direction",
    "shape",
    "dtype",
    "device",
    "outputs",
    "data",
    "variant",
    "kind",
    "clock",
    "status",
    "verified",
    "rel_err",
    "median_s",
    "p20_s",
    "p80_s",
    "interleaved_median_s",
    "alone_median_s",
    "samples",
    "calls_per_sample",
    "blocks",
    "disturbed_blocks",
    "retaken_blocks",
    "ratio_vs_eager",
    "ratio_ci",
    "paired",
    "verdict",
    "floor_s",
    "pct_of_floor",
    "above_ceiling",
    "bytes",
    "flops",
    "unit",
    "tf32",
    "reason",
)
"""Every row has these fields, in this order; ``docs/results.md`` says which may be null."""

FAILURES = ("wrong", "error")
_NUMBERS = re.compile(r"\[\s+([^\[\]{}\"]+?)\s+\]")


def new_row(case: Case, variant: str, kind: str, clock: str | None, status: str) -> dict[str, Any]:
    """A row without a time."""
    cost = case.cost
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "suite": case.op,
        "op": case.op,
        "direction": case.direction,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "device": case.device,
        "outputs": case.outputs,
        "variant": variant,
        "kind": kind,
        "clock": clock,
        "status": status,
        "verified": False,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "unit": cost.unit,
        "tf32": False if cost.unit == "matmul" else None,
    }
    return row


def fill_times(
    row: dict[str, Any],
    samples: Samples,
    alone: Samples | None,
    baseline: Samples | None,
    baseline_alone: Samples | None,
    seed: int,
) -> None:
    """Writes the times of a variant and its ratio to ``eager``.

    Everyone counts with the better of two times: interleaved with all others, and apart from them,
    where nothing can starve it or empty its caches.
    """
    best = _better(samples, alone)
    row |= {
        "median_s": best.median,
        "p20_s": best.quantile(0.2),
        "p80_s": best.quantile(0.8),
        "interleaved_median_s": samples.median,
        "alone_median_s": None if alone is None else alone.median,
        "samples": int(best.seconds.size),
        "calls_per_sample": best.calls_per_sample,
        "blocks": len(best.seconds),
        "disturbed_blocks": best.disturbed_blocks,
        "retaken_blocks": best.retaken_blocks,
    }
    if row["variant"] == "eager":
        row |= {"ratio_vs_eager": 1.0, "ratio_ci": [1.0, 1.0], "verdict": "baseline"}
    elif baseline is not None:
        reference = _better(baseline, baseline_alone)
        paired = best.run is not None and best.run == reference.run
        ratio = speedup(reference, best, paired=paired, seed=seed)
        row |= {
            "ratio_vs_eager": ratio.value,
            "ratio_ci": [ratio.low, ratio.high],
            "paired": paired,
            "verdict": ratio.verdict,
        }


def fill_floor(row: dict[str, Any], case: Case, ceilings: roofline.Ceilings) -> None:
    """Writes the floor of the row's case and how near to it the row comes."""
    row["floor_s"] = floor_of(case, row["clock"], ceilings)
    if row["median_s"] is not None:
        row["pct_of_floor"] = roofline.pct_of_floor(row["floor_s"], row["median_s"])
        row["above_ceiling"] = row["pct_of_floor"] > 100


def _better(samples: Samples, alone: Samples | None) -> Samples:
    """The samples with the lower median."""
    return samples if alone is None or samples.median <= alone.median else alone


class Results:
    """What a run has found so far, and the files in which it stands."""

    def __init__(self, folder: Path, environment: dict[str, Any], settings: dict[str, Any]):
        self.folder = Path(folder)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "complete": False,
            "interrupted": False,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "duration_s": None,
            "settings": settings,
            "environment": environment,
            "ceilings": None,
            "rows": [],
            "host_path": None,
            "mnist": None,
            "notes": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, finished ones only."""
        return self.data["rows"]

    @property
    def wrong_rows(self) -> list[dict[str, Any]]:
        """The rows of what failed its check."""
        return [row for row in self.rows if row["status"] in FAILURES]

    @property
    def failed(self) -> bool:
        """Whether any row is wrong, or the MNIST runs disagree."""
        return bool(self.wrong_rows) or (self.data["mnist"] or {}).get("failed", False)

    def save(self) -> None:
        """Replaces ``results.json`` and ``results.csv`` by what is known now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(self.data), indent=1, allow_nan=False)
        # Arrays of numbers on one line each: a curve has thousands.
        text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
        replace_file(self.folder / "results.json", text + "\n")
        write_csv(self.rows, self.folder / "results.csv")


def load(folder: Path) -> dict[str, Any]:
    """The contents of ``folder``'s result file.

    Raises:
        ValueError: it was written by another version of the lab.
        OSError: there is none.
    """
    data = json.loads((Path(folder) / "results.json").read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"the result file has schema {data.get('schema')!r}, not {SCHEMA!r}")
    return data


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line per row; a shape is written as 64x1000, an interval as its two ends."""
    ends = ["ratio_low", "ratio_high"]
    at = COLUMNS.index("ratio_ci")
    columns = [*COLUMNS[:at], *ends, *COLUMNS[at + 1 :]]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            low, high = row["ratio_ci"] or (None, None)
            shape = "x".join(map(str, row["shape"]))
            writer.writerow({**row, "shape": shape, "ratio_low": low, "ratio_high": high})
    os.replace(temporary, path)


def replace_file(path: Path, text: str) -> None:
    """Writes ``path`` so that it is always either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
