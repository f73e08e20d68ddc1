"""Words that can be drawn, ink that can be read, and colors that mean one thing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from looking import contrast, drawn_texts
from matplotlib import colormaps
from matplotlib.colors import to_hex

from anchorscope.calibration.figures import theta_map
from anchorscope.plots import text
from anchorscope.plots.maps import cell_share, ink_on, theta_cells
from anchorscope.plots.style import ALONE, DENSE, KINDS, MISSED, ORANGE, RED, THETA, new_figure, plain_log, setting_text
from anchorscope.plots.text import drawable, name_text, text_width, wrapped


def test_ink_can_be_read_on_any_color():
    for name in ("cividis", "viridis", "magma"):
        for share in np.linspace(0, 1, 101):
            color = colormaps[name](share)
            assert contrast(ink_on(color), color) >= 4.5
    for color in (*KINDS, RED, ORANGE, ALONE, DENSE, *(m(x) for m in (THETA, MISSED) for x in np.linspace(0, 1, 51))):
        assert contrast(ink_on(color), color) >= 4.5


@pytest.mark.parametrize(
    ("value", "below", "shown"),
    [
        (1.0, 1.0, "1.00"),
        (0.9996, 1.0, "0.9996"),
        (0.9999999, 1.0, ">0.99"),
        (0.0, 1.0, "0.00"),
        (0.0004, 1.0, "0.0004"),
        (3e-6, 1.0, "<0.01"),
        (0.9496, 0.95, "0.9496"),
        (0.9499999, 0.95, "<0.95"),
        (0.95, 0.95, "0.95"),
        (0.9998, 0.95, "0.9998"),
        (0.99999, 0.95, ">0.99"),
        (1.0, 0.95, "1.00"),
    ],
)
def test_shares_in_cells_are_never_rounded_to_what_they_are_not(value, below, shown):
    assert cell_share(value, below=below) == shown


def test_thetas_have_one_color_map():
    image, norm = theta_cells(np.array([[2.0, 6.0, -math.inf, math.inf, math.nan]]))
    assert norm is not None
    assert to_hex(image[0, 0]) == to_hex(THETA(0.0))
    assert to_hex(image[0, 1]) == to_hex(THETA(1.0))
    assert (to_hex(image[0, 2]), to_hex(image[0, 3])) == (ALONE, DENSE)
    assert theta_cells(np.array([[math.inf]]))[1] is None
    heads = [{"layer": 0, "head": h, "theta": t} for h, t in enumerate((2.0, 6.0, "-inf", "dense"))]
    settings = {"target": 0.9, "by": "head", "statistic": "mean"}
    layers = [{"layer": 0, "block": 64, "step": 4}]
    figure = theta_map({"heads": heads, "layers": layers, "settings": settings, "prompts": []})
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[0], image[0, :4])


def test_what_no_font_has_is_spelled_out(monkeypatch):
    assert drawable("plain $x$ \\frac é \u0434\u0430") == "plain $x$ \\frac é \u0434\u0430"
    missing = next(c for c in "\U0001f9ff\ue000\U00020000" if text._font_of(c) is None)
    assert drawable(f"a{missing}") == "a" + missing.encode("unicode_escape").decode()
    assert name_text("two\nlines\u202e") == "two\\nlines\\u202e"
    monkeypatch.setattr(text, "_others", lambda: ("STIXGeneral",))  # comes with matplotlib, and has letters of its own
    text._font_of.cache_clear()
    held = next(chr(c) for c in sorted(text._glyphs("STIXGeneral") - text._glyphs(text.BASE)) if chr(c).isprintable())
    figure = new_figure(6, 2, f"model {held}", "")
    (shown,) = [t for t, _ in drawn_texts(figure) if held in t.get_text()]
    assert shown.get_fontfamily()[-1] == "STIXGeneral"
    text._font_of.cache_clear()


def test_lines_that_are_too_long_go_on_below():
    line = setting_text({"name": "o/" + "m" * 90}, [("p" * 90, 5)], [(64, 4)], [2.0, math.inf])
    for width in (8.0, 3.0, 1.0):
        found = wrapped(line, width, 9.5)
        assert len(found) > 1
        assert all(text_width(x, 9.5) <= width for x in found)
    assert (
        setting_text({"name": "/home/me/models/Mine-7B/"}, [("a", 3), ("b", 9)])
        == "Mine-7B  |  2 prompts, 3 to 9 tokens"
    )


@pytest.mark.parametrize(
    ("ends", "numbers"),
    [
        ((0.78, 1.1), ["0.8", "0.9", "1"]),
        ((0.45, 1.1), ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        ((0.09, 1.1), ["0.1", "0.2", "0.5", "1"]),
    ],
)
def test_a_short_logarithmic_axis_has_more_than_one_number(ends, numbers):
    figure = new_figure(6, 4, "Title", "setting", "")
    axes = figure.subplots()
    axes.set(xscale="log", xlim=ends)
    plain_log(axes.xaxis)
    figure.canvas.draw()
    low, high = ends
    places = zip(axes.xaxis.get_majorticklocs(), axes.xaxis.get_majorticklabels(), strict=True)
    assert [text.get_text() for at, text in places if low <= at <= high] == numbers
