"""A result file made readable: tables for the terminal, plots, and Markdown for the README.

Everything here reads the JSON only, so that ``python -m pyext.lab report DIR`` shows the same for a
file from another machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pyext.lab import host_path, plots

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
_NOT_SHOWN = ("unavailable", "skipped", "interpreted")


def show(data: dict[str, Any], console: Console) -> None:
    """Prints everything: the long table, MNIST, what is missing, and the answer at a glance."""
    for part in _parts(data):
        console.print(part)
    rows = [row for row in data["rows"] if row["suite"] != "mnist"]
    if any(row["status"] == "ok" for row in rows):
        # With times, intervals and floors where the terminal is wide enough for them.
        detailed = _glance(rows, data, detailed=True)
        unbounded = console.options.update(max_width=10_000)
        fits = Measurement.get(console, unbounded, detailed).maximum <= console.width
        console.print(detailed if fits else _glance(rows, data))


def write_plots(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the PNG plots beside the result file and returns their paths."""
    return plots.write(data, folder, VARIANTS)


def _parts(data: dict[str, Any]) -> Iterator[RenderableType]:
    rows = [row for row in data["rows"] if row["suite"] != "mnist"]
    if rows:
        yield from _long_table(rows)
    if data.get("host_path"):  # (older files have none)
        yield _host_path(data["host_path"])
    if data["mnist"]:
        yield from _mnist_tables(data)
    yield from _remarks(data)


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


def _long_table(rows: list[Row]) -> Iterator[RenderableType]:
    """Everything that was measured: a line per variant, under a line per case."""
    yield Text("All measurements", style="bold")
    several_clocks = len({row["clock"] for row in rows if row["clock"]}) > 1
    order = variants_of(rows)
    table = _lines(several_clocks)
    table.add_row("variant", "median", "vs eager", "95 % interval", "of floor", "", style="bold")
    yield table
    for group in _groups(rows):
        known = [row for row in group if row["status"] not in _NOT_SHOWN]
        table = _lines(several_clocks)
        for row in sorted(known, key=lambda r: (r["clock"] or "", order.index(r["variant"]))):
            table.add_row(*_cells(row, several_clocks))
        if known:
            yield Text(_label(known[0]), style="bold cyan")
            yield table
    yield from _interpreted(rows)


