"""Figures of an analysis. Each function takes head profiles and returns a `Figure`; `save` makes files of them.

docs/figures.md explains how to read each. All are built without pyplot, so drawing keeps no global state, needs no
display and is safe in threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

from anchorscope.errors import InputError
from anchorscope.plots.maps import LayerHead, cell_share, color_bar, color_cells, paint, theta_cells, write_numbers
from anchorscope.plots.notes import Notes
from anchorscope.plots.style import (
    ALONE,
    BLUE,
    DENSE,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    SKY,
    THETA,
    joined,
    label,
    legend_below,
    new_figure,
    panel_title,
    plain_log,
    profile_setting,
    share,
    shown_positions,
    theta_colors,
    tidy,
    token_ticks,
)
from anchorscope.profiles import HeadProfile
from anchorscope.shown import exact_theta

_MEAN: dict[str, Any] = {"color": BLUE, "linewidth": 2.6}
_ORACLE: dict[str, Any] = {"color": ORANGE, "linewidth": 2.0, "linestyle": (0, (5, 2))}
_TARGET: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": ":"}


def layer_head_grid(
    profiles: Sequence[HeadProfile], *, target_recall: float = 0.95, model: object = None, note: str = ""
) -> Figure:
    """Recall and sparsity at the first theta, and the theta each head needs, as three layer x head grids.

    Args:
        profiles: heads of one prompt, in any order; heads that are missing are left gray.
        target_recall: heads below it are framed, and the third grid shows the theta that reaches it.
        model: its name, or its record in a report.
        note: words above the figure, behind those that sum it up.

    Raises:
        InputError: no profile, or profiles of different prompts or thetas.
    """
    first = _same(profiles)
    grid = LayerHead(((p.layer, p.head) for p in profiles), {p.head: p.kv_head for p in profiles})
    layers, heads = grid.layers, grid.heads
    recall = grid.fill((p.layer, p.head, p.recall[0]) for p in profiles)
    sparsity = grid.fill((p.layer, p.head, p.sparsity[0]) for p in profiles)
    needed = {(p.layer, p.head): p.theta_at_recall(target_recall) for p in profiles}
    theta = grid.fill((*at, math.inf if t is None else t) for at, t in needed.items())
    short = recall < target_recall

    cell_height = grid.row_height(0.21, 5.6)
    panel = min(max(0.46 * len(heads), 2.9), 4.6)
    height = cell_height * len(layers) + 2.25
    title = "Recall, sparsity and the theta needed, head by head"
    finding = (
        f"mean recall {share(float(np.nanmean(recall)))} at sparsity {share(float(np.nanmean(sparsity)))}  |  "
        f"{int(short.sum())} of {len(profiles)} heads below recall {target_recall:g}"
    )
    setting = profile_setting(first, model, thetas=first.thetas[:1])
    figure = new_figure(max(3 * panel + 1.9, 11.0), height, title, setting, joined(finding, note))
    panels = figure.subplots(1, 3, squeeze=True)
    at_theta = f"at theta {exact_theta(float(first.thetas[0]))}"
    floor = min(0.9, math.floor(float(np.nanmin(recall)) * 10) / 10)
    _share_grid(panels[0], recall, f"recall {at_theta}", "cividis", (floor, 1.0), below=target_recall)
    _share_grid(panels[1], sparsity, f"sparsity {at_theta}", "viridis", (0.0, 1.0))
    image, norm = theta_cells(theta)
    _grid(panels[2], theta, image, f"theta needed for recall {target_recall:g} (nats)", _digits_up)
    if norm is not None:
        color_bar(panels[2], norm, THETA, **_BAR)

    for axes in panels:
        grid.ticks(axes, most=(32, 16), color="black")
        grid.kv_lines(axes, wide=2.2, narrow=1.2)
    thin = 1.6 if len(heads) <= 16 else 1.0
    for row, column in np.argwhere(short):
        frame = Rectangle((column - 0.44, row - 0.42), 0.88, 0.84, fill=False, edgecolor=RED, linewidth=thin)
        panels[0].add_patch(frame)
    patches: tuple[tuple[bool, dict[str, Any], str], ...] = (
        (True, {"fill": False, "edgecolor": RED, "linewidth": 1.6}, f"recall below {target_recall:g}"),
        (bool(np.isneginf(theta).any()), {"facecolor": ALONE}, "anchor region alone reaches it (-inf)"),
        (bool(np.isposinf(theta).any()), {"facecolor": DENSE}, "only dense attention reaches it (inf)"),
        (bool(np.isnan(recall).any()), {"facecolor": PAPER}, "not analyzed"),
        (bool(grid.breaks), {"facecolor": "white"}, "white line: next kv head"),
    )
    handles = [Patch(**{"edgecolor": MUTED, **look}, label=text) for there, look, text in patches if there]
    legend_below(figure, columns=len(handles), handles=handles)
    return figure


def recall_density(
    profiles: Sequence[HeadProfile], *, target_recall: float = 0.95, model: object = None, note: str = ""
) -> Figure:
    """Recall against density of all heads of a layer, their mean at one theta, and the stripe oracle.

    The mean line moves all heads along with one theta. The oracle gets the same mean density and may share it out over
    the heads as it likes, always adding the column with most attention mass per pair: no selection of stripes by group
    keeps more, whatever thetas it uses.

    Args:
        profiles: heads of one layer and prompt.
        target_recall: drawn as a horizontal line.
        model: its name, or its record in a report.
        note: words above the figure, behind those that sum it up.

    Raises:
        InputError: no profile, or profiles of different prompts or thetas.
    """
    first = _same(profiles)
    profiles = sorted(profiles, key=lambda p: p.head)
    _, density, recall = mean_curve(profiles)
    oracle_density, oracle_recall = pooled_oracle(profiles)
    at = np.stack([[p.density, p.recall] for p in profiles]).mean(0)  # [2, T]
    needed = _crossing(density, recall, target_recall)
    best = _crossing(oracle_density, oracle_recall, target_recall)
    finding = f"density for mean recall {target_recall:g}: "
    finding += f"{_or_none(needed)} with one theta, {_or_none(best)} for the oracle"
    shown = _thetas_shown(first.thetas, 6)
    setting = profile_setting(first, model, thetas=first.thetas[shown])
    figure = new_figure(9.6, 6.2, f"Recall against density, layer {first.layer}", setting, joined(finding, note))
    axes = figure.subplots()
    for p in profiles:
        axes.plot(*p.curve(), color=SKY, linewidth=0.9, alpha=0.75, zorder=2)
    marks = np.array([[p.density[0], p.recall[0]] for p in profiles])
    axes.scatter(marks[:, 0], marks[:, 1], s=13, color=SKY, edgecolor="white", linewidth=0.4, zorder=3)
    axes.plot(oracle_density, oracle_recall, **_ORACLE, zorder=4)
    axes.plot(density, recall, **_MEAN, zorder=5)
    axes.scatter(at[0, shown], at[1, shown], s=44, facecolor="white", edgecolor=BLUE, linewidth=1.8, zorder=6)
    axes.scatter(at[0, :1], at[1, :1], s=52, color=BLUE, zorder=7)
    axes.axhline(target_recall, **_TARGET, zorder=1)
    least = min(float(density.min()), *(float(p.density.min()) for p in profiles))
    _recall_density_axes(axes, least, min(float(p.curve_recall[0]) for p in profiles))

    few = len(profiles) <= 12
    of_heads = f"a head; dot at theta {exact_theta(float(first.thetas[0]))}{', with its number' if few else ''}"
    handles = [
        Line2D([], [], color=SKY, linewidth=1.2, marker="o", markersize=4, label=of_heads),
        Line2D([], [], **_MEAN, marker="o", markersize=6, label="mean of heads, one theta for all"),
        Line2D([], [], **_ORACLE, label="stripe oracle at the same mean density"),
        Line2D([], [], **_TARGET, label=f"target recall {target_recall:g}"),
    ]
    legend_below(figure, columns=2, handles=handles)
    notes = Notes(axes, [*at[:, shown].T, *marks])
    for t in shown:
        notes.write(at[:, t], f"theta {exact_theta(float(first.thetas[t]))}", color=BLUE, bold=t == 0)
    for p, mark in zip(profiles, marks, strict=True) if few else ():
        notes.write(mark, str(p.head), color=MUTED)
    return figure


def _recall_density_axes(axes: Axes, least: float, lowest: float) -> None:
    """Axes from the `least` density (logarithmic where that is small) and the `lowest` recall to 1."""
    logarithmic = least < 0.25
    axes.set_xlim((least * 0.8, 1.02) if logarithmic else (max(0.0, least - 0.06), 1.005))
    if logarithmic:
        axes.set_xscale("log")
        plain_log(axes.xaxis, LogLocator(10, subs=(1.0, 2.0, 5.0)))
    floor = min(max(0.0, math.floor((lowest - 0.01) * 20) / 20), 0.9)
    axes.set_ylim(floor, 1.0 + 0.02 * (1.0 - floor))
    tidy(axes)
    label(
        axes,
        "density: kept / visible (query, key) pairs" + (", log scale" if logarithmic else ""),
        "recall: attention mass kept",
    )


def recall_by_position(profiles: Sequence[HeadProfile], *, model: object = None, note: str = "") -> Figure:
    """Recall of the queries by their position: each head of a layer at the first theta, and the mean at every theta.

    Args:
        profiles: heads of one layer and prompt.
        model: its name, or its record in a report.
        note: words above the figure, behind those that sum it up.

    Raises:
        InputError: no profile, or profiles of different prompts or thetas.
    """
    first = _same(profiles)
    edges, rows = shown_positions(first.position_edges, np.stack([p.position_recall for p in profiles]))
    mean = rows.mean(0)
    last = float(np.mean([p.recall_last[0] for p in profiles]))
    worst = min(profiles, key=lambda p: float(p.recall_p05[0]))
    theta = exact_theta(float(first.thetas[0]))
    finding = (
        f"at theta {theta}: mean recall of the last block {share(last)}  |  "
        f"worst 5% of queries: head {worst.head}, recall {share(float(worst.recall_p05[0]))} or less"
    )
    shown = _thetas_shown(first.thetas)
    setting = profile_setting(first, model, thetas=first.thetas[shown])
    figure = new_figure(9.6, 4.8, f"Recall by query position, layer {first.layer}", setting, joined(finding, note))
    axes = figure.subplots()
    for row in rows:
        axes.stairs(row[0], edges, baseline=None, color=SKY, linewidth=0.8, alpha=0.7)
    handles = [Line2D([], [], color=SKY, linewidth=1.0, label=f"a head at theta {theta}")]
    looks: list[dict[str, Any]] = [
        {"color": color, "linewidth": 1.4, "zorder": 3} for color in theta_colors(first.thetas[shown])
    ]
    looks[0] = {"color": BLUE, "linewidth": 2.4, "zorder": 4}
    for t, look in sorted(zip(shown, looks, strict=True), key=lambda x: float(first.thetas[x[0]])):
        axes.stairs(mean[t], edges, baseline=None, **look)
        text = f"mean of heads at theta {exact_theta(float(first.thetas[t]))}"
        handles.append(Line2D([], [], color=look["color"], linewidth=look["linewidth"], label=text))
    low = min(float(rows[:, 0].min()), float(mean[shown].min()))
    floor = min(0.9, max(0.0, math.floor((low - 0.02) * 10) / 10))
    axes.set_ylim(floor, 1 + 0.02 * (1 - floor))
    axes.set_xlim(0, first.tokens)
    token_ticks(axes, x=True, count=8)
    tidy(axes)
    label(axes, "query position (tokens)", "recall: attention mass kept")
    legend_below(figure, columns=3, handles=handles)
    return figure


def mean_curve(profiles: Sequence[HeadProfile]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Theta, mean density and mean recall of several heads that share one theta, each (points,) float64.

    Heads may have been measured on different theta grids: each contributes its largest grid point that is not above
    theta, which it reaches for certain.
    """
    theta = np.unique(np.concatenate([p.curve_theta for p in profiles]))
    density, recall = np.zeros(theta.size), np.zeros(theta.size)
    for p in profiles:
        at = np.searchsorted(p.curve_theta, theta, side="right") - 1
        density += p.curve_pairs[at] / p.visible_pairs
        recall += p.curve_recall[at]
    return theta, density / len(profiles), recall / len(profiles)


