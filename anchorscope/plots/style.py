"""The common look: colors, sizes, titles and number formats. Nothing here touches matplotlib's global settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from anchorscope.profiles import HeadProfile
from anchorscope.shown import exact_theta, share_text, short_name

DPI = 110
POSITIONS = 64  # bins of query positions drawn: more lines could not be told apart
TITLE, TEXT, SMALL = 12.5, 9.5, 8.5  # points; at 110 dpi even the small one is 13 pixels high
HEADER = 0.72  # inches kept free for title and subtitle

# Okabe and Ito's palette: told apart with any color vision.
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
INK, MUTED, FAINT, PAPER = "#222222", "#666666", "#d8d8d8", "#eeeeee"

# Missed mass: starts at a color that can be told from white, so that every cell above the scale's low end
# shows.
MISSED = LinearSegmentedColormap.from_list("missed", ["#fee3d3", "#fdae6b", RED, "#7f1d00"]).with_extremes(
    under="white"
)


def new_figure(width: float, height: float, title: str, subtitle: str, *, constrained: bool = True) -> Figure:
    """An empty figure of width x height inches under a bold title and a muted subtitle, both flush left."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    if constrained:
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - HEADER / height), w_pad=0.08, h_pad=0.06)
    left = 0.16 / width
    # A prompt's name may hold anything: no math mode for "$", no line breaks, no glyph the font lacks.
    title, subtitle = (_plain(text) for text in (title, subtitle))
    figure.text(left, 1 - 0.14 / height, title, parse_math=False, size=TITLE, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.42 / height, subtitle, parse_math=False, size=TEXT, color=MUTED, va="top")
    return figure


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() and ord(c) < 0x2E80 else "?" for c in text)


def legend_name(name: str, most: int = 44) -> str:
    """A name as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return f" {short_name(name, most)}" if name.startswith("_") else short_name(name, most)


def tidy(axes: Axes, *, grid: bool = True) -> None:
    """Small ticks, no box above and on the right, a faint grid behind the data."""
    axes.tick_params(labelsize=SMALL, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    if grid:
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Axis labels at the common size."""
    axes.set_xlabel(x, size=TEXT, color=INK)
    axes.set_ylabel(y, size=TEXT, color=INK)


def panel_title(axes: Axes, text: str, **options: Any) -> None:
    """A title above one of several panels, flush left."""
    axes.set_title(text, **{"size": TEXT, "color": INK, "loc": "left", **options})


def legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend at the common size, on paper that keeps the lines behind it readable; none where nothing has a name."""
    if "handles" not in options and isinstance(owner, Axes) and not owner.get_legend_handles_labels()[0]:
        return
    owner.legend(**{"fontsize": SMALL, "frameon": True, "framealpha": 0.9, "edgecolor": FAINT, **options})


def legend_below(figure: Figure, *, columns: int, **options: Any) -> None:
    """A legend at the lower left of a figure, under everything, in at most so many columns."""
    legend(figure, **{"loc": "outside lower left", "ncols": columns, "borderaxespad": 0.4, **options})


def token_ticks(axes: Axes, *, x: bool = False, y: bool = False, count: int = 6) -> None:
    """Whole positions with thousands separators on the axes named."""
    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted:
            axis.set_major_locator(MaxNLocator(count, integer=True, steps=[1, 2, 4, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axis: Axis, locator: LogLocator | None = None) -> None:
    """Plain numbers on a logarithmic axis instead of powers of ten."""
    axis.set_major_locator(locator or LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def share(value: float) -> str:
    """A share with the digits that matter: 0.943, 0.0312, 0.00637, 4.2e-05, 0.000."""
    if value < 1e-9:  # rounding of sums
        return f"{value:.3f}"
    if value >= 0.0995:
        return share_text(value)
    if value < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def setting(p: HeadProfile, *, thetas: bool = True) -> str:
    text = f"{p.tokens:,} tokens, groups of {p.block} x {p.step}"
    return f"{text}, theta {exact_theta(float(p.thetas[0]))}" if thetas else text


def shown_positions(edges: np.ndarray, recall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and mean recall (last axis) of few enough bins of positions to tell lines apart."""
    first = np.arange(0, edges.size - 1, math.ceil((edges.size - 1) / POSITIONS))
    shown = np.append(edges[first], edges[-1])
    return shown, np.add.reduceat(recall * np.diff(edges), first, axis=-1) / np.diff(shown)
