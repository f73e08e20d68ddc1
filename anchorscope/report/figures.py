"""The figures. Each function takes head profiles and returns a `Figure`; `anchorscope.report.write` saves them.

docs/figures.md explains how to read each. All are built without pyplot, so drawing keeps no global state, needs no
display and is safe in threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from anchorscope.errors import InputError
from anchorscope.profiles import HeadProfile
from anchorscope.report.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MISSED,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    SKY,
    SMALL,
    TEXT,
    label,
    legend,
    nats,
    new_figure,
    share,
    short_name,
    tidy,
    token_ticks,
)

MASS_FLOOR = 1e-5  # low end of the heat map's colours, the same in all figures so that heads compare
SHOWN_ROWS, SHOWN_COLUMNS = 64, 480  # cells drawn: more would be narrower than a pixel and could vanish


def layer_head_grid(profiles: Sequence[HeadProfile], *, target_recall: float = 0.95) -> Figure:
    """Recall and sparsity at the first theta, and the theta each head needs, as three layer x head grids.

    Args:
        profiles: heads of one prompt, in any order; heads that are missing are left grey.
        target_recall: heads below it are framed, and the third grid shows the theta that reaches it.

    Raises:
        InputError: no profile, or profiles of different prompts or thetas.
    """
    first = _same(profiles)
    layers = sorted({p.layer for p in profiles})
    heads = sorted({p.head for p in profiles})
    place = {(p.layer, p.head): (layers.index(p.layer), heads.index(p.head)) for p in profiles}
    recall, sparsity, theta = (np.full((len(layers), len(heads)), math.nan) for _ in range(3))
    for p in profiles:
        cell = place[p.layer, p.head]
        recall[cell], sparsity[cell] = p.recall[0], p.sparsity[0]
        needed = p.theta_at_recall(target_recall)
        theta[cell] = math.inf if needed is None else needed
    short = recall < target_recall

    cell_height = 0.42 if len(layers) <= 8 else max(0.21, min(0.42, 5.6 / len(layers)))
    panel = min(max(0.46 * len(heads), 2.9), 4.6)
    height = cell_height * len(layers) + 2.25
    title = f"Recall, sparsity and the theta needed: {short_name(first.prompt)}"
    subtitle = (
        f"{_setting(first)}  |  mean recall {share(float(np.nanmean(recall)))} at sparsity "
        f"{share(float(np.nanmean(sparsity)))}  |  {int(short.sum())} of {len(profiles)} heads "
        f"below {target_recall:g}"
    )
    figure = new_figure(max(3 * panel + 1.9, 11.0), height, title, subtitle)
    panels = figure.subplots(1, 3, squeeze=True)
    at_theta = f"at theta {nats(float(first.thetas[0]))}"
    floor = min(0.9, math.floor(float(np.nanmin(recall)) * 10) / 10)
    _grid(panels[0], recall, f"recall {at_theta}", "cividis", (floor, 1.0))
    _grid(panels[1], sparsity, f"sparsity {at_theta}", "viridis", (0.0, 1.0))
    finite = theta[np.isfinite(theta)]
    span = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    span = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)
    _grid(panels[2], theta, f"theta needed for recall {target_recall:g} (nats)", "magma", span, up=True)

    breaks = _kv_breaks(profiles, heads)
    for axes in panels:
        _grid_ticks(axes, layers, heads)
        for at in breaks:
            axes.axvline(at, color="white", linewidth=2.2 if len(heads) <= 16 else 1.2)
    thin = 1.6 if len(heads) <= 16 else 1.0
    for row, column in np.argwhere(short):
        frame = Rectangle((column - 0.44, row - 0.42), 0.88, 0.84, fill=False, edgecolor=RED, linewidth=thin)
        panels[0].add_patch(frame)
    handles = [Patch(fill=False, edgecolor=RED, linewidth=1.6, label=f"recall below {target_recall:g}")]
    if np.isneginf(theta).any():
        handles.append(Patch(facecolor=_ALONE, edgecolor=MUTED, label="anchor region alone reaches it (-inf)"))
    if np.isposinf(theta).any():
        handles.append(Patch(facecolor=_DENSE, edgecolor=MUTED, label="only dense attention reaches it (inf)"))
    if np.isnan(recall).any():
        handles.append(Patch(facecolor=PAPER, edgecolor=MUTED, label="not analysed"))
    if breaks:
        handles.append(Patch(facecolor="white", edgecolor=MUTED, label="white line: next kv head"))
    legend(figure, handles=handles, loc="outside lower left", ncols=len(handles), borderaxespad=0.4)
    return figure


def recall_density(profiles: Sequence[HeadProfile], *, target_recall: float = 0.95) -> Figure:
    """Recall against density of all heads of a layer, their mean at one theta, and the stripe oracle.

    The mean line moves all heads along with one theta. The oracle gets the same mean density and may share it out over
    the heads as it likes, always adding the column with most attention mass per pair: no selection of stripes by group
    keeps more, whatever thetas it uses.

    Args:
        profiles: heads of one layer and prompt.
        target_recall: drawn as a horizontal line.

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
    subtitle = f"{_setting(first, thetas=False)}  |  density for mean recall {target_recall:g}: "
    subtitle += f"{_or_none(needed)} with one theta, {_or_none(best)} for the oracle"
    figure = new_figure(9.6, 6.2, f"Recall against density: {short_name(first.prompt)}, layer {first.layer}", subtitle)
    axes = figure.subplots()
    for p in profiles:
        axes.plot(*p.curve(), color=SKY, linewidth=0.9, alpha=0.75, zorder=2)
    marks = np.array([[p.density[0], p.recall[0]] for p in profiles])
    axes.scatter(marks[:, 0], marks[:, 1], s=13, color=SKY, edgecolor="white", linewidth=0.4, zorder=3)
    axes.plot(oracle_density, oracle_recall, color=ORANGE, linewidth=2.0, linestyle=(0, (5, 2)), zorder=4)
    axes.plot(density, recall, color=BLUE, linewidth=2.6, zorder=5)
    axes.scatter(at[0], at[1], s=44, facecolor="white", edgecolor=BLUE, linewidth=1.8, zorder=6)
    axes.scatter(at[0, :1], at[1, :1], s=52, color=BLUE, zorder=7)
    axes.axhline(target_recall, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)

    least = min(float(density.min()), *(float(p.density.min()) for p in profiles))
    logarithmic = least < 0.25
    axes.set_xlim((least * 0.8, 1.02) if logarithmic else (max(0.0, least - 0.06), 1.005))
    if logarithmic:
        axes.set_xscale("log")
        _plain_log_ticks(axes)
    floor = min(float(p.curve_recall[0]) for p in profiles)
    floor = max(0.0, math.floor((floor - 0.01) * 20) / 20)
    axes.set_ylim(min(floor, 0.9), 1.0 + 0.02 * (1.0 - min(floor, 0.9)))
    tidy(axes)
    label(
        axes,
        "density: kept / visible (query, key) pairs" + (", log scale" if logarithmic else ""),
        "recall: attention mass kept",
    )
    notes: list[Bbox] = []
    for t in _thetas_shown(first.thetas, 6):
        _note(axes, at[:, t], f"theta {nats(float(first.thetas[t]))}", (-7, 6), BLUE, notes, bold=t == 0)
    numbers = 0
    if len(profiles) <= 12:
        numbers = sum(
            _note(axes, mark, str(p.head), (9, -10), MUTED, notes) for p, mark in zip(profiles, marks, strict=True)
        )
    numbered = ", with its number" if numbers else ""
    theta_0 = nats(float(first.thetas[0]))
    handles = [
        Line2D(
            [],
            [],
            color=SKY,
            linewidth=1.2,
            marker="o",
            markersize=4,
            label=f"a head; dot at theta {theta_0}{numbered}",
        ),
        Line2D(
            [],
            [],
            color=BLUE,
            linewidth=2.6,
            marker="o",
            markersize=6,
            label="mean of heads, one theta for all",
        ),
        Line2D(
            [],
            [],
            color=ORANGE,
            linewidth=2.0,
            linestyle=(0, (5, 2)),
            label="stripe oracle at the same mean density",
        ),
        Line2D([], [], color=MUTED, linewidth=0.9, linestyle=":", label=f"target recall {target_recall:g}"),
    ]
    legend(axes, handles=handles, loc="lower right")
    return figure


