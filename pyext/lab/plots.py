"""The plots of a result file: time against size, ratio to eager, roofline, training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is all we want; the default may look for a screen

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

Row = dict[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers tell it again.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#7F7F7F", "#CC79A7")
_MARKERS = "osD^vPX*"
_DIRECTIONS = ("forward", "backward", "both", "step")
_CLOCKS = ("device_cold", "device_warm", "host")
_FLOOR = "#999999"
_SIZE = 4.0
_SMOOTHED_STEPS = 20
_DPI = 130


def write(data: dict[str, Any], folder: Path, order: Sequence[str]) -> list[Path]:
    """Draws every plot that the rows allow.

    Args:
        data: a result file's contents.
        folder: where the PNG files go.
        order: variants in the order of their colours.

    Returns:
        The files, in the order in which they were drawn.
    """
    ops = [row for row in data["rows"] if row["suite"] != "mnist" and row["status"] == "ok"]
    figures: list[tuple[str, Figure]] = []
    for clock in [each for each in _CLOCKS if any(row["clock"] == each for row in ops)]:
        suffix = f"_{clock}" if data["environment"]["device_type"] == "cuda" else ""
        rows = [row for row in ops if row["clock"] == clock]
        allocated = [row for row in rows if row["outputs"] == "allocated"]
        for op in dict.fromkeys(row["op"] for row in allocated):
            mine = [row for row in allocated if row["op"] == op]
            figures.append((f"time_{op}{suffix}", _time(mine, data, order)))
        figures.append((f"ratio{suffix}", _ratio(rows, data, order)))
        figures.append((f"roofline{suffix}", _roofline(rows, data, order)))
    if data["mnist"] and data["mnist"]["curves"]:
        for workload in dict.fromkeys(each["workload"] for each in data["mnist"]["curves"]):
            figures.append((workload, _training(workload, data, order)))
    paths = []
    for name, figure in figures:
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
        plt.close(figure)
    return paths


def _style(variant: str, order: Sequence[str]) -> dict[str, Any]:
    index = order.index(variant) if variant in order else len(order) - 1
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 5,
    }


def _machine(data: dict[str, Any]) -> str:
    environment = data["environment"]
    return (
        f"{environment['device']}, {environment['threads']} threads, "
        f"PyTorch {environment['versions']['torch']}, {data['started'][:10]}"
    )


def _finish(
    figure: Figure,
    title: str,
    data: dict[str, Any],
    handles: dict[str, Any],
    order: Sequence[str],
) -> Figure:
    """The title with the machine beneath it, and the legend below the axes."""
    figure.suptitle(f"{title}\n{_machine(data)}", fontsize=10)
    names = sorted(handles, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(len(names), max(3, int(figure.get_figwidth() / 1.3))),
        frameon=False,
        fontsize=9,
    )
    return figure


# --- time against size ---------------------------------------------------------------------------


def _time(rows: list[Row], data: dict[str, Any], order: Sequence[str]) -> Figure:
    directions = [each for each in _DIRECTIONS if any(row["direction"] == each for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        len(dtypes),
        len(directions),
        figsize=(max(6.0, _SIZE * len(directions)), 0.9 + 3.4 * len(dtypes)),
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, direction in zip(line, directions, strict=True):
            mine = [r for r in rows if r["dtype"] == dtype and r["direction"] == direction]
            _time_panel(axis, mine, order, handles)
            axis.set_title(direction if len(dtypes) == 1 else f"{direction}, {dtype}", fontsize=10)
        line[0].set_ylabel("time of one call")
    elementwise = rows[0]["unit"] == "elementwise"
    for axis in axes[-1]:
        axis.set_xlabel("elements" if elementwise else "shape, placed by its work in FLOP")
    title = f"{rows[0]['op']}: time against size, {', '.join(dtypes)}"
    if rows[0]["clock"] != "host":
        title += f", {rows[0]['clock']}"
    return _finish(figure, title, data, handles, order)


def _time_panel(axis: Axes, rows: list[Row], order: Sequence[str], handles: dict[str, Any]) -> None:
    axis.set_xscale("log", base=2 if rows and rows[0]["unit"] == "elementwise" else 10)
    axis.set_yscale("log")
    for variant in [each for each in order if any(row["variant"] == each for row in rows)]:
        mine = sorted((row for row in rows if row["variant"] == variant), key=_size)
        medians = [row["median_s"] for row in mine]
        below = [max(row["median_s"] - row["p20_s"], 0) for row in mine]
        above = [max(row["p80_s"] - row["median_s"], 0) for row in mine]
        handles[variant] = axis.errorbar(
            [_size(row) for row in mine],
            medians,
            yerr=(below, above),
            capsize=2,
            linewidth=1.3,
            **_style(variant, order),
        )
    floors = sorted({(_size(row), row["floor_s"]) for row in rows})
    (line,) = axis.plot(*zip(*floors, strict=True), "--", color=_FLOOR, linewidth=1.2, zorder=0)
    handles["floor"] = line
    if rows and rows[0]["unit"] != "elementwise":
        _name_shapes(axis, rows)
    axis.yaxis.set_major_formatter(FuncFormatter(_time_label))
    _sparse_minor_labels(axis)
    axis.grid(True, which="major", color="#e5e5e5")
    axis.set_axisbelow(True)


def _sparse_minor_labels(axis: Axes) -> None:
    """Where less than two decades are shown, powers of ten alone would leave it unlabelled."""
    low, high = axis.get_ylim()
    if math.log10(high / low) < 2:
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(FuncFormatter(_time_label))
        axis.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axis.yaxis.set_minor_formatter(NullFormatter())


def _size(row: Row) -> int:
    return row["shape"][0] if row["unit"] == "elementwise" else row["flops"]


def _name_shapes(axis: Axes, rows: list[Row]) -> None:
    ticks = {
        _size(row): "×".join(map(str, row["shape"])) + f"\n{_si(_size(row))}FLOP" for row in rows
    }
    axis.set_xlim(min(ticks) / 3, max(ticks) * 3)
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=7.5)
    axis.xaxis.set_minor_locator(NullLocator())


def _si(value: float) -> str:
    """``26_000_000`` -> ``"26 M"``."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def _time_label(value: float, _position: int = 0) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= 0.999 * scale:
            return f"{value / scale:g} {unit}"
    return f"{value / 1e-9:g} ns"


