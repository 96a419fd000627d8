"""A result file made readable: tables for the terminal, plots, and Markdown for the README.

Everything here reads the JSON only, so that ``python -m pyext.lab report DIR`` shows the same for a
file from another machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pyext.lab import plots

VARIANTS = (
    "eager",
    "extension",
    "triton",
    "eager-inplace",
    "compile",
    "compile-max",
    "graph",
    "jax",
)
"""The order in which variants are shown; unknown ones follow."""

Row = dict[str, Any]
_STYLES = {"faster": "green", "slower": "red", "no difference": "dim", "baseline": ""}
_FAILED = {"wrong": "WRONG", "error": "ERROR"}


def show(data: dict[str, Any], console: Console) -> None:
    """Prints everything: the long table, MNIST, what is missing, and the answer at a glance."""
    for part in _parts(data):
        console.print(part)


def write_plots(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the PNG plots beside the result file and returns their paths."""
    return plots.write(data, folder, VARIANTS)


def _parts(data: dict[str, Any]) -> Iterator[RenderableType]:
    rows = [row for row in data["rows"] if row["suite"] != "mnist"]
    if rows:
        yield _long_table(rows)
    if data["mnist"]:
        yield from _mnist_tables(data)
    yield from _remarks(data)
    if any(row["status"] == "ok" for row in rows):
        yield _glance(rows, data)


def variants_of(rows: Iterable[Row]) -> list[str]:
    """The variants that occur in ``rows``, in the order in which they are shown."""
    found = dict.fromkeys(row["variant"] for row in rows)
    known = [name for name in VARIANTS if name in found]
    return known + [name for name in found if name not in known]


def seconds(value: float | None) -> str:
    """Three significant digits and a unit: ``12.3 µs``."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{_three_digits(value / 1e-9)} ns"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float) -> str:
    return f"{_three_digits(value)}×"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{_three_digits(bounds[0])} – {_three_digits(bounds[1])}"


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def _case(row: Row) -> tuple:
    """What rows that are compared with one another have in common."""
    return row["op"], row["direction"], tuple(row["shape"]), row["dtype"], row["outputs"]


def _by_case(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((*_case(row), row["clock"]), []).append(row)
    return groups


def _long_table(rows: list[Row]) -> Table:
    """One line per case and variant, with everything that was measured."""
    table = Table(title="All measurements", title_style="bold", header_style="bold", box=None)
    table.add_column("op · direction · shape · dtype", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for title in ("median", "vs eager", "95 % interval", "% of floor"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("remark")
    several_clocks = len({row["clock"] for row in rows if row["clock"]}) > 1
    order = variants_of(rows)
    for group in _groups(rows):
        timed = sorted(
            (row for row in group if row["status"] not in ("unavailable", "skipped")),
            key=lambda row: (row["clock"] or "", order.index(row["variant"])),
        )
        for index, row in enumerate(timed):
            label = _label(row) if index == 0 else ""
            table.add_row(label, *_cells(row, several_clocks), end_section=index == len(timed) - 1)
    return table


def _groups(rows: list[Row]) -> Iterator[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(_case(row), []).append(row)
    yield from groups.values()


def _label(row: Row) -> str:
    text = f"{row['op']} · {row['direction']} · {_shape(row)} · {row['dtype']}"
    return text if row["outputs"] == "allocated" else f"{text} · {row['outputs']}"


def _cells(row: Row, several_clocks: bool) -> list[RenderableType]:
    name = f"{row['variant']} {row['clock']}" if several_clocks and row["clock"] else row["variant"]
    if row["status"] != "ok":
        style = "bold red" if row["status"] in _FAILED else "dim"
        return [name, "–", "–", "", "", Text(_remark(row), style=style)]
    style = _STYLES.get(row["verdict"], "")
    pct = "" if row["pct_of_floor"] is None else f"{row['pct_of_floor']:.0f} %"
    ratio = "1" if row["verdict"] == "baseline" else _ratio(row["ratio_vs_eager"])
    interval = "" if row["verdict"] == "baseline" else _interval(row["ratio_ci"])
    return [
        name,
        seconds(row["median_s"]),
        Text(ratio, style=style),
        Text(interval, style=style),
        Text(pct, style="yellow" if row["above_ceiling"] else ""),
        _remark(row),
    ]


def _remark(row: Row) -> str:
    if row["status"] in _FAILED:
        return f"{_FAILED[row['status']]}: {row['reason']}"
    if row["status"] == "interpreted":
        return "interpreted: checked, not timed"
    remarks = [row["note"]] if row["note"] else []
    if row["verdict"] == "no difference":
        remarks.append("no difference")
    if row["above_ceiling"]:
        remarks.append("above the ceiling: in the caches, or wrong")
    return "; ".join(remarks)


def _glance(rows: list[Row], data: dict[str, Any]) -> Table:
    """One line per case: eager's time, and each variant's ratio to it."""
    names = [name for name in variants_of(rows) if name != "eager"]
    names = [
        name
        for name in names
        if any(
            row["status"] not in ("unavailable", "skipped")
            for row in rows
            if row["variant"] == name
        )
    ]
    table = Table(
        title="At a glance: eager's time, and how many times faster than eager the others are",
        caption=_caption(data),
        title_style="bold",
        header_style="bold",
    )
    for title in ("op", "direction", "shape", "dtype"):
        table.add_column(title, no_wrap=title != "op")
    several_clocks = len({row["clock"] for row in rows if row["clock"]}) > 1
    if several_clocks:
        table.add_column("clock", no_wrap=True)
    for title in ("floor", "eager", *names):
        table.add_column(title, justify="right", no_wrap=True)
    checked = {
        (row["op"], row["direction"], row["dtype"])
        for row in rows
        if row["status"] == "interpreted"
    }
    last = None
    for (op, direction, _, dtype, outputs, clock), group in _by_case(rows).items():
        eager = next((row for row in group if row["variant"] == "eager"), None)
        by_name = {row["variant"]: row for row in group}
        if clock is None or eager is None:
            continue
        case = [op if op != last else "", direction, _shape(eager), dtype]
        if outputs != "allocated":
            case[1] += " (preallocated)"
        if several_clocks:
            case.append(clock)
        cells = []
        for name in names:
            row = by_name.get(name) or _without_clock(rows, eager, name)
            cells.append(_glance_cell(row, (op, direction, dtype) in checked and name == "triton"))
        floor = seconds(eager["floor_s"])
        table.add_section() if last not in (op, None) else None
        table.add_row(*case, floor, seconds(eager["median_s"]), *cells)
        last = op
    return table


def _without_clock(rows: list[Row], like: Row, name: str) -> Row | None:
    """The row of a variant that was not timed in ``like``'s case, for it has no clock."""
    return next(
        (
            r
            for r in rows
            if r["variant"] == name and r["clock"] is None and _case(r) == _case(like)
        ),
        None,
    )