def recall_by_position(profiles: Sequence[HeadProfile]) -> Figure:
    """Recall of the queries by their position: each head of a layer at the first theta, and the mean at every theta.

    Raises:
        InputError: no profile, or profiles of different prompts or thetas.
    """
    first = _same(profiles)
    edges, rows = _shown_positions(first.position_edges, np.stack([p.position_recall for p in profiles]))
    mean = rows.mean(0)
    last = float(np.mean([p.recall_last[0] for p in profiles]))
    worst = min(profiles, key=lambda p: float(p.recall_p05[0]))
    title = f"Recall by query position: {short_name(first.prompt)}, layer {first.layer}"
    subtitle = (
        f"{_setting(first)}  |  mean recall of the last block {share(last)}  |  "
        f"worst 5% of queries: head {worst.head}, recall {share(float(worst.recall_p05[0]))} or less"
    )
    figure = new_figure(9.6, 4.8, title, subtitle)
    axes = figure.subplots()
    for row in rows:
        axes.stairs(row[0], edges, baseline=None, color=SKY, linewidth=0.8, alpha=0.7)
    shown = _thetas_shown(first.thetas)
    shades = [BLUE, GREEN, ORANGE, RED]
    handles = [Line2D([], [], color=SKY, linewidth=1.0, label=f"a head at theta {nats(float(first.thetas[0]))}")]
    for shade, t in zip(shades, shown, strict=False):
        axes.stairs(
            mean[t],
            edges,
            baseline=None,
            color=shade,
            linewidth=2.4 if t == 0 else 1.3,
            zorder=4 if t == 0 else 3,
        )
        text = f"mean of heads at theta {nats(float(first.thetas[t]))}"
        handles.append(Line2D([], [], color=shade, linewidth=2.4 if t == 0 else 1.3, label=text))
    low = min(float(rows[:, 0].min()), float(mean[shown].min()))
    floor = min(0.9, max(0.0, math.floor((low - 0.02) * 10) / 10))
    axes.set_ylim(floor, 1 + 0.02 * (1 - floor))
    axes.set_xlim(0, first.tokens)
    token_ticks(axes, x=True, count=8)
    tidy(axes)
    label(axes, "query position (tokens)", "recall: attention mass kept")
    legend(figure, handles=handles, loc="outside lower left", ncols=3, borderaxespad=0.4)
    return figure