# --- ratio to eager ------------------------------------------------------------------------------


def _ratio(rows: list[Row], data: dict[str, Any], order: Sequence[str]) -> Figure:
    """A line per case: how many times faster than eager each variant is, with its interval."""
    ratios = [row for row in rows if row["variant"] != "eager" and row["ratio_vs_eager"]]
    cases = list(dict.fromkeys(_case(row) for row in ratios))[::-1]
    figure, axis = plt.subplots(
        figsize=(9.0, max(3.0, 1.6 + 0.27 * len(cases))), layout="constrained"
    )
    handles: dict[str, Any] = {}
    variants = [each for each in order if any(row["variant"] == each for row in ratios)]
    for offset, variant in enumerate(variants):
        mine = [row for row in ratios if row["variant"] == variant]
        shift = 0.6 * ((offset + 0.5) / len(variants) - 0.5)
        places = [cases.index(_case(row)) - shift for row in mine]
        values = [row["ratio_vs_eager"] for row in mine]
        below = [max(row["ratio_vs_eager"] - row["ratio_ci"][0], 0) for row in mine]
        above = [max(row["ratio_ci"][1] - row["ratio_vs_eager"], 0) for row in mine]
        handles[variant] = axis.errorbar(
            values,
            places,
            xerr=(below, above),
            linestyle="none",
            capsize=2,
            **_style(variant, order),
        )
    axis.axvline(1, color="#000000", linewidth=1, zorder=0)
    span = math.log2(max(row["ratio_ci"][1] for row in ratios)) if ratios else 0
    span = max(span, -math.log2(min(row["ratio_ci"][0] for row in ratios)) if ratios else 0)
    axis.set_xscale("log", base=2 if span < 5 else 10)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.set_ylim(-0.7, len(cases) - 0.3)
    for place in range(0, len(cases), 2):
        axis.axhspan(place - 0.5, place + 0.5, color="#f5f5f5", zorder=-1)
    axis.set_xlabel("eager's time / this variant's time: right of the line is faster than eager")
    axis.grid(True, axis="x", color="#dddddd")
    axis.set_axisbelow(True)
    clock = rows[0]["clock"]
    title = "Ratio to eager, 95 % intervals" + ("" if clock == "host" else f", {clock}")
    return _finish(figure, title, data, handles, order)


def _case(row: Row) -> str:
    shape = "×".join(map(str, row["shape"]))
    text = f"{row['op']} · {row['direction']} · {shape} · {row['dtype']}"
    return text if row["outputs"] == "allocated" else f"{text} · {row['outputs']}"


# --- roofline ------------------------------------------------------------------------------------


