"""Maps of cells (layers x heads, lengths x depths): rows and columns, and cells painted with their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axes._secondary_axes import SecondaryAxis
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize, to_rgba

from anchorscope.plots.style import ALONE, DENSE, INK, PAPER, SMALL, TEXT, THETA, label, theta_norm
from anchorscope.shown import share_text

FIGURES = 7.5  # points of the number in a cell


class LayerHead:
    """Rows and columns of a layer x head map.

    Args:
        cells: (layer, query head) of every head, in any order.
        kv_heads: kv head of each query head, by query head; None where it is not known.
    """

    def __init__(self, cells: Iterable[tuple[int, int]], kv_heads: Mapping[int, int] | None = None) -> None:
        cells = list(cells)
        self.layers = sorted({layer for layer, _ in cells})
        self.heads = sorted({head for _, head in cells})
        owner = kv_heads or {}
        # Column edges between query heads of different kv heads; none when every head has its own.
        several = 1 < len(set(owner.values())) < len(owner)
        self.breaks = [
            i - 0.5 for i in range(1, len(self.heads)) if several and owner[self.heads[i]] != owner[self.heads[i - 1]]
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.layers), len(self.heads)

    def cell(self, layer: int, head: int) -> tuple[int, int]:
        """Row and column of a head."""
        return self.layers.index(layer), self.heads.index(head)

    def fill(self, values: Iterable[tuple[int, int, float]]) -> np.ndarray:
        """(layer, head, value) as a grid, NaN where nothing is known."""
        grid = np.full(self.shape, math.nan)
        for layer, head, value in values:
            grid[self.cell(layer, head)] = value
        return grid

    def row_height(self, least: float, page: float) -> float:
        """Inches per layer: numbers must fit into few layers, and many layers must fit on `page` inches."""
        return 0.42 if len(self.layers) <= 8 else max(least, min(0.42, page / len(self.layers)))

    def ticks(self, axes: Axes, *, most: tuple[int, int] = (16, 16), color: str = INK) -> None:
        """Layer and head numbers, at most about `most` of each, and axis labels."""
        self.numbers(axes, most=most, fours=True)
        bare(axes, color)
        label(axes, "query head", "layer")

    def numbers(self, axes: Axes, *, most: tuple[int, int], fours: bool = False) -> None:
        """Layer and head numbers alone, at most about `most` of each; `fours`: each second, fourth, eighth, ..."""
        for axis, numbers, limit in ((axes.yaxis, self.layers, most[0]), (axes.xaxis, self.heads, most[1])):
            stride = math.ceil(len(numbers) / limit)
            some_ticks(axis, numbers, 4 * math.ceil(stride / 4) if fours and stride > 2 else stride)

    def kv_lines(self, axes: Axes, *, wide: float = 2.0, narrow: float = 1.0) -> None:
        """White lines between the query heads of different kv heads, `wide` points where heads are few."""
        for at in self.breaks:
            axes.axvline(at, color="white", linewidth=wide if len(self.heads) <= 16 else narrow)


def bare(axes: Axes | SecondaryAxis, color: str = INK) -> None:
    """Small numbers without ticks, and no box."""
    axes.tick_params(labelsize=SMALL, length=0, colors=color)
    for spine in axes.spines.values():
        spine.set_visible(False)


def luminance(color: Any) -> float:
    """Relative luminance of a color, as WCAG 2 defines it: 0 is black, 1 white."""
    channels = np.asarray(to_rgba(color)[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def ink_on(background: Any) -> str:
    """The ink that is readable on a color: black or white has a contrast of 4.5 and more on any."""
    return "white" if luminance(background) < 0.179 else "black"


def cell_share(value: float, *, below: float = 1.0) -> str:
    """A share with two decimals or as many more as say what it is not: 0 or `below`; at most six characters."""
    text = share_text(value, 2, below=below)
    if len(text) <= 6:
        return text
    return "<0.01" if value < 0.01 else f"<{below:g}" if value < below < 1 else ">0.99"


def theta_cells(values: np.ndarray) -> tuple[np.ndarray, Normalize | None]:
    """Cells (rows, columns, 4) of thetas (rows, columns), and their scale; None where no theta is finite.

    -inf (the anchor region alone) and +inf (dense) have colors of their own.
    """
    norm = theta_norm(values[~np.isnan(values)])
    special = ((np.isneginf(values), ALONE), (np.isposinf(values), DENSE))
    return color_cells(values, THETA, norm, special=special), norm if np.isfinite(values).any() else None


def some_ticks(axis: Axis | SecondaryAxis, labels: Sequence[object], stride: int) -> None:
    """Every so many labels along an axis of cells."""
    axis.set_ticks(range(0, len(labels), stride), [str(x) for x in labels[::stride]])


def color_cells(
    values: np.ndarray,
    colors: Colormap,
    norm: Normalize,
    *,
    special: Iterable[tuple[np.ndarray, object]] = (),
    missing: Any = PAPER,
) -> np.ndarray:
    """Cells (rows, columns, 4) of values (rows, columns).

    Args:
        values: NaN where nothing is known.
        colors: the color map of the values.
        norm: their scale.
        special: masks (rows, columns), and the color of the cells they choose, one after the other.
        missing: color where nothing is known.
    """
    low, high = (0.0 if end is None else float(end) for end in (norm.vmin, norm.vmax))
    known = np.clip(np.where(np.isnan(values), low, values), low, high)
    image = np.asarray(colors(norm(known)))
    image[np.isnan(values)] = to_rgba(missing)
    for mask, color in special:
        image[mask] = to_rgba(color)  # type: ignore[arg-type]
    return image


def color_bar(
    axes: Any, norm: Normalize, colors: Colormap, *, text: str = "", size: float = TEXT, **place: Any
) -> Colorbar:
    """A color bar without box beside or below axes (one or several), `place` as matplotlib's `colorbar` takes it."""
    figure = (axes if isinstance(axes, Axes) else axes[0]).figure
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, **place)
    if text:
        bar.set_label(text, size=size, color=INK)
    bar.ax.tick_params(labelsize=SMALL, length=3)
    bar.outline.set_visible(False)
    return bar


def paint(axes: Axes, image: np.ndarray) -> None:
    """Draw cells (rows, columns, 4) as they are, without blending neighbors."""
    axes.imshow(image, aspect="auto", interpolation="nearest")


def write_cells(
    axes: Axes, image: np.ndarray, texts: Mapping[tuple[int, int], str], *, size: float = FIGURES, **look: Any
) -> None:
    """Write a text into each of the cells named by (row, column), in ink that is readable there, or as `look` says."""
    for (row, column), text in texts.items():
        axes.text(
            column, row, text, **{"color": ink_on(image[row, column]), **look}, size=size, ha="center", va="center"
        )


def write_numbers(
    axes: Axes, image: np.ndarray, values: np.ndarray, text: Callable[[float], str], *, size: float = FIGURES
) -> None:
    """Write the number of each cell, as `text` shows it; none where it is NaN."""
    known = {at: text(float(value)) for at, value in np.ndenumerate(values) if not math.isnan(value)}
    write_cells(axes, image, known, size=size)
