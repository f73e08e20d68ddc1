"""What a careful look at a figure would find: texts that touch, leave the canvas, cannot be read, or hide data."""

from __future__ import annotations

from unittest import mock
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from anchorscope.plots.maps import luminance
from anchorscope.plots.style import ORANGE, RED
from anchorscope.plots.text import as_it_is

TOUCH = 1.0  # pixels that boxes may share: letters stand a little inside theirs


_looked_at: WeakKeyDictionary[Figure, list[tuple[Text, Bbox]]] = WeakKeyDictionary()


def drawn_texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Every text that a picture of the figure shows, and its box in pixels; drawn once."""
    if figure not in _looked_at:
        _looked_at[figure] = _draw(figure)
    return _looked_at[figure]


def _draw(figure: Figure) -> list[tuple[Text, Bbox]]:
    as_it_is(figure)
    canvas = FigureCanvasAgg(figure)
    seen: list[Text] = []
    real = Text.draw

    def draw(self, renderer):
        if self.get_visible() and self.get_text().strip():
            seen.append(self)
        real(self, renderer)

    with mock.patch.object(Text, "draw", draw):
        canvas.draw()
    renderer = canvas.get_renderer()
    return [(text, Text.get_window_extent(text, renderer)) for text in dict.fromkeys(seen)]


def assert_no_text_overlap(figure: Figure) -> None:
    """No two texts touch, and none leaves the canvas."""
    found = drawn_texts(figure)
    assert found
    boxes = np.array([[b.x0, b.y0, b.x1, b.y1] for _, b in found])
    width, height = figure.get_size_inches() * figure.dpi
    outside = (boxes[:, :2] < -TOUCH).any(1) | (boxes[:, 2] > width + TOUCH) | (boxes[:, 3] > height + TOUCH)
    assert not outside.any(), f"off the canvas: {[found[i][0].get_text() for i in np.flatnonzero(outside)]}"
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    shared = np.minimum(high, boxes[None, :, 2:]) - np.maximum(low, boxes[None, :, :2])
    pairs = np.argwhere(np.triu((shared > TOUCH).all(-1), 1))
    assert not len(pairs), f"touching: {[(found[i][0].get_text(), found[j][0].get_text()) for i, j in pairs[:5]]}"


def assert_legends_hide_nothing(figure: Figure) -> None:
    """No legend stands over axes, nor over a text that is not its own."""
    found = drawn_texts(figure)
    legends = figure.findobj(Legend)
    for legend in legends:
        box, own = legend.get_window_extent(), set(legend.findobj(Text))
        for axes in figure.axes:
            if axes.get_visible():
                assert not box.overlaps(axes.bbox), f"over axes: {[t.get_text() for t in legend.get_texts()]}"
        over = [text.get_text() for text, at in found if text not in own and box.shrunk(0.99, 0.99).overlaps(at)]
        assert not over, f"a legend stands over {over}"


def assert_cells_readable(figure: Figure) -> None:
    """Letters in the cells of a map have a contrast of 4.5 and more."""
    for axes in figure.axes:
        for image in axes.images:
            cells = np.asarray(image.get_array())
            for text in axes.texts:
                column, row = (round(x) for x in text.get_position())
                assert contrast(text.get_color(), cells[row, column]) >= 4.5, text.get_text()


def contrast(one: object, other: object) -> float:
    """The contrast of two colors as WCAG 2 defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colors_used(figure: Figure) -> set[str]:
    """Which of the colors with one meaning everywhere, "missed" (orange-red) and "oracle" (yellow-orange), are used."""
    used = set()
    for artist in figure.findobj():
        for getter in ("get_color", "get_facecolor", "get_edgecolor"):
            value = getattr(artist, getter, lambda: None)()
            if value is None or isinstance(artist, Text):
                continue
            several = [value] if isinstance(value, str) else np.atleast_2d(np.asarray(value, dtype=object))
            for color in several:
                shown = to_rgba(color if isinstance(color, str) else tuple(float(x) for x in color))
                used |= {n for n, c in (("missed", RED), ("oracle", ORANGE)) if same_color(shown[:3], to_rgba(c)[:3])}
    return used