def pooled_oracle(profiles: Sequence[HeadProfile]) -> tuple[np.ndarray, np.ndarray]:
    """Mean density and mean recall of the stripe oracle that shares one budget of pairs out over several heads.

    Each head's oracle runs by falling mass per pair, so taking the steepest remaining piece of any head is optimal.
    """
    cost = np.concatenate([np.diff(p.oracle_pairs / p.visible_pairs) for p in profiles])
    gain = np.concatenate([np.diff(p.oracle_recall) for p in profiles])
    with np.errstate(divide="ignore", invalid="ignore"):
        steepest = np.argsort(-np.where(cost > 0, gain / cost, np.inf), kind="stable")
    start = np.array([[p.oracle_pairs[0] / p.visible_pairs, p.oracle_recall[0]] for p in profiles]).mean(0)
    grown = np.stack([cost, gain])[:, steepest].cumsum(1) / len(profiles)
    return np.append(start[0], start[0] + grown[0]), np.append(start[1], start[1] + grown[1])


def _same(profiles: Sequence[HeadProfile]) -> HeadProfile:
    """The first profile, after checking that all share prompt, length, thetas and anchor parameters."""
    if not profiles:
        raise InputError("no head profiles to draw")
    first = profiles[0]
    for p in profiles:
        if (p.prompt, p.tokens, p.params) != (first.prompt, first.tokens, first.params):
            raise InputError("profiles in one figure must share the prompt, its length and the anchor parameters")
        if not np.array_equal(p.thetas, first.thetas) or not np.array_equal(p.position_edges, first.position_edges):
            raise InputError("profiles in one figure must share the thetas and position bins")
    return first


