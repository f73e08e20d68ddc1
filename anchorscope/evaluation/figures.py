"""Figures of an evaluation: functions take objects of evaluation.json, return a `Figure`; `draw_all` saves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from anchorscope.plots.maps import bare, color_bar, color_cells, paint, write_numbers
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
    legend_name,
    new_figure,
    panel_title,
    tidy,
    token_ticks,
)
from anchorscope.shown import short_name

ARM_COLORS = (BLUE, ORANGE, GREEN, RED, SKY)
MARKERS = "osD^v"
ROUNDING = 1e-7  # nats; what is smaller is drawn there
Result = Mapping[str, Any]


def needle_grid(depths: Sequence[Result], metric: str = "score") -> Figure:
    """Length x depth maps of the needle task: dense, then every sparse arm.

    Args:
        depths: the objects of `depths`, one per length, depth and arm, of one task.
        metric: "score" (share of expected strings found) or "logprob" (of the correct answer, nats per token).
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
        down * (0.42 * len(places) + 1.1) + 0.9,
        f"{depths[0]['task'].capitalize()}: {name.split(':')[0].split(' of')[0]} by length and depth",
        f"{count} {'sample' if count == 1 else 'samples'} per cell, the same in every arm; dense first",
    )
    colors = matplotlib.colormaps["cividis"]
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (title, values) in zip(axes, panels.items(), strict=False):
        _map(ax, values, norm, colors)
        panel_title(ax, short_name(title, 28))
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        ax.set_yticks(range(len(places)), [f"{d:.0%}" for d in places])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - across) : len(panels)]:
        ax.tick_params(labelbottom=True)
        label(ax, "length (tokens)", "")
    for ax in axes[::across]:
        label(ax, ax.get_xlabel(), "depth of the needle")
    color_bar(list(axes), norm, colors, text=name, size=SMALL, fraction=0.04, pad=0.02, aspect=24)
    return figure


def positions(results: Sequence[Result]) -> Figure:
    """Divergence, and share of changed first choices, along one prompt: a line per arm."""
    one = results[0]
    figure = new_figure(
        9.2, 4.3, f"Along the prompt: {short_name(one['prompt'])}", f"{one['length']:,} tokens; sparse against dense"
    )
    left, right = figure.subplots(1, 2)
    for i, r in enumerate(results):
        curve = r["by_position"]
        edges = [*curve["position"], r["length"] - 1]
        style = {"color": ARM_COLORS[i % 5], "linewidth": 1.6, "label": legend_name(r["arm"], 24), "baseline": None}
        left.stairs(np.maximum(curve["kl"], ROUNDING), edges, **style)
        right.stairs(1 - np.asarray(curve["agreement"]), edges, **style)
    left.set_yscale("log")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(bottom=0)
    for axes, name in ((left, "KL(dense || sparse), nats"), (right, "first choice differs (share of tokens)")):
        tidy(axes)
        token_ticks(axes, x=True, count=5)
        label(axes, "position (tokens)", name)
    legend(right, loc="best")
    return figure


