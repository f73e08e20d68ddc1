"""Rows, columns, colors and numbers of cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure

from anchorscope.plots.maps import LayerHead, color_cells, ink_on, paint, write_cells, write_numbers
from anchorscope.plots.style import PAPER


def test_cells_stand_by_layer_and_head_whatever_is_missing() -> None:
    place = LayerHead([(7, 2), (0, 0), (7, 0), (0, 5)], {0: 0, 2: 0, 5: 1})
    assert (place.layers, place.heads, place.shape) == ([0, 7], [0, 2, 5], (2, 3))
    grid = place.fill([(7, 2, 0.5), (0, 5, math.inf)])
    assert grid[1, 1] == 0.5
    assert grid[0, 2] == math.inf
    assert np.isnan(grid).sum() == 4
    assert place.breaks == [1.5]  # between heads 2 and 5, which read different kv heads
    assert LayerHead([(0, 0), (0, 1)], {0: 0, 1: 1}).breaks == []  # every head has its own


@pytest.mark.parametrize(
    ("fours", "shown"), [(False, ["0", "3", "6", "9", "12", "15"]), (True, ["0", "4", "8", "12", "16"])]
)
def test_numbers_are_thinned(fours: bool, shown: list[str]) -> None:
    axes = Figure().subplots()
    LayerHead((layer, 0) for layer in range(17)).numbers(axes, most=(6, 6), fours=fours)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(map(str, shown))


def test_colors_follow_the_scale_and_its_exceptions() -> None:
    values = np.array([[0.0, 1.0, np.nan], [math.inf, -math.inf, 0.5]])
    colors = colormaps["viridis"]
    image = color_cells(values, colors, Normalize(0, 1), special=((np.isposinf(values), "red"),))
    assert tuple(image[0, 0]) == colors(0.0)
    assert tuple(image[1, 2]) == colors(0.5)
    assert tuple(image[0, 2]) == to_rgba(PAPER)
    assert tuple(image[1, 0]) == to_rgba("red")
    assert tuple(image[1, 1]) == colors(0.0)  # beyond the scale: its end
    low = color_cells(np.array([[0.0, 10.0]]), colors, LogNorm(1, 10))
    assert tuple(low[0, 0]) == colors(0.0)


def test_numbers_are_written_in_readable_ink_where_something_is_known() -> None:
    values = np.array([[0.0, np.nan], [1.0, 0.25]])
    image = color_cells(values, colormaps["gray"], Normalize(0, 1))
    axes = Figure().subplots()
    paint(axes, image)
    write_numbers(axes, image, values, lambda value: f"{value:.2f}")
    found = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert found == {(0, 0): ("0.00", "white"), (0, 1): ("1.00", "black"), (1, 1): ("0.25", "white")}
    assert ink_on(image[1, 0]) == "black"
    write_cells(axes, image, {(1, 0): "X"}, color="red", weight="bold")
    assert (axes.texts[-1].get_color(), axes.texts[-1].get_weight()) == ("red", "bold")