def stripe_heatmap(profile: HeadProfile) -> Figure:
    """Where a head's attention mass lies, what the first theta keeps of it, and what it misses.

    Left: attention mass by query group (down) and key position (across), anchor region outlined, stripes marked in a
    track along the lower edge of each group. Middle: the mass that is missed, over the regions that are kept. Right:
    recall by query position. The strips below sum over the queries.

    Raises:
        InputError: the profile was loaded without its heat map.
    """
    p = profile
    if p.heat_mass.size == 0:
        raise InputError(f"layer {p.layer}, head {p.head} was loaded without its heat map: load it with heat=True")
    cells = _shown_cells(p)
    n = p.tokens
    recall, density = float(p.recall[0]), float(p.density[0])
    theta = nats(float(p.thetas[0]))
    title = f"{short_name(p.prompt)}, layer {p.layer}, head {p.head} (kv head {p.kv_head})"
    title += f": what theta {theta} keeps"
    stripes = "no candidates" if p.candidate_pairs == 0 else f"stripe density {share(float(p.stripe_density[0]))}"
    subtitle = (
        f"{_setting(p, thetas=False)}  |  recall {share(recall)} at density {share(density)} "
        f"(sparsity {share(1 - density)}, "
        f"{stripes})  |  missed mass {share(max(0.0, 1 - recall))}"
    )
    figure = new_figure(13.4, 7.9, title, subtitle, constrained=False)
    grid = figure.add_gridspec(
        2,
        3,
        width_ratios=(1, 1, 0.22),
        height_ratios=(1, 0.16),
        left=0.066,
        right=0.985,
        bottom=0.185,
        top=0.88,
        wspace=0.085,
        hspace=0.1,
    )
    mass_axes = figure.add_subplot(grid[0, 0])
    miss_axes = figure.add_subplot(grid[0, 1], sharex=mass_axes, sharey=mass_axes)
    side_axes = figure.add_subplot(grid[0, 2], sharey=mass_axes)
    below = [figure.add_subplot(grid[1, c], sharex=mass_axes) for c in (0, 1)]

    colours = matplotlib.colormaps["magma"]
    norm = LogNorm(MASS_FLOOR, 1.0)
    _cells(mass_axes, cells, cells.mass, colours, norm)
    _cells(miss_axes, cells, cells.missed, MISSED, norm)
    _regions(mass_axes, p, outline="white", fill=None)
    _regions(miss_axes, p, outline=BLUE, fill=SKY)
    _track(mass_axes, cells, SKY, faintest=0.55)
    _track(miss_axes, cells, BLUE, faintest=0.25)
    for axes, text in ((mass_axes, "attention mass"), (miss_axes, "missed mass")):
        axes.set_title(text, size=TEXT, color=INK, loc="left", pad=4)
        _invisible(axes, n, p.window)
        axes.set_xlim(0, n)
        axes.set_ylim(n, 0)
        axes.tick_params(labelsize=SMALL, length=3, labelbottom=False)
    token_ticks(mass_axes, x=True, y=True)
    miss_axes.tick_params(labelleft=False)
    label(mass_axes, y="query position (tokens), groups top to bottom")

    total, missed = cells.by_key(cells.mass), cells.by_key(cells.missed)
    per = "key" if cells.width == 1 else f"{cells.width:,} keys"
    _strip(below[0], cells, total, INK, f"attention mass per {per}, all queries (log scale)", log=True)
    _strip(
        below[1],
        cells,
        missed,
        RED,
        f"missed mass per {per}, all queries",
        log=False,
    )
    below[1].yaxis.tick_right()
    for axes in below:
        label(axes, x="key position (tokens)")

    edges, by_position = _shown_positions(p.position_edges, p.position_recall[0])
    side_axes.stairs(by_position, edges, orientation="horizontal", baseline=1.0, fill=True, color=RED, alpha=0.35)
    side_axes.stairs(by_position, edges, orientation="horizontal", baseline=None, color=RED, linewidth=1.4)
    side_axes.axvline(recall, color=INK, linewidth=1.0, linestyle=":")
    floor = min(0.9, max(0.0, math.floor((float(by_position.min()) - 0.02) * 10) / 10))
    side_axes.set_xlim(floor, 1.0)
    side_axes.set_title("recall by query", size=TEXT, color=INK, loc="left", pad=4)
    tidy(side_axes)
    side_axes.tick_params(labelleft=False)
    side_axes.xaxis.set_major_locator(MaxNLocator(3))
    label(side_axes, "recall\n(dotted: mean)")

    for left, cmap, text in ((0.066, colours, "attention mass"), (0.3, MISSED, "missed mass")):
        bar = figure.colorbar(
            ScalarMappable(norm, cmap),
            cax=figure.add_axes((left, 0.072, 0.2, 0.018)),
            orientation="horizontal",
            extend="min",
        )
        bar.ax.tick_params(labelsize=SMALL, length=3)
        bar.set_label(f"{text} of a cell, mean per query", size=SMALL, color=INK)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=to_rgba(SKY, 0.35), edgecolor=BLUE, label="anchor region: always kept (outlined)"),
        Patch(
            facecolor=BLUE,
            edgecolor="none",
            label="stripes of the group (bar along its lower edge; stronger: more)",
        ),
        Patch(facecolor=RED, edgecolor="none", label="attention mass missed"),
        Patch(facecolor=PAPER, edgecolor=FAINT, hatch="///", label="not visible to the query"),
    ]
    if p.window is not None:
        handles.append(
            Line2D(
                [],
                [],
                color=MUTED,
                linestyle="--",
                linewidth=1.0,
                label=f"edge of the window of {p.window:,}",
            )
        )
    legend(figure, handles=handles, loc="lower right", bbox_to_anchor=(0.99, 0.012), ncols=2, frameon=False)
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


