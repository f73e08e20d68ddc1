"""Figures of a bench, from the content of bench.json. Functions return a `Figure`; `draw_all` writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from anchorscope.plots.save import save_all
from anchorscope.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    SKY,
    SMALL,
    label,
    legend,
    new_figure,
    panel_title,
    plain_log,
    tidy,
)
from anchorscope.shown import share_text, threads_text

_STAGES = {"anchor": SKY, "identification": ORANGE, "sparse": GREEN}
_STAGE_LABELS = {"anchor": "anchor", "identification": "+ identification", "sparse": "+ sparse computation"}
_STAGE_TITLE = "stages stacked, each timed by itself; the whole pipeline in one go, right behind dense"
_DENSE = {"flash": BLUE, "cudnn": RED, "efficient": "#CC79A7", "flex": MUTED, "math": "#B0A000"}
_PANELS = 9  # sources drawn at most


def draw_all(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write time.png and, where there is something to see in it, density.png.

    Raises:
        RunFailure: a file cannot be written.
    """
    figures = {"time": figure_time(data), "density": figure_density(data)}
    return save_all(((name, figure) for name, figure in figures.items() if figure is not None), folder)


def figure_time(data: dict[str, Any]) -> Figure:
    """Time against N, log-log, one panel per input: dense as lines, the stages of the first theta stacked.

    Inputs with a single length are drawn as stacked bars instead.
    """
    sources = _by_source(data)
    if any(len(rows) > 1 for rows in sources.values()):
        return _time_lines(data, sources)
    return _time_bars(data, [row for rows in sources.values() for row in rows])