def _interpreted(rows: list[Row]) -> Iterator[Text]:
    """One line for each variant and op that was checked in an interpreter."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["status"] == "interpreted":
            groups.setdefault((row["variant"], row["op"], _shape(row)), []).append(row)
    for (variant, op, shape), group in groups.items():
        directions = ", ".join(dict.fromkeys(row["direction"] for row in group))
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in group))
        yield Text(f"{op} · {directions} · {shape} · {dtypes}", style="bold cyan")
        yield Text(f" {variant}: interpreted: checked, not timed", style="dim")


def _lines(several_clocks: bool) -> Table:
    """Columns of fixed widths, so that the tables of all cases stand beneath each other."""
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 1))
    table.add_column(width=28 if several_clocks else 15, no_wrap=True)
    for width in (9, 9, 15, 9):
        table.add_column(width=width, justify="right", no_wrap=True)
    table.add_column()
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
    name = row["variant"]
    if several_clocks and row["clock"]:
        name += f" {row['clock']}"
    if row["status"] != "ok":
        style = "bold red" if row["status"] in _FAILED else "dim"
        return [name, "–", "–", "", "", Text(_remark(row), style=style)]
    style = _STYLES.get(row["verdict"], "")
    pct = "" if row["pct_of_floor"] is None else f"{row['pct_of_floor']:.0f} %"
    ratio, interval = "1", ""
    if row["verdict"] != "baseline":  # without eager's time there is no ratio
        ratio = "–" if row["ratio_vs_eager"] is None else _ratio(row["ratio_vs_eager"])
        interval = _interval(row["ratio_ci"])
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
    remarks = []
    if row["verdict"] == "no difference":
        remarks.append("no difference")
    if row["above_ceiling"]:
        remarks.append("in the caches?")
    return "; ".join(remarks)


def _glance(rows: list[Row], data: dict[str, Any], *, detailed: bool = False) -> Table:
    """One line per case: eager's time, and each variant's ratio to it; ``detailed`` is a second
    line with intervals, times and the shares of the floor."""
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
    table = _small_table("At a glance: how many times faster than eager")
    table.caption = _caption(data, rows, detailed)
    several_clocks = len({row["clock"] for row in rows if row["clock"]}) > 1
    several_dtypes = len({row["dtype"] for row in rows}) > 1
    for title in ("op", *["dtype"] * several_dtypes, *["clock"] * several_clocks):
        table.add_column(title, no_wrap=True)
    for title in ("eager", *names):
        # Two short lines rather than one long one: at 80 columns all variants have their place.
        table.add_column(title.replace("-", "-\n"), justify="right", no_wrap=True)
    checked = _checked(rows)
    last = None
    for (op, direction, _, dtype, outputs, clock), group in _by_case(rows).items():
        eager = next((row for row in group if row["variant"] == "eager"), None)
        if clock is None or eager is None:
            continue
        if op != last:
            table.add_row(Text(op, style="bold"))
            last = op
        star = "" if outputs == "allocated" else "*"
        case = [f"  {direction}{star} {_shape(eager)}"]
        case += [dtype] * several_dtypes + [clock] * several_clocks
        by_name = {row["variant"]: row for row in group}
        cells = []
        for name in names:
            row = by_name.get(name) or _without_clock(rows, eager, name)
            cells.append(_glance_cell(row, (name, op, direction, dtype) in checked, detailed))
        first = seconds(eager["median_s"])
        table.add_row(*case, f"{first}\n{_floor(eager)}" if detailed else first, *cells)
    return table


def _checked(rows: list[Row]) -> set[tuple[str, str, str, str]]:
    """(variant, op, direction, dtype) of what was checked in an interpreter, on a small shape."""
    return {
        (row["variant"], row["op"], row["direction"], row["dtype"])
        for row in rows
        if row["status"] == "interpreted"
    }


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


def _glance_cell(row: Row | None, checked: bool, detailed: bool) -> Text:
    if row is not None and row["status"] in _FAILED:
        return Text(_FAILED[row["status"]], style="bold red")
    if checked:
        return Text("✓", style="dim")
    if row is None or row["status"] != "ok" or row["ratio_vs_eager"] is None:
        return Text("–", style="dim")
    flag = "≈" if row["verdict"] == "no difference" else ""
    cell = Text(f"{flag}{_ratio(row['ratio_vs_eager'])}", style=_STYLES[row["verdict"]])
    if detailed:
        low, high = map(_three_digits, row["ratio_ci"])
        cell.append(f" {low}–{high}\n")
        cell.append(f"{seconds(row['median_s'])} {_floor(row)}", style="not dim default")
    return cell


def _floor(row: Row) -> str:
    """How near to its floor a row comes, in brackets."""
    return "" if row["pct_of_floor"] is None else f"[{row['pct_of_floor']:.0f} %]"


def _caption(data: dict[str, Any], rows: list[Row], detailed: bool) -> str:
    environment = data["environment"]
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    text = (
        f"{environment['device']}, {environment['threads']} threads, "
        f"PyTorch {environment['versions']['torch']}, {dtypes}. "
        "≈: the interval contains 1, no difference."
    )
    if detailed:
        text += " Ratio, its 95 % interval, time, [% of floor; above 100 %: in the caches?]."
    if any(row["outputs"] != "allocated" for row in rows):
        text += " *: outputs preallocated, for all alike."
    if any(row["status"] == "interpreted" for row in rows):
        text += " ✓: checked in Triton's interpreter, not timed."
    return text


def _host_path(paths: list[dict[str, Any]]) -> Table:
    """What small calls are made of: a column per op and backend, a line per part."""
    table = _small_table("What a small call costs on the host")
    table.add_column("", no_wrap=True)
    for path in paths:
        title = (path["op"], path["backend"], "x".join(map(str, path["shape"])))
        table.add_column("\n".join(title), justify="right", no_wrap=True)
    for part in host_path.PARTS:
        cells = [path["parts_s"].get(part) for path in paths]
        table.add_row(part, *("" if each is None else f"{1e6 * each:.1f} µs" for each in cells))
    for title, field in (("the whole call", "call_s"), ("eager's", "eager_s")):
        table.add_row(title, *(f"{1e6 * path[field]:.1f} µs" for path in paths), style="bold")
    return table


def _mnist_tables(data: dict[str, Any]) -> Iterator[Table]:
    section = data["mnist"]
    title = f"Training on {section['data']}"
    table = _small_table(title)
    for column in ("network", "backend"):
        table.add_column(column, no_wrap=True)
    # Two short lines rather than one long one: at 80 columns all have their place.
    for column in ("step", "images/s", "vs\neager", "95 %\ninterval", "page\nfaults", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [row for row in data["rows"] if row["suite"] == "mnist"]
    for row in rows:
        table.add_row(*_mnist_cells(row, section))
    yield table
    yield from filter(None, (_parity(row, section) for row in rows))
    table = _small_table("How much can it matter at all?")
    table.add_column("network", no_wrap=True)
    table.add_column("share of an eager step that the swapped ops take")
    table.add_column("hence at most", no_wrap=True)
    for share in section["shares"]:
        parts = share["op_s"].items()
        ops = ", ".join(f"{op} {100 * part / share['step_s']:.1f} %" for op, part in parts)
        bound = "–" if share["bound"] is None else f"{_ratio(share['bound'])} faster"
        table.add_row(share["workload"], f"{100 * share['share']:.1f} % ({ops})", bound)
    yield table
    yield from (Text(line) for row in rows if (line := _gains_beyond(row, section)))


def _small_table(title: str) -> Table:
    return Table(
        title=title,
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _parity(row: Row, section: dict[str, Any]) -> Text | None:
    """Whether a backend trained as eager does, in one line; None where nothing was checked."""
    checks = _of(row, section["parity"])
    if not checks:
        return None
    failed = dict.fromkeys(each["check"] for each in checks if not each["ok"])
    passed = dict.fromkeys(each["check"] for each in checks if each["check"] not in failed)
    parts = [f"FAILED: {', '.join(failed)}"] if failed else []
    parts += [f"ok: {', '.join(passed)}"] if passed else []
    text = f"{row['op']}, {row['variant']}: parity with eager {'; '.join(parts)}"
    return Text(text, style="bold red" if failed else "")


def _of(row: Row, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that are about the row's network and backend."""
    return [e for e in entries if (e["workload"], e["backend"]) == (row["op"], row["variant"])]


