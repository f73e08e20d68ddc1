"""Figures as files: names are drawn as they are, numbers beside an axis may be formulas."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from anchorscope.plots.save import save_figure
from anchorscope.plots.style import legend, legend_name


@pytest.mark.parametrize("name", ["$x$", "a$\\frac{1$b", "$\\undefined$", "100$ and 5$^", "\\", "_", "%"])
def test_names_are_drawn_literally(tmp_path, name):
    figure = Figure()
    axes = figure.subplots()
    line = axes.plot([1, 1000], [1, 10], label=name)[0]
    title = axes.set_title(name)
    legend = axes.legend(handles=[line])
    axes.set_yticks([1, 10], labels=[name, "b"])
    axes.set_xscale("log")
    save_figure(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert title.get_parse_math() is False
    assert all(x.get_parse_math() is False for x in (*legend.get_texts(), *axes.get_yticklabels()))
    powers = [x for x in axes.get_xticklabels() if "mathdefault" in x.get_text()]
    assert powers
    assert all(x.get_parse_math() for x in powers)


def test_names_that_begin_with_an_underscore_are_in_the_legend(recwarn):
    axes = Figure().subplots()
    for name in ("_nolegend_", "_", "a"):
        axes.plot([1, 2], [1, 2], label=legend_name(name))
    legend(axes)
    assert [x.get_text().strip() for x in axes.get_legend().get_texts()] == ["_nolegend_", "_", "a"]
    empty = Figure().subplots()
    legend(empty)
    assert empty.get_legend() is None
    assert not recwarn