def figure_density(data: dict[str, Any]) -> Figure | None:
    """Time relative to the fastest dense back end, against density; None below two.

    One line per input. Below the horizontal line sparse wins; on the diagonal its efficiency is 1.
    """
    rows = [row for row in data["rows"] if row["baseline"] is not None and len(row["sparse"]) > 1]
    rows = [row for row in rows if row["check"]["passed"]]
    if not rows:
        return None
    rows = rows[: 2 * _PANELS]
    figure = new_figure(8, 6, "When sparse starts to win", _subtitle(data, rows[0], theta=False))
    axes = figure.add_subplot()
    tidy(axes)
    many = len({row["source"] for row in rows}) > 1
    shades = [i / max(len(rows) - 1, 1) for i in range(len(rows))]
    from matplotlib import colormaps

    for row, shade in zip(rows, shades, strict=True):
        points = sorted((s["density"], 1 / s["speedup"]) for s in row["sparse"])
        text = f"{row['source']}, N = {row['n']:,}" if many else f"N = {row['n']:,}"
        axes.plot(*zip(*points, strict=True), "o-", color=colormaps["viridis"](0.9 * shade), label=text, ms=4)
    low = min(s["density"] for row in rows for s in row["sparse"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color=INK, lw=1, label="as fast as dense")
    low = min(low, 0.8)
    axes.plot([low, 1], [low, 1], ":", color=INK, lw=1, label="efficiency 1")
    axes.set_xlim(low / 1.15, 1.15)
    _plain_ticks(axes, x=True, y=True)
    baselines = ", ".join(sorted({row["baseline"] for row in rows}))
    label(axes, "density (kept pairs / visible pairs)", f"time / fastest dense time ({baselines})")
    legend(axes)
    return figure


def _by_source(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sources: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        sources.setdefault(row["source"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["n"]) for name, rows in list(sources.items())[:_PANELS]}


def _theta(value: float | str) -> str:
    return {"inf": "∞", "-inf": "−∞"}.get(value, value) if isinstance(value, str) else f"{value:g}"


def _subtitle(data: dict[str, Any], row: dict[str, Any], theta: bool = True) -> str:
    settings, machine = data["settings"], data["hardware"]
    text = f"{row['heads']}/{row['kv_heads']} query/kv heads, d = {row['head_dim']}, {settings['dtype']}"
    text += f", groups {settings['block']} × {settings['step']}"
    if theta:
        text += f", theta {_theta(row['sparse'][0]['theta'])}"
    where = machine["name"] if machine["type"] == "cuda" else f"CPU timing: {machine['name']}"
    threads = f", {threads_text(machine['threads'])}" if machine.get("threads") else ""
    return f"{text}; {where}{threads}, {settings['backend']} back end"


def _time_lines(data: dict[str, Any], sources: dict[str, list[dict[str, Any]]]) -> Figure:
    columns = min(len(sources), 3)
    lines = math.ceil(len(sources) / columns)
    first = next(iter(sources.values()))[0]
    size = max(9.0, 5.0 * columns), 4.5 * lines + 1.5
    figure = new_figure(*size, "Dense and sparse attention, causal prefill", _subtitle(data, first))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(sources) :]:
        axes.set_visible(False)
    for axes, (source, rows) in zip(grid.flat, sources.items(), strict=False):
        _panel(axes, rows)
        if len(sources) > 1:
            panel_title(axes, source, size=SMALL)
    for axes in grid[:, 0]:
        label(axes, "N (tokens)", "time (ms, median)")
    handles = {
        text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend(
        figure,
        handles=handles.values(),
        labels=handles.keys(),
        loc="outside lower center",
        ncols=4,
        title=_STAGE_TITLE,
        title_fontsize=SMALL,
    )
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
    _line(axes, lengths, [row["sparse"][0]["whole"] for row in rows], INK, "whole pipeline", 2.2)
    for name in dict.fromkeys(dense["name"] for row in rows for dense in row["dense"]):
        had = [(row["n"], d) for row in rows for d in row["dense"] if d["name"] == name]
        repeated = " (K/V repeated)" if had[0][1]["kv_repeated"] else ""
        color = _DENSE.get(name, MUTED)
        _line(axes, [n for n, _ in had], [d["timing"] for _, d in had], color, f"dense {name}{repeated}", 1.4)
    for row in rows:
        sparse = row["sparse"][0]
        if sparse["speedup"] is not None:
            axes.annotate(
                f"{sparse['speedup']:.1f}×\nrecall {share_text(sparse['recall'])}\n"
                f"density {share_text(sparse['density'])}",
                (row["n"], 0.02),
                xycoords=axes.get_xaxis_transform(),  # along the bottom, clear of every line
                ha="right" if row is rows[-1] else "left" if row is rows[0] else "center",
                va="bottom",
                fontsize=SMALL,
                color=INK,
            )
    tidy(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=low)
    axes.margins(x=0.04)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_ticks(axes, x=False, y=True)
    label(axes, "N (tokens)")


def _line(axes: Axes, x: list[int], times: list[dict[str, float]], color: str, text: str, width: float) -> None:
    middle = [t["median_ms"] for t in times]
    spread = [[m - t["p20_ms"] for m, t in zip(middle, times, strict=True)]]
    spread.append([t["p80_ms"] - m for m, t in zip(middle, times, strict=True)])
    axes.errorbar(x, middle, spread, fmt="o-", color=color, lw=width, ms=4, capsize=2, label=text)


def _time_bars(data: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    rows = rows[: 4 * _PANELS]
    title = "Dense and sparse attention, causal prefill"
    figure = new_figure(9, 2.4 + 0.6 * len(rows), title, _subtitle(data, rows[0]))
    axes = figure.add_subplot()
    tidy(axes)
    for i, row in enumerate(rows):
        sparse, left = row["sparse"][0], 0.0
        for stage, color in _STAGES.items():
            width = sparse["stages"][stage]["median_ms"]
            text = _STAGE_LABELS[stage] if i == 0 else None
            axes.barh(i - 0.18, width, 0.34, left=left, color=color, alpha=0.8, label=text)
            left += width
        whole = sparse["whole"]["median_ms"]
        axes.vlines(whole, i - 0.37, i - 0.01, color=INK, lw=2.5, label="" if i else "whole pipeline")
        left = max(left, whole)
        words = "" if sparse["speedup"] is None else f"{sparse['speedup']:.1f}×, "
        words += f"recall {share_text(sparse['recall'])}, density {share_text(sparse['density'])}"
        axes.text(left, i - 0.18, "  " + words, va="center", fontsize=SMALL, color=INK)
        best = next((d for d in row["dense"] if d["name"] == row["baseline"]), None)
        if best is not None:
            axes.barh(
                i + 0.18,
                best["timing"]["median_ms"],
                0.34,
                color="#BBBBBB",
                label="" if i else "fastest dense",
            )
            axes.text(best["timing"]["median_ms"], i + 0.18, f"  {best['name']}", va="center", fontsize=SMALL)
    axes.set_yticks(range(len(rows)), [f"{row['source']}\nN = {row['n']:,}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    label(axes, "time (ms, median)")
    legend(figure, loc="outside lower center", ncols=5, title=_STAGE_TITLE, title_fontsize=SMALL)
    return figure


def _plain_ticks(axes: Axes, *, x: bool, y: bool) -> None:
    for axis in [axes.xaxis] * x + [axes.yaxis] * y:
        low, high = axis.get_view_interval()
        plain_log(axis, LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else tuple(range(1, 10))))
