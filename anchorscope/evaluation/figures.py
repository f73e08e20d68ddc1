"""Figures of an evaluation: functions take objects of evaluation.json, return a `Figure`; `draw_all` saves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from anchorscope.plots.maps import FIGURES, bare, cell_share, color_bar, color_cells, paint, write_numbers
from anchorscope.plots.names import file_names
from anchorscope.plots.save import save_all
from anchorscope.plots.style import (
    BLUE,
    GREEN,
    INK,
    KINDS,
    MUTED,
    SMALL,
    label,
    legend_below,
    legend_name,
    new_figure,
    panel_title,
    setting_text,
    theta_colors,
    tidy,
    token_ticks,
)
from anchorscope.plots.text import name_text
from anchorscope.shown import exact_theta, theta_text

ARM_COLORS = (BLUE, GREEN, *KINDS[1:])
MARKERS = "osD^v<>PXph"
ROUNDING = 1e-7  # nats; what is smaller is drawn there
NATS, NATS_ALONE = 0.05, 0.5  # least range of log-probabilities shown, with intervals and without any
CHANGE = 0.002  # least range of changes of perplexity shown
Result = Mapping[str, Any]


class Look(NamedTuple):
    """How an arm is drawn everywhere."""

    color: str
    marker: str


def looks(arms: Sequence[Result]) -> dict[str, Look]:
    """A look per arm, of the objects of `arms`; arms that are one theta each have the color of that."""
    thetas = [_one_theta(arm) for arm in arms]
    if len(arms) > 1 and None not in thetas:
        colors = theta_colors([x for x in thetas if x is not None])
    else:
        colors = [ARM_COLORS[i % len(ARM_COLORS)] for i in range(len(arms))]
    return {arm["name"]: Look(colors[i], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(arms)}


def _one_theta(arm: Result) -> float | None:
    """The theta of an arm whose heads all have the same, None of any other."""
    low, high = arm.get("theta_low"), arm.get("theta_high")
    return float(low) if low is not None and low == high and not arm.get("dense_heads") else None


def _looks_of(results: Sequence[Result], known: Mapping[str, Look] | None) -> Mapping[str, Look]:
    """The looks given, or some for the arms that there are."""
    return known or looks([{"name": arm} for arm in _ordered(results, "arm")])


def needle_grid(depths: Sequence[Result], metric: str = "score", setting: str = "") -> Figure:
    """Length x depth maps of the needle task: dense, then every sparse arm.

    Args:
        depths: the objects of `depths`, one per length, depth and arm, of one task.
        metric: "score" (share of expected strings found) or "logprob" (of the correct answer, nats per token).
        setting: of what, see `anchorscope.plots.style.setting_text`.
    """
    arms = _ordered(depths, "arm")
    lengths, places = _ordered(depths, "length"), sorted(_ordered(depths, "depth"))
    panels = {"dense": _grid([r for r in depths if r["arm"] == arms[0]], lengths, places, f"{metric}_dense")}
    panels |= {a: _grid([r for r in depths if r["arm"] == a], lengths, places, f"{metric}_sparse") for a in arms}
    norm, name = Normalize(0, 1), "score: share of answers found"
    if metric == "logprob":
        low = min(float(np.nanmin(x)) for x in panels.values())
        norm, name = Normalize(min(low, -0.1), 0), "log-probability of the answer (nats per token)"
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = math.ceil(len(panels) / across)
    each = max(0.62 * len(lengths) + 0.9, 2.5)
    count = depths[0]["samples"]
    figure = new_figure(
        max(across * each + 1.6, 7.2),
        max(down * (0.42 * len(places) + 1.1) + 0.9, 3.6),
        f"{name_text(depths[0]['task']).capitalize()}: {name.split(':')[0].split(' of')[0]} by length and depth",
        setting,
        f"{_samples([count])} per cell, the same in every arm; dense first",
    )
    colors = matplotlib.colormaps["cividis"]
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (title, values) in zip(axes, panels.items(), strict=False):
        _map(ax, values, norm, colors, cell_share if metric == "score" else lambda value: f"{value:.2f}")
        panel_title(ax, name_text(title, 28))
        stride = math.ceil(len(lengths) / 8)
        ax.set_xticks(range(0, len(lengths), stride), [f"{n:,}" for n in lengths[::stride]])
        ax.set_yticks(range(len(places)), [f"{d:.3g}" for d in places])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - across) : len(panels)]:
        ax.tick_params(labelbottom=True)
        label(ax, "length (tokens)", "")
    for ax in axes[::across]:
        label(ax, ax.get_xlabel(), "depth of the needle (share)")
    color_bar(list(axes), norm, colors, text=name, size=SMALL, fraction=0.04, pad=0.02, aspect=24)
    return figure


def positions(results: Sequence[Result], arms: Mapping[str, Look] | None = None, setting: str = "") -> Figure:
    """Divergence, and share of changed first choices, along one prompt: a line per arm.

    Args:
        results: the objects of `prompts` of one prompt and length.
        arms: see `looks`.
        setting: of what; the prompt by default.
    """
    one, style = results[0], _looks_of(results, arms)
    setting = setting or setting_text(prompts=[(one["prompt"], one["length"])])
    figure = new_figure(9.2, 4.5, "Along the prompt", setting, "sparse against dense")
    left, right = figure.subplots(1, 2)
    for r in results:
        curve = r["by_position"]
        edges = [*curve["position"], r["length"] - 1]
        line = {"color": style[r["arm"]].color, "linewidth": 1.6, "baseline": None, "label": legend_name(r["arm"], 24)}
        left.stairs(np.maximum(curve["kl"], ROUNDING), edges, **line)
        right.stairs(1 - np.asarray(curve["agreement"]), edges, **line)
    left.set_yscale("log")
    left.set_ylim(ROUNDING / 2, max(1e-4, 2 * max(max(r["by_position"]["kl"]) for r in results)))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(0, max(0.05, min(1.05, right.get_ylim()[1])))
    for axes, name in ((left, "KL(dense || sparse), nats"), (right, "first choice differs (share of tokens)")):
        tidy(axes)
        token_ticks(axes, x=True, count=5)
        label(axes, "position (tokens)", name)
    lines = [Line2D([], [], color=style[r["arm"]].color, label=legend_name(r["arm"], 24)) for r in results]
    legend_below(figure, columns=5, handles=lines)
    return figure


def perplexity(results: Sequence[Result], arms: Mapping[str, Look] | None = None, setting: str = "") -> Figure:
    """Change of perplexity with its 95% interval, prompt by prompt and arm by arm; arguments as for `positions`."""
    style, names = _looks_of(results, arms), _ordered(results, "arm")
    rows = list(dict.fromkeys((r["prompt"], r["length"]) for r in results))
    figure = new_figure(
        8.6,
        2.2 + len(rows) * (0.25 + 0.17 * len(names)),
        "Perplexity, sparse against dense",
        setting,
        "95% intervals by a paired block bootstrap over tokens; 0% is dense",
    )
    axes = figure.subplots()
    tidy(axes)
    axes.grid(False, axis="y")
    axes.axvline(0, color=MUTED, linewidth=1)
    for i, arm in enumerate(names):
        mine = [r for r in results if r["arm"] == arm]
        at = [rows.index((r["prompt"], r["length"])) + 0.6 * ((i + 0.5) / len(names) - 0.5) for r in mine]
        middle = np.array([r["perplexity_ratio"] for r in mine]) - 1
        ends = np.array([r["intervals"]["perplexity_ratio"] for r in mine]).T - 1
        error = np.maximum(np.stack([middle - ends[0], ends[1] - middle]), 0)
        axes.errorbar(middle, at, xerr=error, **_marks(style[arm]), linewidth=1.3, label=legend_name(arm, 28))
    dense = {(r["prompt"], r["length"]): r["perplexity_dense"] for r in results}
    labels = [f"{name_text(p, 24)}, {n:,}\ndense {dense[p, n]:.2f}" for p, n in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    _widen(axes.xaxis, CHANGE)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    label(axes, "change of perplexity", "")
    legend_below(figure, columns=5, handles=axes.get_legend_handles_labels()[0])
    return figure


def layers(results: Sequence[Result], arms: Mapping[str, Look] | None = None, setting: str = "") -> Figure:
    """Density and, where measured, recall of every layer while running; means over prompts, a line per arm.

    Arguments as for `positions`.
    """
    style, names = _looks_of(results, arms), _ordered(results, "arm")
    measured = any(layer["recall"] is not None for r in results for layer in r["layers"])
    panels = ("density", "recall") if measured else ("density",)
    figure = new_figure(
        max(4.6 * len(panels) + 0.4, 6.0),
        4.4,
        "Layer by layer, while running",
        setting,
        "means over heads and prompts; dense layers are at 1",
    )
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        least = 1.0
        for arm in names:
            found: dict[int, list[float]] = {}
            for layer in (x for r in results if r["arm"] == arm for x in r["layers"] if x[metric] is not None):
                found.setdefault(layer["layer"], []).append(layer[metric])
            x = sorted(found)
            y = [float(np.mean(found[n])) for n in x]
            least = min(least, *y) if y else least
            look = style[arm]
            axes.plot(x, y, marker=look.marker, markersize=3.5, color=look.color, linewidth=1.3)
        tidy(axes)
        token_ticks(axes, x=True)
        floor = 0.0 if metric == "density" else min(0.9, max(0.0, math.floor((least - 0.02) * 10) / 10))
        axes.set_ylim(floor, 1 + 0.02 * (1 - floor))
        label(axes, "layer", f"{metric} (share of {'pairs' if metric == 'density' else 'attention mass'} kept)")
    marks = [
        Line2D([], [], color=style[a].color, marker=style[a].marker, markersize=4, label=legend_name(a, 24))
        for a in names
    ]
    legend_below(figure, columns=5, handles=marks)
    return figure


def task_scores(
    results: Sequence[Result], metric: str = "score", arms: Mapping[str, Look] | None = None, setting: str = ""
) -> Figure:
    """Score, or log-probability of the answer, of every task against length: dense and each arm.

    A point without an interval, which a single sample has not, is hollow.
    """
    tasks, names = _ordered(results, "task"), _ordered(results, "arm")
    style = {"dense": Look(INK, "*"), **_looks_of(results, arms)}
    lengths = _ordered(results, "length")
    across = min(2, len(tasks))
    down = math.ceil(len(tasks) / across)
    unknown = any(r["intervals"][f"{metric}_dense"] is None for r in results)
    note = "bars: 95% intervals" + ("; hollow: one sample, no interval" if unknown else "")
    figure = new_figure(
        4.7 * across + (2.6 if across == 1 else 0),
        2.9 * down + 0.9,
        "Tasks: score by length" if metric == "score" else "Tasks: log-probability of the correct answer",
        setting,
        f"{_samples([r['samples'] for r in results])} per point, the same in every arm; {note}",
    )
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, task in zip(axes, tasks, strict=False):
        for i, arm in enumerate(["dense", *names]):
            mine = [r for r in results if r["task"] == task and r["arm"] == (arm if i else names[0])]
            shift = 0.5 * ((i + 0.5) / (len(names) + 1) - 0.5)
            _task_points(ax, mine, metric, "sparse" if i else "dense", style[arm], lengths, shift)
        tidy(ax)
        panel_title(ax, name_text(task))
        stride = math.ceil(len(lengths) / 6)
        ax.set_xticks(range(0, len(lengths), stride), [f"{n:,}" for n in lengths[::stride]])
        ax.set_xlim(-0.5, len(lengths) - 0.5)
        if metric == "score":
            ax.set_ylim(-0.04, 1.04)
        else:
            widths = [_interval_width(r, metric) for r in results if r["task"] == task]
            _widen(ax.yaxis, max(NATS if all(widths) else NATS_ALONE, 2 * max(widths)))
        label(ax, "length (tokens)", "score (share found)" if metric == "score" else "log-prob. (nats per token)")
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    marks = [
        Line2D([], [], linestyle="none", **_face(look), markersize=8 if look.marker == "*" else 5, label=name)
        for name, look in ((legend_name(arm, 24), style[arm]) for arm in ("dense", *names))
    ]
    legend_below(figure, columns=5, handles=marks)
    return figure


def _task_points(
    axes: Axes, results: Sequence[Result], metric: str, side: str, look: Look, lengths: Sequence[int], shift: float
) -> None:
    """The points of one arm, hollow where their interval is not known."""
    name = f"{metric}_{side}"
    for known in (True, False):
        mine = [r for r in results if (r["intervals"][name] is not None) == known]
        if not mine:
            continue
        x = [lengths.index(r["length"]) + shift for r in mine]
        y = np.array([r[name] for r in mine])
        ends = np.array([r["intervals"][name] or [v, v] for r, v in zip(mine, y, strict=True)]).T
        error = np.maximum(np.stack([y - ends[0], ends[1] - y]), 0) if known else None
        marks = {**_marks(look), "markersize": 8 if look.marker == "*" else 5}
        axes.errorbar(x, y, yerr=error, **marks, linewidth=1.2, markerfacecolor=look.color if known else "white")


def _interval_width(result: Result, metric: str) -> float:
    """The wider of the intervals of both sides; 0 where one is not known."""
    ends = [result["intervals"][f"{metric}_{side}"] for side in ("dense", "sparse")]
    return 0.0 if None in ends else max(float(high - low) for low, high in ends)


def _widen(axis: Axis, least: float) -> None:
    """Show a range of at least so much: differences that mean nothing should not fill a figure."""
    low, high = axis.get_view_interval()
    if high - low < least:
        middle = (low + high) / 2
        axis.set_view_interval(middle - least / 2, middle + least / 2, ignore=True)
        axis.axes.autoscale(False)


def _face(look: Look) -> dict[str, Any]:
    return {"color": look.color, "marker": look.marker}


def _marks(look: Look) -> dict[str, Any]:
    """Points with bars, for `errorbar`."""
    return {"fmt": look.marker, "color": look.color, "markersize": 5, "capsize": 2.5}


def _samples(counts: Sequence[int]) -> str:
    few, many = min(counts), max(counts)
    if few < many:
        return f"{few} to {many} samples"
    return f"{few} sample" if few == 1 else f"{few} samples"


def draw_all(report: Result, out: Path | str, *, formats: Mapping[str, int] | None = None) -> list[Path]:
    """Draw and save every figure that the results call for.

    Args:
        report: what evaluation.json holds.
        out: folder, made when missing.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.

    Raises:
        RunFailure: a file cannot be written.
    """
    return save_all(_figures(report), out, formats=formats)


def _figures(report: Result) -> Iterator[tuple[str, Figure]]:
    """File names and figures, one at a time."""
    prompts, tasks, depths = report["prompts"], report["tasks"], report["depths"]
    arms = looks(report["arms"])
    keys = list(dict.fromkeys((r["prompt"], r["length"]) for r in prompts))
    if prompts:
        yield "perplexity", perplexity(prompts, arms, _setting(report, keys))
        yield "layers", layers(prompts, arms, _setting(report, keys))
    several = {name for name, _ in keys if sum(name == other for other, _ in keys) > 1}
    called = {key: f"{key[0]}-{key[1]}" if key[0] in several else key[0] for key in keys}
    files = file_names([called[key] for key in keys])
    for key in keys:
        mine = [r for r in prompts if (r["prompt"], r["length"]) == key]
        yield f"{files[called[key]]}-positions", positions(mine, arms, _setting(report, [key]))
    setting = _setting(report)
    for task in _ordered(depths, "task"):
        mine = [r for r in depths if r["task"] == task]
        yield f"{task}-grid", needle_grid(mine, setting=setting)
        yield f"{task}-grid-logprob", needle_grid(mine, "logprob", setting)
    if tasks:
        yield "tasks", task_scores(tasks, arms=arms, setting=setting)
        yield "tasks-logprob", task_scores(tasks, "logprob", arms, setting)


def _setting(report: Result, prompts: Sequence[tuple[str, int]] = ()) -> str:
    """Model and prompts, and groups and thetas of all arms together."""
    arms = report["arms"]
    pairs = {group: group.split("x") for arm in arms for group in arm.get("groups", ())}
    groups = sorted((int(block), int(step)) for block, step in pairs.values())
    ends = {arm[end] for arm in arms for end in ("theta_low", "theta_high") if arm.get(end) is not None}
    thetas = sorted(ends, key=float)
    if len(thetas) < 2 or all(_one_theta(arm) is not None for arm in arms):
        return setting_text(report["model"], prompts, groups, thetas)
    between = f"thetas from {exact_theta(thetas[0])} to {theta_text(thetas[-1])}"  # and there may be others
    return setting_text(report["model"], prompts, groups, (), between)


def _ordered(results: Sequence[Result], key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in results))


def _grid(results: Sequence[Result], lengths: Sequence[int], places: Sequence[float], metric: str) -> np.ndarray:
    grid = np.full((len(places), len(lengths)), math.nan)
    for r in results:
        grid[places.index(r["depth"]), lengths.index(r["length"])] = r[metric]
    return grid


def _map(axes: Axes, values: np.ndarray, norm: Normalize, colors: Colormap, text: Callable[[float], str]) -> None:
    image = color_cells(values, colors, norm, missing="white")
    paint(axes, image)
    bare(axes)
    if values.shape[1] <= 12:
        write_numbers(axes, image, values, text, size=FIGURES)