def _roofline(rows: list[Row], data: dict[str, Any], order: Sequence[str]) -> Figure:
    """Achieved FLOP/s against FLOP per byte, under the ceilings measured in the same run."""
    rows = [r for r in rows if r["outputs"] == "allocated" and r["direction"] in ("both", "step")]
    figure, axis = plt.subplots(figsize=(9.0, 5.6), layout="constrained")
    ceilings = data["ceilings"]
    intensities = [row["flops"] / row["bytes"] for row in rows] or [0.1, 10.0]
    low, high = min(intensities) / 3, max(*intensities, 10.0) * 4
    bandwidth = ceilings["copy"]["value"]
    roofs = _roofs(rows, ceilings)
    top = max(rate for _, rate in roofs)
    axis.plot([low, top / bandwidth], [low * bandwidth, top], color="#444444", linewidth=1.4)
    middle = math.sqrt(low * top / bandwidth)
    axis.annotate(
        f"copy bandwidth {_si(bandwidth)}B/s",
        (middle, middle * bandwidth),
        xytext=(-6, 4),
        textcoords="offset points",
        fontsize=8,
        ha="right",
    )
    above = math.inf
    for label, rate in sorted(roofs, key=lambda roof: -roof[1]):
        axis.plot([rate / bandwidth, high], [rate, rate], color="#444444", linewidth=1.4)
        text = f"{label} {_si(rate)}FLOP/s"
        beneath = above / rate < 1.5  # so near to the roof above it that the labels would overlap
        axis.annotate(
            text,
            (high, rate),
            xytext=(-4, -4 if beneath else 4),
            textcoords="offset points",
            fontsize=8,
            ha="right",
            va="top" if beneath else "baseline",
        )
        above = rate
    handles: dict[str, Any] = {}
    for variant in [each for each in order if any(row["variant"] == each for row in rows)]:
        mine = [row for row in rows if row["variant"] == variant]
        style = _style(variant, order)
        handles[variant] = Line2D([], [], linestyle="none", **style)
        for row in mine:
            style["markersize"] = 2 + 0.8 * math.log10(row["bytes"])
            axis.plot(
                row["flops"] / row["bytes"],
                row["flops"] / row["median_s"],
                linestyle="none",
                alpha=0.85,
                **style,
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    # Room beneath the points for the names of their cases.
    bottom = min((row["flops"] / row["median_s"] for row in rows), default=top / 100)
    axis.set_ylim(bottom * (bottom / top) ** 0.6, top * 3)
    _name_intensities(axis, rows)
    axis.set_xlabel("arithmetic intensity in FLOP per byte (a larger marker moves more bytes)")
    axis.set_ylabel("achieved FLOP/s")
    axis.grid(True, which="major", color="#e5e5e5")
    axis.set_axisbelow(True)
    clock = rows[0]["clock"] if rows else "host"
    title = "Roofline: forward + backward, and whole steps"
    title += "" if clock == "host" else f", {clock}"
    return _finish(figure, title, data, handles, order)


def _roofs(rows: list[Row], ceilings: dict[str, Any]) -> list[tuple[str, float]]:
    """The flat ceilings of the dtypes that were measured."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows) or list(ceilings["fma"])[:1]:
        found.append((f"FMA rate, {dtype}:", ceilings["fma"][dtype]["value"]))
        found.append((f"matrix rate, {dtype}:", ceilings["matrix"][dtype]["value"]))
    return found


def _name_intensities(axis: Axes, rows: list[Row]) -> None:
    """Names the cases at the foot of the line on which their points lie."""
    names: dict[float, dict[str, None]] = {}
    for row in sorted(rows, key=lambda row: row["flops"] / row["bytes"]):
        intensity = row["flops"] / row["bytes"]
        near = next((each for each in names if abs(math.log(intensity / each)) < 0.1), intensity)
        shape = "" if row["unit"] == "elementwise" else " " + "×".join(map(str, row["shape"]))
        names.setdefault(near, {})[row["op"] + shape] = None
    for intensity, cases in names.items():
        axis.axvline(intensity, color="#cccccc", linewidth=0.8, linestyle=":", zorder=0)
        axis.annotate(
            "\n".join(cases),
            (intensity, 0.015),
            xycoords=("data", "axes fraction"),
            xytext=(-2, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            color="#555555",
            ha="right",
            va="bottom",
        )


# --- training ------------------------------------------------------------------------------------


def _training(workload: str, data: dict[str, Any], order: Sequence[str]) -> Figure:
    curves = [each for each in data["mnist"]["curves"] if each["workload"] == workload]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained")
    handles: dict[str, Any] = {}
    lowest, highest = [], []
    width = max(1, min(_SMOOTHED_STEPS, len(curves[0]["losses"]) // 5))
    for index, curve in enumerate(curves):
        style = _style(curve["backend"], order)
        # Curves that agree lie on each other: later ones are thinner, and dashed.
        line = {"linewidth": 3.2 - 1.6 * min(index, 1), "linestyle": "--" if index else "-"}
        steps, losses = _smooth(curve["losses"], width)
        lowest.append(min(losses))
        highest.append(max(losses))
        handles[curve["backend"]] = left.plot(steps, losses, color=style["color"], **line)[0]
        right.plot(
            [test["epoch"] for test in curve["tests"]],
            [100 * test["accuracy"] for test in curve["tests"]],
            **style,
            **line,
        )
    left.set_xlabel("step")
    left.set_ylabel("training loss" + (f" (means of {width} steps)" if width > 1 else ""))
    if max(highest) > 10 * min(lowest) > 0:
        left.set_yscale("log")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("epochs")
    right.set_ylabel("test accuracy in %")
    right.set_xlim(left=0)
    handles["99 %"] = right.axhline(99, color=_FLOOR, linestyle=":", linewidth=1.2)
    for axis in (left, right):
        axis.grid(True, which="major", color="#e5e5e5")
        axis.set_axisbelow(True)
    title = f"{workload} on {data['mnist']['data']}"
    return _finish(figure, title, data, handles, order)


def _smooth(losses: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """Means of ``width`` steps each: single batches scatter too much to compare curves."""
    starts = range(0, len(losses) - width + 1, width)
    return [start + width / 2 for start in starts], [
        sum(losses[start : start + width]) / width for start in starts
    ]
