"""Figures of a bench, from the content of bench.json. Functions return a `Figure`; `draw_all` writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from anchorscope.bench.dense import NAMES
from anchorscope.plots.save import save_all
from anchorscope.plots.style import (
    BLUE,
    INK,
    KINDS,
    MUTED,
    SMALL,
    label,
    legend_below,
    model_text,
    new_figure,
    panel_title,
    plain_log,
    setting_text,
    some_of,
    theta_colors,
    tidy,
)
from anchorscope.plots.text import PARTS, name_text, text_width
from anchorscope.shown import exact_theta, share_text, threads_text

# Stages of the pipeline, whose whole is blue: colors that mean nothing else here.
_STAGES = {"anchor": "#A9CDE6", "identification": "#1FA3A3", "sparse": "#86C5A4"}
_STAGE_LABELS = {"anchor": "anchor", "identification": "+ identification", "sparse": "+ sparse computation"}
_STAGE_NOTE = "stages stacked, each timed by itself; the whole pipeline in one go, right behind dense"
_DENSE = dict(zip(NAMES, (KINDS[5], KINDS[2], KINDS[1], KINDS[7], KINDS[4]), strict=False))
_MARKERS = "osD^v<>PXph"
_WITHIN_DECADE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)  # ticks of an axis that spans less than ten-fold
_PANELS = 9  # sources drawn at most
_THETAS = 8  # thetas named at most
_BARS = 5.6  # inches that bars and the words behind them have at least


def draw_all(
    data: dict[str, Any], folder: Path, model: object = None, *, formats: Mapping[str, int] | None = None
) -> list[Path]:
    """Write the figures `time` and, where there is something to see in it, `density`.

    Args:
        data: what bench.json holds.
        folder: where to.
        model: record or name of the model whose dump was timed; by default what bench.json says.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.

    Raises:
        RunFailure: a file cannot be written.
    """
    model = model or data["settings"].get("model")
    figures = {"time": figure_time(data, model), "density": figure_density(data, model)}
    return save_all(((name, figure) for name, figure in figures.items() if figure is not None), folder, formats=formats)


def figure_time(data: dict[str, Any], model: object = None) -> Figure:
    """Time against N, log-log, one panel per input: dense as lines, the stages of the first theta stacked.

    Inputs with a single length are drawn as stacked bars instead.
    """
    sources = _by_source(data)
    if any(len(rows) > 1 for rows in sources.values()):
        return _time_lines(data, sources, model)
    return _time_bars(data, [row for rows in sources.values() for row in rows], model)


def figure_density(data: dict[str, Any], model: object = None) -> Figure | None:
    """Time relative to the fastest dense back end, against density; None below two.

    One line per input, one mark per theta. Below the horizontal line sparse wins; on the diagonal its efficiency is 1.
    """
    rows = [row for row in data["rows"] if row["baseline"] is not None and len(row["sparse"]) > 1]
    rows = [row for row in rows if row["check"]["passed"]][: 2 * _PANELS]
    if not rows:
        return None
    thetas = sorted({float(s["theta"]) for row in rows for s in row["sparse"]})
    colors = dict(zip(thetas, theta_colors(thetas), strict=True))
    figure = new_figure(8, 6, "When sparse starts to win", *_header(data, rows[0], thetas, model))
    axes = figure.add_subplot()
    tidy(axes)
    many = len({row["source"] for row in rows}) > 1
    handles = []
    for i, row in enumerate(rows):
        points = sorted((s["density"], 1 / s["speedup"], float(s["theta"])) for s in row["sparse"])
        x, y = [p[0] for p in points], [p[1] for p in points]
        line: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": "-" if i < len(_MARKERS) else "--"}
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(x, y, **line)
        axes.scatter(x, y, s=30, c=[colors[p[2]] for p in points], marker=marker, zorder=3)
        text = f"{name_text(row['source'], 28)}, N = {row['n']:,}" if many else f"N = {row['n']:,}"
        handles.append(Line2D([], [], **line, marker=marker, markersize=5, label=text))
    for theta in some_of(thetas, _THETAS):
        mark: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 7, "color": colors[theta]}
        handles.append(Line2D([], [], **mark, label=f"theta {exact_theta(theta)}"))
    low = min(0.8, *(s["density"] for row in rows for s in row["sparse"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    handles.append(axes.axhline(1, color=INK, lw=1, label="as fast as dense"))
    handles += axes.plot([low, 1], [low, 1], ":", color=INK, lw=1, label="efficiency 1")
    axes.set_xlim(low / 1.15, 1.15)
    _plain_ticks(axes, x=True, y=True)
    baselines = ", ".join(sorted({row["baseline"] for row in rows}))
    label(axes, "density (kept pairs / visible pairs)", f"time / fastest dense time ({baselines})")
    legend_below(figure, columns=4, handles=handles)
    return figure


def _by_source(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sources: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        sources.setdefault(row["source"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["n"]) for name, rows in list(sources.items())[:_PANELS]}


def _header(data: dict[str, Any], row: dict[str, Any], thetas: Sequence[float | str], model: object) -> tuple[str, str]:
    """What was timed, and where."""
    settings, machine = data["settings"], data["hardware"]
    sources = list(dict.fromkeys(r["source"] for r in data["rows"]))
    planted = settings["input"] == "planted"
    inputs = "planted input" if planted else name_text(sources[0]) if len(sources) == 1 else f"{len(sources)} inputs"
    groups = setting_text(groups=[(settings["block"], settings["step"])], thetas=thetas)
    setting = PARTS.join(filter(None, [model_text(model), inputs, groups]))
    shape = f"{row['heads']}/{row['kv_heads']} query/kv heads, d = {row['head_dim']}, {settings['dtype']}"
    where = machine["name"] if machine["type"] == "cuda" else f"CPU timing: {machine['name']}"
    threads = f", {threads_text(machine['threads'])}" if machine.get("threads") else ""
    return setting, PARTS.join([shape, f"{name_text(where, 60)}{threads}", f"{settings['backend']} back end"])


def _time_lines(data: dict[str, Any], sources: dict[str, list[dict[str, Any]]], model: object) -> Figure:
    columns = min(len(sources), 3)
    lines = math.ceil(len(sources) / columns)
    first = next(iter(sources.values()))[0]
    size = max(9.0, 5.0 * columns), 4.5 * lines + 1.5
    setting, where = _header(data, first, [first["sparse"][0]["theta"]], model)
    figure = new_figure(*size, "Dense and sparse attention, causal prefill", setting, where + PARTS + _STAGE_NOTE)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(sources) :]:
        axes.set_visible(False)
    for axes, (source, rows) in zip(grid.flat, sources.items(), strict=False):
        _panel(axes, rows)
        if len(sources) > 1:
            panel_title(axes, name_text(source, 36), size=SMALL)
    for axes in grid[:, 0]:
        label(axes, "N (tokens)", "time (ms, median)")
    handles = {
        text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend_below(figure, columns=5, handles=list(handles.values()))
    for axes, rows in zip(grid.flat, sources.values(), strict=False):
        _write_speedups(axes, rows)
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    lengths = [row["n"] for row in rows]
    least = [row["sparse"][0]["stages"]["anchor"]["median_ms"] for row in rows]
    least += [dense["timing"]["p20_ms"] for row in rows for dense in row["dense"]]
    low = min(least) / 4  # room for the words
    base = [low] * len(rows)
    total = [0.0] * len(rows)
    for stage, color in _STAGES.items():
        total = [t + row["sparse"][0]["stages"][stage]["median_ms"] for t, row in zip(total, rows, strict=True)]
        axes.fill_between(lengths, base, total, color=color, alpha=0.6, lw=0, label=_STAGE_LABELS[stage])
        base = total
    _line(axes, lengths, [row["sparse"][0]["whole"] for row in rows], BLUE, "whole pipeline", 2.2)
    for name in dict.fromkeys(dense["name"] for row in rows for dense in row["dense"]):
        had = [(row["n"], d) for row in rows for d in row["dense"] if d["name"] == name]
        repeated = " (K/V repeated)" if had[0][1]["kv_repeated"] else ""
        color = _DENSE.get(name, MUTED)
        _line(axes, [n for n, _ in had], [d["timing"] for _, d in had], color, f"dense {name}{repeated}", 1.4)
    tidy(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=low)
    axes.margins(x=0.04)
    stride = math.ceil(len(lengths) / 6)
    axes.set_xticks(lengths[::-stride], [f"{n:,}" for n in lengths[::-stride]])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_ticks(axes, x=False, y=True)
    label(axes, "N (tokens)")


def _write_speedups(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Speed-up, recall and density along the bottom, clear of every line; where lengths stand close, of some of them.

    The first and the last come first.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # to know how far lengths are apart
    free: list[tuple[float, float]] = []
    order = sorted(range(len(rows)), key=lambda i: (i not in (0, len(rows) - 1), i))
    for i in order:
        sparse = rows[i]["sparse"][0]
        if sparse["speedup"] is None:
            continue
        words = [
            f"{sparse['speedup']:.1f}×",
            f"recall {share_text(sparse['recall'])}",
            f"density {share_text(sparse['density'])}",
        ]
        width = 1.1 * max(text_width(line, SMALL) for line in words) * axes.figure.dpi
        side = 0.5 if len(rows) == 1 else {0: 0.0, len(rows) - 1: 1.0}.get(i, 0.5)
        left = float(axes.transData.transform((rows[i]["n"], 1.0))[0]) - side * width
        if any(left < stop and start < left + width for start, stop in free):
            continue
        free.append((left, left + width))
        axes.annotate(
            "\n".join(words),
            (rows[i]["n"], 0.02),
            xycoords=axes.get_xaxis_transform(),
            ha={0.0: "left", 0.5: "center", 1.0: "right"}[side],
            va="bottom",
            fontsize=SMALL,
            color=INK,
        )


def _line(axes: Axes, x: list[int], times: list[dict[str, float]], color: str, text: str, width: float) -> None:
    middle = [t["median_ms"] for t in times]
    spread = [[m - t["p20_ms"] for m, t in zip(middle, times, strict=True)]]
    spread.append([t["p80_ms"] - m for m, t in zip(middle, times, strict=True)])
    axes.errorbar(x, middle, spread, fmt="o-", color=color, lw=width, ms=4, capsize=2, label=text)


def _time_bars(data: dict[str, Any], rows: list[dict[str, Any]], model: object) -> Figure:
    rows = rows[: 4 * _PANELS]
    setting, where = _header(data, rows[0], [rows[0]["sparse"][0]["theta"]], model)
    title = "Dense and sparse attention, causal prefill"
    figure = new_figure(9, 2.2 + 0.6 * len(rows), title, setting, where + PARTS + _STAGE_NOTE)
    axes = figure.add_subplot()
    tidy(axes)
    axes.grid(False, axis="y")
    needed = 0.0  # to the right, for the words behind the bars
    for i, row in enumerate(rows):
        sparse, left = row["sparse"][0], 0.0
        for stage, color in _STAGES.items():
            width = sparse["stages"][stage]["median_ms"]
            text = _STAGE_LABELS[stage] if i == 0 else None
            axes.barh(i - 0.18, width, 0.34, left=left, color=color, label=text)
            left += width
        whole = sparse["whole"]["median_ms"]
        axes.vlines(whole, i - 0.37, i - 0.01, color=BLUE, lw=2.5, label="" if i else "whole pipeline")
        left = max(left, whole)
        words = "" if sparse["speedup"] is None else f"{sparse['speedup']:.1f}×, "
        words += f"recall {share_text(sparse['recall'])}, density {share_text(sparse['density'])}"
        ends = [(left, i - 0.18, "  " + words)]
        best = next((d for d in row["dense"] if d["name"] == row["baseline"]), None)
        if best is not None:
            time = best["timing"]["median_ms"]
            axes.barh(i + 0.18, time, 0.34, color="#BBBBBB", label="" if i else "fastest dense")
            ends.append((time, i + 0.18, f"  {best['name']}"))
        for end, at, text in ends:
            axes.text(end, at, text, va="center", fontsize=SMALL, color=INK)
            needed = max(needed, end / (1 - min(text_width(text, SMALL) / _BARS, 0.9)))
    names = [f"{name_text(row['source'], 28)}\nN = {row['n']:,}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, needed)
    label(axes, "time (ms, median)")
    legend_below(figure, columns=5, handles=axes.get_legend_handles_labels()[0])
    return figure


def _plain_ticks(axes: Axes, *, x: bool, y: bool) -> None:
    for axis in [axes.xaxis] * x + [axes.yaxis] * y:
        low, high = axis.get_view_interval()
        plain_log(axis, LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else _WITHIN_DECADE))