def _mnist_cells(row: Row, section: dict[str, Any]) -> list[RenderableType]:
    names = [row["op"], row["variant"]]
    if row["status"] != "ok":
        short = {"interpreted": "checked"}.get(row["status"], row["status"])
        style = "bold red" if row["status"] in _FAILED else "dim"
        return [*names, Text(short, style=style), *["–"] * 5]
    tests = [test for curve in _of(row, section["curves"]) for test in curve["tests"]]
    baseline = row["verdict"] == "baseline"
    style = _STYLES[row["verdict"]]
    return [
        *names,
        seconds(row["median_s"]),
        f"{row['shape'][0] / row['median_s']:,.0f}",
        Text("1" if baseline else _ratio(row["ratio_vs_eager"]), style=style),
        Text("" if baseline else _interval(row["ratio_ci"]), style=style),
        _page_faults(_of(row, section["speed"])),
        f"{100 * tests[-1]['accuracy']:.2f} %" if tests else "–",
    ]


def _page_faults(speed: list[dict[str, Any]]) -> str:
    """Those of a step; older files do not have them."""
    faults = speed[0].get("page_faults_per_step") if speed else None
    return "–" if faults is None else f"{faults:,.0f}"


def _gains_beyond(row: Row, section: dict[str, Any]) -> str | None:
    """A sentence where a network gains more than the swapped ops take of its step."""
    bound = next((s["bound"] for s in section["shares"] if s["workload"] == row["op"]), None)
    if row["status"] != "ok" or bound is None or row["ratio_ci"][0] <= bound:
        return None
    eager = next(
        e for e in section["speed"] if (e["workload"], e["backend"]) == (row["op"], "eager")
    )
    mine = _of(row, section["speed"])
    sentence = f"{row['op']}, {row['variant']}: gains more than these ops take; a step meets "
    sentence += f"{_page_faults(mine)} page faults, eager's {_page_faults([eager])}"
    if mine[0].get("page_faults_per_step", 0) < eager.get("page_faults_per_step", 0):
        sentence += ": the other ops find memory that was used before, too"
    return sentence + "."


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
    checked = _checked(rows)
    names = variants_of([row for row in rows if row["status"] in ("ok", "interpreted")])
    several_clocks = len({row["clock"] for row in timed}) > 1
    head = ["op", "direction", "shape", "dtype", *(["clock"] if several_clocks else []), *names]
    lines = [_line(head), _line(["---"] * len(head))]
    for (op, direction, _, dtype, outputs, clock), group in _by_case(timed).items():
        by_name = {row["variant"]: row for row in group}
        cells = [
            _markdown_cell(by_name.get(name), (name, op, direction, dtype) in checked)
            for name in names
        ]
        outputs = "" if outputs == "allocated" else f" ({outputs})"
        case = [f"`{op}`", f"{direction}{outputs}", _shape(group[0]), dtype]
        lines.append(_line([*case, *([clock] if several_clocks else []), *cells]))
    lines = [*lines, ""] if timed else []
    lines += [*_markdown_mnist(data), _provenance(data)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(row: Row | None, checked: bool) -> str:
    if row is None:
        return "checked" if checked else "–"
    floor = f", {row['pct_of_floor']:.0f} % of floor"
    if row["pct_of_floor"] > 100:
        floor += " (in the caches?)"
    if row["verdict"] == "baseline" or row["ratio_vs_eager"] is None:
        return f"{seconds(row['median_s'])}{floor}"
    if row["verdict"] == "no difference":
        ratio = f"no difference ({_interval(row['ratio_ci'])})"
    else:
        ratio = f"**{_ratio(row['ratio_vs_eager'])}** ({_interval(row['ratio_ci'])})"
    return f"{seconds(row['median_s'])}, {ratio}{floor}"


def _markdown_mnist(data: dict[str, Any]) -> Iterator[str]:
    shown = ("ok", "interpreted")
    rows = [row for row in data["rows"] if row["suite"] == "mnist" and row["status"] in shown]
    if not rows:
        return
    yield f"Training on {data['mnist']['data']}:"
    yield ""
    head = ["network", "backend", "step", "ratio to eager", "page faults", "test accuracy"]
    yield _line(head)
    yield _line(["---"] * len(head))
    for row in rows:
        cells = [str(cell) for cell in _mnist_cells(row, data["mnist"])]
        if row["status"] != "ok":
            cells[5] = ""
        ratio = f"{cells[4]} ({cells[5]})" if cells[5] else cells[4]
        yield _line([f"`{cells[0]}`", cells[1], cells[2], ratio, *cells[6:]])
    yield ""
    for share in data["mnist"]["shares"]:
        if share["bound"] is not None:
            yield (
                f"In `{share['workload']}` the swapped ops take {100 * share['share']:.1f} % of an "
                f"eager step: no kernel of theirs could gain more than {_ratio(share['bound'])}."
            )
            yield ""
    for line in filter(None, (_gains_beyond(row, data["mnist"]) for row in rows)):
        yield line
        yield ""


def _provenance(data: dict[str, Any]) -> str:
    environment = data["environment"]
    commit = environment["commit"]["hash"]
    dirty = " with changes" if environment["commit"]["dirty"] else ""
    source = f", commit {commit[:10]}{dirty}" if commit else ""
    return (
        f"Measured {data['started'][:10]} on {environment['device']} "
        f"({environment['threads']} threads), PyTorch {environment['versions']['torch']}{source}, "
        f"by `{environment['command']}`. Medians; ratios say how many times faster than eager, "
        "with 95 % intervals; 100 % of floor is as fast as the measured ceilings allow."
        + (" Checked: in Triton's interpreter, not timed." if _checked(data["rows"]) else "")
    )