_ALONE, _DENSE = "#cfe8f7", "#4d4d4d"  # cells of the theta grid whose theta is -inf or +inf


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


def _setting(p: HeadProfile, *, thetas: bool = True) -> str:
    text = f"{p.tokens:,} tokens, groups of {p.block} x {p.step}"
    return f"{text}, theta {nats(float(p.thetas[0]))}" if thetas else text


def _or_none(value: float | None) -> str:
    return "not reached" if value is None else share(value)


def _crossing(density: np.ndarray, recall: np.ndarray, target: float) -> float | None:
    """Density at which a rising curve first has this recall, linear between points."""
    reached = np.flatnonzero(recall >= target)
    if reached.size == 0:
        return None
    i = int(reached[0])
    return float(density[0]) if i == 0 else float(np.interp(target, recall[i - 1 : i + 1], density[i - 1 : i + 1]))


def _grid(
    axes: Axes, values: np.ndarray, title: str, cmap: str, span: tuple[float, float], *, up: bool = False
) -> None:
    """One grid with its own colour bar; numbers in the cells where they fit.

    Shares are rounded down (0.997 is not "1.00": something is missed), a theta up (`up`), so that it still suffices.
    """
    colours = matplotlib.colormaps[cmap]
    norm = Normalize(*span)
    image = colours(norm(np.where(np.isfinite(values), values, span[0])))
    image[np.isnan(values)] = to_rgba(PAPER)
    image[np.isneginf(values)] = to_rgba(_ALONE)
    image[np.isposinf(values)] = to_rgba(_DENSE)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_title(title, size=TEXT, color=INK, loc="left", pad=6)
    if values.shape[1] <= 10 and values.shape[0] <= 32:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = float(np.dot(image[row, column, :3], (0.299, 0.587, 0.114))) < 0.55
                text = nats(float(value))
                if math.isfinite(value):
                    text = (
                        f"{math.ceil(value * 10 - 1e-6) / 10:.1f}"
                        if up
                        else f"{math.floor(value * 100 + 1e-6) / 100:.2f}"
                    )
                axes.text(column, row, text, size=7.5, ha="center", va="center", color="white" if dark else INK)
    bar = axes.figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=34
    )
    bar.ax.tick_params(labelsize=SMALL, length=3)
    bar.outline.set_visible(False)