def _or_none(value: float | None) -> str:
    return "not reached" if value is None else share(value)


def _crossing(density: np.ndarray, recall: np.ndarray, target: float) -> float | None:
    """Density of the first point of a rising curve that reaches this recall: measured, not interpolated."""
    reached = np.flatnonzero(recall >= target)
    return float(density[reached[0]]) if reached.size else None


_BAR: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.05, "pad": 0.02, "aspect": 34}


def _share_grid(
    axes: Axes, values: np.ndarray, title: str, cmap: str, span: tuple[float, float], *, below: float = 1.0
) -> None:
    """A grid of shares with its color bar; no number looks like `below` or 1 that is less."""
    colors, norm = matplotlib.colormaps[cmap], Normalize(*span)
    _grid(axes, values, color_cells(values, colors, norm), title, lambda value: cell_share(value, below=below))
    color_bar(axes, norm, colors, **_BAR)


def _grid(axes: Axes, values: np.ndarray, image: np.ndarray, title: str, text: Callable[[float], str]) -> None:
    """One grid; numbers in the cells where they fit."""
    paint(axes, image)
    panel_title(axes, title, pad=6)
    if values.shape[1] <= 10 and values.shape[0] <= 32:
        write_numbers(axes, image, values, text)


def _digits_up(theta: float) -> str:
    """A theta rounded up to one decimal, so that it still suffices."""
    return f"{math.ceil(theta * 10 - 1e-6) / 10:.1f}" if math.isfinite(theta) else exact_theta(theta)


def _thetas_shown(thetas: np.ndarray, most: int = 4) -> list[int]:
    """Indices of the first theta and a few others spread over the range asked."""
    others = sorted(range(1, thetas.size), key=lambda t: float(thetas[t]))
    if len(others) > most - 1:
        others = [others[round(i)] for i in np.linspace(0, len(others) - 1, most - 1)]
    return [0, *others]