def _glance_cell(row: Row | None, checked: bool) -> Text:
    if row is not None and row["status"] in _FAILED:
        return Text(_FAILED[row["status"]], style="bold red")
    if checked:
        return Text("checked", style="dim")
    if row is None or row["status"] != "ok" or row["ratio_vs_eager"] is None:
        return Text("–", style="dim")
    flag = "≈" if row["verdict"] == "no difference" else ""
    return Text(f"{flag}{_ratio(row['ratio_vs_eager'])}", style=_STYLES[row["verdict"]])


def _caption(data: dict[str, Any]) -> str:
    environment = data["environment"]
    return (
        f"{environment['device']}, {environment['threads']} threads, "
        f"PyTorch {environment['versions']['torch']}. Green is faster, red slower; "
        "≈ means that the interval contains 1; checked means verified in Triton's interpreter, "
        "where nothing is timed."
    )


def _mnist_tables(data: dict[str, Any]) -> Iterator[Table]:
    section = data["mnist"]
    title = f"Training on {section['data']}"
    table = Table(title=title, title_style="bold", header_style="bold")
    for column in ("network", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("step", "images/s", "vs eager", "95 % interval", "steps", "test accuracy"):
        table.add_column(column, justify="right")
    table.add_column("parity with eager")
    for row in (row for row in data["rows"] if row["suite"] == "mnist"):
        table.add_row(*_mnist_cells(row, section))
    yield table
    table = Table(title="How much can it matter at all?", title_style="bold", header_style="bold")
    for column in ("network", "share of an eager step that the swapped ops take", "hence at most"):
        table.add_column(column)
    for share in section["shares"]:
        ops = ", ".join(
            f"{op} {100 * s / share['step_s']:.1f} %" for op, s in share["op_s"].items()
        )
        bound = "–" if share["bound"] is None else _ratio(share["bound"])
        table.add_row(share["workload"], f"{100 * share['share']:.1f} % ({ops})", f"{bound} faster")
    yield table


def _mnist_cells(row: Row, section: dict[str, Any]) -> list[RenderableType]:
    checks = [
        each
        for each in section["parity"]
        if (each["workload"], each["backend"]) == (row["op"], row["variant"])
    ]
    verdict = "; ".join(
        f"{name} {'ok' if ok else 'FAILED'}"
        for name, ok in {
            each["check"]: all(c["ok"] for c in checks if c["check"] == each["check"])
            for each in checks
        }.items()
    )
    parity = Text(verdict or "–", style="bold red" if "FAILED" in verdict else "")
    if row["status"] != "ok":
        remark = _remark(row) or row["reason"] or row["status"]
        return [row["op"], row["variant"], Text(remark, style="dim"), *[""] * 5, parity]
    curve = next(
        (
            each
            for each in section["curves"]
            if (each["workload"], each["backend"]) == (row["op"], row["variant"])
        ),
        None,
    )
    last = curve["tests"][-1] if curve and curve["tests"] else None
    baseline = row["verdict"] == "baseline"
    style = _STYLES[row["verdict"]]
    return [
        row["op"],
        row["variant"],
        seconds(row["median_s"]),
        f"{row['shape'][0] / row['median_s']:,.0f}",
        Text("1" if baseline else _ratio(row["ratio_vs_eager"]), style=style),
        Text("" if baseline else _interval(row["ratio_ci"]), style=style),
        str(len(curve["losses"])) if curve else "–",
        f"{100 * last['accuracy']:.2f} %" if last else "–",
        parity,
    ]


def _remarks(data: dict[str, Any]) -> Iterator[Text]:
    """What is missing, and why: one line for each reason."""
    reasons: dict[tuple[str, str], None] = {}
    for row in data["rows"]:
        if row["status"] in ("unavailable", "skipped") and row["reason"]:
            reasons[row["variant"], row["reason"]] = None
    for variant, reason in reasons:
        yield Text(f"{variant}: {reason}", style="dim")
    for note in data["notes"]:
        yield Text(note, style="yellow")


# --- Markdown ------------------------------------------------------------------------------------


def markdown(data: dict[str, Any], directions: Sequence[str] | None = None) -> str:
    """The table for a README: one line per case, each cell a time, its ratio and its interval.

    Args:
        data: a result file's contents.
        directions: only these, such as ``("both", "step")``; all if None.
    """
    rows = [row for row in data["rows"] if row["suite"] != "mnist"]
    rows = [row for row in rows if directions is None or row["direction"] in directions]
    timed = [row for row in rows if row["status"] == "ok"]
    names = variants_of(timed)
    several_clocks = len({row["clock"] for row in timed}) > 1
    head = ["op", "direction", "shape", "dtype", *(["clock"] if several_clocks else []), *names]
    lines = [_line(head), _line(["---"] * len(head))]
    for (op, direction, _, dtype, outputs, clock), group in _by_case(timed).items():
        by_name = {row["variant"]: row for row in group}
        if outputs != "allocated":
            direction += f" ({outputs})"
        cells = [_markdown_cell(by_name.get(name)) for name in names]
        case = [f"`{op}`", direction, _shape(group[0]), dtype]
        lines.append(_line([*case, *([clock] if several_clocks else []), *cells]))
    lines += ["", *_markdown_mnist(data), _provenance(data)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    floor = "" if row["kind"] == "peer" else f", {row['pct_of_floor']:.0f} % of floor"
    if row["verdict"] == "baseline":
        return f"{seconds(row['median_s'])}{floor}"
    if row["verdict"] == "no difference":
        ratio = f"no difference ({_interval(row['ratio_ci'])})"
    else:
        ratio = f"**{_ratio(row['ratio_vs_eager'])}** ({_interval(row['ratio_ci'])})"
    return f"{seconds(row['median_s'])}, {ratio}{floor}"


def _markdown_mnist(data: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in data["rows"] if row["suite"] == "mnist" and row["status"] == "ok"]
    if not rows:
        return
    yield f"Training on {data['mnist']['data']}:"
    yield ""
    yield _line(["network", "backend", "step", "ratio to eager", "test accuracy"])
    yield _line(["---"] * 5)
    for row in rows:
        cells = [str(cell) for cell in _mnist_cells(row, data["mnist"])]
        yield _line([f"`{cells[0]}`", cells[1], cells[2], f"{cells[4]} {cells[5]}", cells[7]])
    yield ""
    for share in data["mnist"]["shares"]:
        if share["bound"] is not None:
            yield (
                f"In `{share['workload']}` the swapped ops take {100 * share['share']:.1f} % of an "
                f"eager step: no kernel of theirs could gain more than {_ratio(share['bound'])}."
            )
            yield ""


def _provenance(data: dict[str, Any]) -> str:
    environment = data["environment"]
    commit = environment["commit"]["hash"]
    dirty = " with changes" if environment["commit"]["dirty"] else ""
    source = f", commit {commit[:10]}{dirty}" if commit else ""
    return (
        f"Measured {data['started'][:10]} on {environment['device']} "
        f"({environment['threads']} threads), PyTorch {environment['versions']['torch']}{source}, "
        f"by `{environment['command']}`. Each cell: median, how many times faster than eager with "
        "its 95 % interval, and how near to the measured floor."
    )