def _grid_ticks(axes: Axes, layers: list[int], heads: list[int]) -> None:
    """Layer and head numbers, thinned where they would touch."""
    for axis, numbers, most in ((axes.yaxis, layers, 32), (axes.xaxis, heads, 16)):
        stride = math.ceil(len(numbers) / most)
        stride = stride if stride <= 2 else 4 * math.ceil(stride / 4)
        axis.set_ticks(range(0, len(numbers), stride), [str(x) for x in numbers[::stride]])
    axes.tick_params(labelsize=SMALL, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    label(axes, "query head", "layer")


def _kv_breaks(profiles: Sequence[HeadProfile], heads: list[int]) -> list[float]:
    """Column edges between query heads of different kv heads; none when every head has its own."""
    owner = {p.head: p.kv_head for p in profiles}
    if len(set(owner.values())) in (1, len(owner)):
        return []
    return [i - 0.5 for i in range(1, len(heads)) if owner[heads[i]] != owner[heads[i - 1]]]


def _thetas_shown(thetas: np.ndarray, most: int = 4) -> list[int]:
    """Indices of the first theta and a few others spread over the range asked."""
    others = sorted(range(1, thetas.size), key=lambda t: float(thetas[t]))
    if len(others) > most - 1:
        others = [others[round(i)] for i in np.linspace(0, len(others) - 1, most - 1)]
    return [0, *others]


def _note(
    axes: Axes,
    at: np.ndarray,
    text: str,
    shift: tuple[int, int],
    colour: str,
    taken: list[Bbox],
    *,
    bold: bool = False,
) -> bool:
    """A small text beside a data point, `shift` in points, unless it would touch one in `taken` (pixels)."""
    pixel = axes.figure.dpi / 72
    right, bottom = axes.transData.transform(at) + np.array(shift) * pixel
    # widths are estimated: measuring would need a renderer, and a letter more or less does not matter here
    box = Bbox.from_extents(right - 0.62 * SMALL * pixel * len(text), bottom, right, bottom + SMALL * pixel)
    if any(box.overlaps(other) for other in taken):
        return False
    taken.append(box)
    axes.annotate(
        text,
        (float(at[0]), float(at[1])),
        xytext=shift,
        textcoords="offset points",
        ha="right",
        size=SMALL,
        color=colour,
        weight="bold" if bold else "normal",
        zorder=8,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
    )
    return True


def _plain_log_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


class _Cells(NamedTuple):
    """The heat map as drawn: `rows` (R+1,) and `columns` (C+1,) edges in tokens, cells (R, C) float64."""

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    missed: np.ndarray
    stripes: np.ndarray

    @property
    def width(self) -> int:
        """Keys per cell."""
        return int(self.columns[1] - self.columns[0])

    def by_key(self, cells: np.ndarray) -> np.ndarray:
        """Mean over all queries, (C,)."""
        return np.diff(self.rows) @ cells / self.rows[-1]


def _shown_cells(p: HeadProfile) -> _Cells:
    """Cells coarse enough to be seen, summed over keys and averaged over queries."""
    rows, columns = p.heat_rows, p.heat_columns
    down = np.arange(0, rows.size - 1, math.ceil((rows.size - 1) / SHOWN_ROWS))
    across = np.arange(0, columns.size - 1, math.ceil((columns.size - 1) / SHOWN_COLUMNS))
    queries, keys = np.diff(rows).astype(float), np.diff(columns).astype(float)
    new_rows, new_columns = np.append(rows[down], rows[-1]), np.append(columns[across], columns[-1])

    def mean_rows(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x * queries[:, None], down, axis=0) / np.diff(new_rows)[:, None]

    mass, kept = p.heat_mass.astype(float), p.heat_kept.astype(float)
    # Both were rounded to float16; a difference of one unit in the last place is rounding, not missed mass.
    missed = np.where(mass - kept > mass * 2**-10, mass - kept, 0.0)
    stripes = np.add.reduceat(p.heat_stripes * keys, across, axis=1) / np.diff(new_columns)
    return _Cells(
        new_rows,
        new_columns,
        np.add.reduceat(mean_rows(mass), across, axis=1),
        np.add.reduceat(mean_rows(missed), across, axis=1),
        mean_rows(stripes),
    )


def _shown_positions(edges: np.ndarray, recall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and mean recall (last axis) of few enough bins of positions to tell lines apart."""
    first = np.arange(0, edges.size - 1, math.ceil((edges.size - 1) / SHOWN_ROWS))
    shown = np.append(edges[first], edges[-1])
    return shown, np.add.reduceat(recall * np.diff(edges), first, axis=-1) / np.diff(shown)


def _cells(axes: Axes, cells: _Cells, values: np.ndarray, cmap: Colormap, norm: LogNorm) -> None:
    axes.pcolormesh(
        cells.columns,
        cells.rows,
        np.maximum(values, MASS_FLOOR / 10),
        cmap=cmap,
        norm=norm,
        rasterized=True,
        zorder=1,
    )


def _regions(axes: Axes, p: HeadProfile, *, outline: str, fill: str | None) -> None:
    """The anchor region: local part of each group (a staircase up to the diagonal) and the first `init` keys."""
    n, group = p.tokens, p.params.group
    window = n if p.window is None else p.window
    face = "none" if fill is None else to_rgba(fill, 0.3)
    starts = np.arange(0, n, group)
    ends = np.minimum(starts + group, n)
    left = np.maximum(starts - p.lookback, 0)
    apart = left > p.init  # groups whose local part does not touch the first keys
    left = np.where(apart, left, 0)
    stairs = np.stack([np.stack([left, starts], 1), np.stack([left, ends], 1)], 1).reshape(-1, 2)
    _area(axes, [*stairs, (n, n)], face)
    stairs[:, 0] = np.maximum(stairs[:, 0], stairs[:, 1] - window)
    if window < n:
        axes.plot([0, n - window], [window, n], color=MUTED, linestyle="--", linewidth=1.0, zorder=4)
    if not apart.any():
        return
    top = int(starts[apart.argmax()])
    edge = stairs[2 * int(apart.argmax()) :]
    if p.init:
        _area(axes, [(0, top), (p.init, top), (p.init, n), (0, n)], face)
        reach = min(n, p.init + window)  # no query sees the first keys beyond that
        if reach > top:
            edge = np.concatenate([[(p.init, reach), (p.init, top)], edge])
    axes.plot(edge[:, 0], edge[:, 1], color=outline, linewidth=1.0, zorder=5)


def _area(axes: Axes, corners: Sequence[Sequence[float] | np.ndarray], colour: object) -> None:
    axes.add_patch(Polygon(np.array(corners, dtype=float), closed=True, facecolor=colour, edgecolor="none", zorder=2))


def _invisible(axes: Axes, n: int, window: int | None) -> None:
    """Hatched paper over the pairs no query sees: later keys, and keys before the window."""
    corners = [[(0, 0), (n, 0), (n, n)]]
    if window is not None and window < n:
        corners.append([(0, window), (n - window, n), (0, n)])
    for triangle in corners:
        axes.add_patch(
            Polygon(triangle, closed=True, facecolor=PAPER, edgecolor=FAINT, hatch="///", linewidth=0, zorder=3)
        )


def _track(axes: Axes, cells: _Cells, colour: str, *, faintest: float) -> None:
    """A thin track along the lower edge of each row, coloured where the group selected stripes of the cell.

    Opacity grows from `faintest` (any stripe) to 1 (all candidates), by the square root so that a few stripes show.
    """
    rgba = np.zeros((*cells.stripes.shape, 4))
    rgba[..., :3] = to_rgba(colour)[:3]
    opacity = faintest + (1 - faintest) * np.sqrt(np.clip(cells.stripes, 0, 1))
    rgba[..., 3] = np.where(cells.stripes > 0, opacity, 0)
    height = np.diff(cells.rows) * 0.3
    for r in range(cells.stripes.shape[0]):
        bottom = cells.rows[r + 1]
        edges = np.array([bottom - height[r], bottom])
        axes.pcolormesh(cells.columns, edges, rgba[r : r + 1], rasterized=True, zorder=2.5)


def _strip(axes: Axes, cells: _Cells, values: np.ndarray, colour: str, text: str, *, log: bool) -> None:
    """A bar per bin of keys under a heat map."""
    if log:
        axes.set_yscale("log")
        axes.set_ylim(MASS_FLOOR, 1)
        values = np.maximum(values, MASS_FLOOR / 10)
    else:
        axes.set_ylim(0, max(float(values.max()) * 1.1, 1e-4))
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.stairs(values, cells.columns, fill=True, color=colour, baseline=MASS_FLOOR / 10 if log else 0)
    tidy(axes, grid=False)
    axes.tick_params(labelsize=SMALL, length=3)
    axes.set_title(text, size=SMALL, color=INK, loc="left", pad=3)
