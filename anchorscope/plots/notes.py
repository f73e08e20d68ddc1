"""Small texts beside data points, each where it touches neither a point nor another text, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from anchorscope.plots.style import SMALL
from anchorscope.plots.text import text_width

GAP = 5.0  # points between a data point and its text
MARK = 3.5  # points around a data point that stay free
# Where the point is in a text that stands beside it, as shares of its width and height from the left and from the top,
# best first: curves that rise to the right leave room below at the right and above at the left.
PLACES = ((0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0))


class Notes:
    """Texts in axes that have all else in them already: their place in the figure is settled first.

    Args:
        axes: where; its figure is laid out now.
        points: (x, y) that no text may cover, in data coordinates.
    """

    def __init__(self, axes: Axes, points: Iterable[Sequence[float] | np.ndarray] = ()) -> None:
        axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # axes of a figure, not of a part of it
        self.axes, self.pixel = axes, axes.figure.dpi / 72
        self.taken = [self._around(point) for point in points]

    def _around(self, point: Sequence[float] | np.ndarray) -> Bbox:
        x, y = self.axes.transData.transform(point)
        reach = MARK * self.pixel
        return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)

    def write(self, at: Sequence[float] | np.ndarray, text: str, *, bold: bool = False, **look: Any) -> bool:
        """Write a text beside a point, at the first place that is free; False where none is."""
        x, y = self.axes.transData.transform(at)
        width, height = text_width(text, SMALL, bold=bold) * 72 * self.pixel, 1.1 * SMALL * self.pixel
        for across, down in PLACES:
            gap = (GAP if 0.5 in (across, down) else 0.6 * GAP) * self.pixel
            left = x - across * width + (1 - 2 * across) * gap
            bottom = y - (1 - down) * height + (2 * down - 1) * gap
            box = Bbox.from_extents(left, bottom, left + width, bottom + height)
            whole = self.axes.bbox
            inside = box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
            if not inside or any(box.overlaps(other) for other in self.taken):
                continue
            self.taken.append(box)
            self.axes.annotate(
                text,
                (float(at[0]), float(at[1])),
                xytext=((left - x) / self.pixel, (bottom - y) / self.pixel),
                textcoords="offset points",
                ha="left",
                va="bottom",
                size=SMALL,
                weight="bold" if bold else "normal",
                zorder=10,
                bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
                **look,
            )
            return True
        return False