def perplexity(results: Sequence[Result]) -> Figure:
    """Change of perplexity with its 95% interval, prompt by prompt and arm by arm."""
    arms = _ordered(results, "arm")
    rows = list(dict.fromkeys((r["prompt"], r["length"]) for r in results))
    figure = new_figure(
        8.6,
        2.2 + len(rows) * (0.25 + 0.17 * len(arms)),
        "Perplexity, sparse against dense",
        "95% intervals by a paired block bootstrap over tokens; 0% is dense",
    )
    axes = figure.subplots()
    tidy(axes)
    axes.grid(False, axis="y")
    axes.axvline(0, color=MUTED, linewidth=1)
    for i, arm in enumerate(arms):
        mine = [r for r in results if r["arm"] == arm]
        at = [rows.index((r["prompt"], r["length"])) + 0.6 * ((i + 0.5) / len(arms) - 0.5) for r in mine]
        middle = np.array([r["perplexity_ratio"] for r in mine]) - 1
        ends = np.array([r["intervals"]["perplexity_ratio"] for r in mine]).T - 1
        error = np.maximum(np.stack([middle - ends[0], ends[1] - middle]), 0)
        axes.errorbar(
            middle,
            at,
            xerr=error,
            fmt=MARKERS[i % 5],
            color=ARM_COLORS[i % 5],
            markersize=5,
            capsize=2.5,
            linewidth=1.3,
            label=legend_name(arm, 28),
        )
    dense = {(r["prompt"], r["length"]): r["perplexity_dense"] for r in results}
    names = [f"{short_name(p, 24)}, {n:,}\ndense {dense[p, n]:.2f}" for p, n in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    label(axes, "change of perplexity", "")
    _legend_below(figure, axes)
    return figure


def layers(results: Sequence[Result]) -> Figure:
    """Density and, where measured, recall of every layer while running; means over prompts, a line per arm."""
    arms = _ordered(results, "arm")
    measured = any(layer["recall"] is not None for r in results for layer in r["layers"])
    panels = ("density", "recall") if measured else ("density",)
    figure = new_figure(
        4.6 * len(panels) + 0.4,
        4.2,
        "Layer by layer, while running",
        "means over heads and prompts; dense layers are at 1",
    )
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for i, arm in enumerate(arms):
            found: dict[int, list[float]] = {}
            for layer in (x for r in results if r["arm"] == arm for x in r["layers"] if x[metric] is not None):
                found.setdefault(layer["layer"], []).append(layer[metric])
            x = sorted(found)
            axes.plot(
                x,
                [float(np.mean(found[n])) for n in x],
                marker=MARKERS[i % 5],
                markersize=3.5,
                color=ARM_COLORS[i % 5],
                linewidth=1.3,
                label=legend_name(arm, 24),
            )
        tidy(axes)
        token_ticks(axes, x=True)
        if metric == "density":
            axes.set_ylim(0, 1.02)
        label(axes, "layer", f"{metric} (share of {'pairs' if metric == 'density' else 'attention mass'} kept)")
        legend(axes, loc="best")
    return figure


def task_scores(results: Sequence[Result], metric: str = "score") -> Figure:
    """Score, or log-probability of the answer, of every task against length: dense and each arm."""
    tasks, arms = _ordered(results, "task"), _ordered(results, "arm")
    lengths = _ordered(results, "length")
    across = min(2, len(tasks))
    down = math.ceil(len(tasks) / across)
    note = "bars: 95% intervals"
    name = "score (share found)" if metric == "score" else "log-probability (nats per token)"
    counts = sorted({r["samples"] for r in results})
    many = f"{counts[0]} samples" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} samples"
    figure = new_figure(
        4.7 * across + (2.6 if across == 1 else 0),
        2.9 * down + 0.9,
        "Tasks: score by length" if metric == "score" else "Tasks: log-probability of the correct answer",
        f"{many} per point, the same in every arm; {note}",
    )
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, task in zip(axes, tasks, strict=False):
        for i, arm in enumerate(["dense", *arms]):
            side = "dense" if i == 0 else "sparse"
            mine = [r for r in results if r["task"] == task and r["arm"] == (arms[0] if i == 0 else arm)]
            x = np.array([lengths.index(r["length"]) for r in mine]) + 0.5 * ((i + 0.5) / (len(arms) + 1) - 0.5)
            y = np.array([r[f"{metric}_{side}"] for r in mine])
            ends = np.array([r["intervals"][f"{metric}_{side}"] or [v, v] for r, v in zip(mine, y, strict=True)]).T
            ax.errorbar(
                x,
                y,
                yerr=np.maximum(np.stack([y - ends[0], ends[1] - y]), 0),
                fmt="*" if i == 0 else MARKERS[(i - 1) % 5],
                color=INK if i == 0 else ARM_COLORS[(i - 1) % 5],
                markersize=8 if i == 0 else 5,
                capsize=2.5,
                linewidth=1.2,
                label=legend_name(arm, 20),
            )
        tidy(ax)
        panel_title(ax, task)
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        ax.set_xlim(-0.5, len(lengths) - 0.5)
        if metric == "score":
            ax.set_ylim(-0.04, 1.04)
        label(ax, "length (tokens)", name)
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    _legend_below(figure, axes[0])
    return figure


def draw_all(report: Result, out: Path | str) -> list[Path]:
    """Draw and save every figure that the results call for.

    Raises:
        RunFailure: a file cannot be written.
    """
    figures: dict[str, Figure] = {}
    prompts, tasks, depths = report["prompts"], report["tasks"], report["depths"]
    if prompts:
        figures["perplexity"] = perplexity(prompts)
        figures["layers"] = layers(prompts)
        for i, key in enumerate(dict.fromkeys((r["prompt"], r["length"]) for r in prompts)):
            mine = [r for r in prompts if (r["prompt"], r["length"]) == key]
            figures[f"prompt{i:02d}-positions"] = positions(mine)
    for task in _ordered(depths, "task"):
        mine = [r for r in depths if r["task"] == task]
        figures[f"{task}-grid"] = needle_grid(mine)
        figures[f"{task}-grid-logprob"] = needle_grid(mine, "logprob")
    if tasks:
        figures["tasks"] = task_scores(tasks)
        figures["tasks-logprob"] = task_scores(tasks, "logprob")
    return save_all(figures.items(), out)


def _ordered(results: Sequence[Result], key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in results))


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    legend(figure, handles=handles, labels=names, loc="outside lower left", ncols=5)


def _grid(results: Sequence[Result], lengths: Sequence[int], places: Sequence[float], metric: str) -> np.ndarray:
    grid = np.full((len(places), len(lengths)), math.nan)
    for r in results:
        grid[places.index(r["depth"]), lengths.index(r["length"])] = r[metric]
    return grid


def _map(axes: Axes, values: np.ndarray, norm: Normalize, colors: Colormap) -> None:
    image = color_cells(values, colors, norm, missing="white")
    paint(axes, image)
    bare(axes)
    if values.shape[1] <= 12:
        write_numbers(axes, image, values, lambda value: f"{value:.2f}", size=SMALL)
