"""The stripe heat map of one head: where its attention mass lies, what a theta keeps of it, and what it misses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import MaxNLocator

from anchorscope.errors import InputError
from anchorscope.plots.style import (
    BLUE,
    FAINT,
    INK,
    MISSED,
    MUTED,
    PAPER,
    RED,
    SKY,
    SMALL,
    joined,
    label,
    legend,
    new_figure,
    panel_title,
    profile_setting,
    share,
    shown_positions,
    tidy,
    token_ticks,
)
from anchorscope.profiles import HeadProfile
from anchorscope.shown import exact_theta

MASS_FLOOR = 1e-5  # low end of the heat map's colors, the same in all figures so that heads compare
MASS = matplotlib.colormaps["magma"]
SHOWN_ROWS, SHOWN_COLUMNS = 64, 480  # cells drawn: more would be narrower than a pixel and could vanish


def stripe_heatmap(profile: HeadProfile, *, model: object = None, note: str = "") -> Figure:
    """Where a head's attention mass lies, what the first theta keeps of it, and what it misses.

    Left: attention mass by query group (down) and key position (across), anchor region outlined, stripes marked in a
    track along the lower edge of each group. Middle: the mass that is missed, over the regions that are kept. Right:
    recall by query position. The strips below sum over the queries.

    Args:
        profile: the head.
        model: its name, or its record in a report.
        note: words above the figure, behind those that sum it up.

    Raises:
        InputError: the profile was loaded without its heat map.
    """
    p = profile
    if p.heat_mass.size == 0:
        raise InputError(f"layer {p.layer}, head {p.head} was loaded without its heat map: load it with heat=True")
    cells = _shown_cells(p)
    recall, density = float(p.recall[0]), float(p.density[0])
    theta = exact_theta(float(p.thetas[0]))
    title = f"Layer {p.layer}, head {p.head} (kv head {p.kv_head}): what theta {theta} keeps"
    stripes = "no candidates" if p.candidate_pairs == 0 else f"stripe density {share(float(p.stripe_density[0]))}"
    finding = (
        f"recall {share(recall)} at density {share(density)} (sparsity {share(1 - density)}, {stripes})  |  "
        f"missed mass {share(max(0.0, 1 - recall))}"
    )
    setting = profile_setting(p, model, thetas=p.thetas[:1])
    figure = new_figure(13.4, 7.9, title, setting, joined(finding, note), constrained=False)
    panels, norm = _panels(figure), LogNorm(MASS_FLOOR, 1.0)
    _draw_maps(panels, p, cells, norm)
    _draw_strips(panels, cells)
    _draw_side(panels.side, p)
    _draw_scales(figure, norm)
    legend(figure, handles=_handles(p.window), loc="lower right", bbox_to_anchor=(0.99, 0.012), ncols=2, frameon=False)
    return figure


class _Panels(NamedTuple):
    """Axes of the figure: both maps, the strip at the right, and the strips below the maps."""

    mass: Axes
    missed: Axes
    side: Axes
    below: tuple[Axes, Axes]


def _panels(figure: Figure) -> _Panels:
    grid = figure.add_gridspec(
        2,
        3,
        width_ratios=(1, 1, 0.22),
        height_ratios=(1, 0.16),
        left=0.066,
        right=0.985,
        bottom=0.185,
        top=figure.subplotpars.top - 0.2 / figure.get_size_inches()[1],
        wspace=0.085,
        hspace=0.1,
    )
    mass = figure.add_subplot(grid[0, 0])
    missed = figure.add_subplot(grid[0, 1], sharex=mass, sharey=mass)
    side = figure.add_subplot(grid[0, 2], sharey=mass)
    return _Panels(
        mass, missed, side, (figure.add_subplot(grid[1, 0], sharex=mass), figure.add_subplot(grid[1, 1], sharex=mass))
    )


def _draw_maps(panels: _Panels, p: HeadProfile, cells: _Cells, norm: LogNorm) -> None:
    """Attention mass at the left, what is missed of it in the middle."""
    _cells(panels.mass, cells, cells.mass, MASS, norm)
    _cells(panels.missed, cells, cells.missed, MISSED, norm)
    _regions(panels.mass, p, outline="white", fill=None)
    _regions(panels.missed, p, outline=BLUE, fill=SKY)
    _track(panels.mass, cells, SKY, faintest=0.55)
    _track(panels.missed, cells, BLUE, faintest=0.25)
    for axes, text in ((panels.mass, "attention mass"), (panels.missed, "missed mass")):
        panel_title(axes, text, pad=4)
        _invisible(axes, p.tokens, p.window)
        axes.set_xlim(0, p.tokens)
        axes.set_ylim(p.tokens, 0)
        axes.tick_params(labelsize=SMALL, length=3, labelbottom=False)
    token_ticks(panels.mass, x=True, y=True)
    panels.missed.tick_params(labelleft=False)
    label(panels.mass, y="query position (tokens), groups top to bottom")


def _draw_strips(panels: _Panels, cells: _Cells) -> None:
    """Below each map, its sum over the queries."""
    per = "key" if cells.width == 1 else f"{cells.width:,} keys"
    mass, missed = cells.by_key(cells.mass), cells.by_key(cells.missed)
    left, right = panels.below
    _strip(left, cells, mass, INK, f"attention mass per {per}, all queries (log scale)", log=True)
    # Its scale is said in words: numbers beside it would stand between the other axes.
    highest = f"; highest {share(float(missed.max()))}" if missed.any() else "; none"
    _strip(right, cells, missed, RED, f"missed mass per {per}, all queries{highest}", log=False)
    right.set_yticks([])
    for axes in panels.below:
        label(axes, x="key position (tokens)")


def _draw_side(axes: Axes, p: HeadProfile) -> None:
    """Recall by query position, beside the rows of the maps."""
    edges, by_position = shown_positions(p.position_edges, p.position_recall[0])
    axes.stairs(by_position, edges, orientation="horizontal", baseline=1.0, fill=True, color=RED, alpha=0.35)
    axes.stairs(by_position, edges, orientation="horizontal", baseline=None, color=RED, linewidth=1.4)
    axes.axvline(float(p.recall[0]), color=INK, linewidth=1.0, linestyle=":")
    floor = min(0.9, max(0.0, math.floor((float(by_position.min()) - 0.02) * 10) / 10))
    axes.set_xlim(floor, 1.0)
    panel_title(axes, "recall by query", pad=4)
    tidy(axes)
    axes.tick_params(labelleft=False)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    label(axes, "recall\n(dotted: mean)")


def _draw_scales(figure: Figure, norm: LogNorm) -> None:
    """The color bars of both maps, at the bottom."""
    for left, cmap, text in ((0.066, MASS, "attention mass"), (0.3, MISSED, "missed mass")):
        bar = figure.colorbar(
            ScalarMappable(norm, cmap),
            cax=figure.add_axes((left, 0.072, 0.2, 0.018)),
            orientation="horizontal",
            extend="min",
        )
        bar.ax.tick_params(labelsize=SMALL, length=3)
        bar.set_label(f"{text} of a cell, mean per query", size=SMALL, color=INK)


def _handles(window: int | None) -> list[Patch | Line2D]:
    """What the colors mean."""
    stripes = "stripes of the group (bar along its lower edge; stronger: more)"
    handles: list[Patch | Line2D] = [
        Patch(facecolor=to_rgba(SKY, 0.35), edgecolor=BLUE, label="anchor region: always kept (outlined)"),
        Patch(facecolor=BLUE, edgecolor="none", label=stripes),
        Patch(facecolor=RED, edgecolor="none", label="attention mass missed"),
        Patch(facecolor=PAPER, edgecolor=FAINT, hatch="///", label="not visible to the query"),
    ]
    if window is not None:
        edge = f"edge of the window of {window:,}"
        handles.append(Line2D([], [], color=MUTED, linestyle="--", linewidth=1.0, label=edge))
    return handles


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


def _area(axes: Axes, corners: Sequence[Sequence[float] | np.ndarray], color: object) -> None:
    axes.add_patch(Polygon(np.array(corners, dtype=float), closed=True, facecolor=color, edgecolor="none", zorder=2))


def _invisible(axes: Axes, n: int, window: int | None) -> None:
    """Hatched paper over the pairs no query sees: later keys, and keys before the window."""
    corners = [[(0, 0), (n, 0), (n, n)]]
    if window is not None and window < n:
        corners.append([(0, window), (n - window, n), (0, n)])
    for triangle in corners:
        axes.add_patch(
            Polygon(triangle, closed=True, facecolor=PAPER, edgecolor=FAINT, hatch="///", linewidth=0, zorder=3)
        )


def _track(axes: Axes, cells: _Cells, color: str, *, faintest: float) -> None:
    """A thin track along the lower edge of each row, colored where the group selected stripes of the cell.

    Opacity grows from `faintest` (any stripe) to 1 (all candidates), by the square root so that a few stripes show.
    """
    rgba = np.zeros((*cells.stripes.shape, 4))
    rgba[..., :3] = to_rgba(color)[:3]
    opacity = faintest + (1 - faintest) * np.sqrt(np.clip(cells.stripes, 0, 1))
    rgba[..., 3] = np.where(cells.stripes > 0, opacity, 0)
    height = np.diff(cells.rows) * 0.3
    for r in range(cells.stripes.shape[0]):
        bottom = cells.rows[r + 1]
        edges = np.array([bottom - height[r], bottom])
        axes.pcolormesh(cells.columns, edges, rgba[r : r + 1], rasterized=True, zorder=2.5)


def _strip(axes: Axes, cells: _Cells, values: np.ndarray, color: str, text: str, *, log: bool) -> None:
    """A bar per bin of keys under a heat map."""
    if log:
        axes.set_yscale("log")
        axes.set_ylim(MASS_FLOOR, 1)
        values = np.maximum(values, MASS_FLOOR / 10)
    else:
        axes.set_ylim(0, max(float(values.max()) * 1.1, 1e-4))
    axes.stairs(values, cells.columns, fill=True, color=color, baseline=MASS_FLOOR / 10 if log else 0)
    tidy(axes, grid=False)
    axes.tick_params(labelsize=SMALL, length=3)
    panel_title(axes, text, size=SMALL, pad=3)
