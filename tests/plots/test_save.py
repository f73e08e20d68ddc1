"""Figures as files: names are drawn as they are, numbers beside an axis may be formulas."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image
from synthetic import make_profile

from anchorscope.errors import InputError
from anchorscope.pictures import FORMATS
from anchorscope.plots.analysis import layer_head_grid
from anchorscope.plots.heatmap import stripe_heatmap
from anchorscope.plots.names import file_names
from anchorscope.plots.save import MOST_PIXELS, save_figure
from anchorscope.plots.style import legend, legend_name, new_figure


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


def awkward():
    """A heat map: cells, hatches, formulas beside axes, names of anybody's."""
    return stripe_heatmap(
        make_profile(tokens=512, block=16, step=2, prompt="$5 中 \u0661_x^"), model={"name": "a$b$c_x^"}
    )


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_figure_gives_the_same_bytes_in_any_process_at_any_time(tmp_path, form):
    save_figure(awkward(), tmp_path / f"a.{form}", dpi=50)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); time.time = lambda: 2e9\n"
        "from anchorscope.plots.heatmap import stripe_heatmap\n"
        "from anchorscope.plots.save import save_figure\nfrom synthetic import make_profile\n"
        "p = make_profile(tokens=512, block=16, step=2, prompt='$5 \\u4e2d \\u0661_x^')\n"
        "save_figure(stripe_heatmap(p, model={'name': 'a$b$c_x^'}), sys.argv[2], dpi=50)"
    )
    helpers = Path(__file__).parents[1] / "helpers"
    env = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "86400"}
    subprocess.run([sys.executable, "-c", code, helpers, tmp_path / f"b.{form}"], check=True, env=env)
    assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_do_not_change_each_other(tmp_path, form):
    for i, formats in enumerate([(form,), (*FORMATS, form)]):
        figure = layer_head_grid([make_profile(tokens=64, block=8, step=2, head=h) for h in range(3)])
        for each in formats:
            save_figure(figure, tmp_path / f"{i}.{each}", dpi=60)
    assert (tmp_path / f"0.{form}").read_bytes() == (tmp_path / f"1.{form}").read_bytes()


def test_letters_stay_letters_and_maps_are_pixels(tmp_path):
    before = dict(matplotlib.rcParams)
    for form in FORMATS:
        save_figure(awkward(), tmp_path / f"f.{form}", dpi=110)
    assert dict(matplotlib.rcParams) == before
    svg = (tmp_path / "f.svg").read_text()
    assert "what theta 8 keeps</text>" in svg
    assert "a$b$c_x^" in svg
    assert svg.count("<image") >= 2
    assert len(svg) < 1_000_000
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, which editors can search and change
    assert b"/CharProcs" not in pdf
    assert not re.search(rb"CreationDate|Matplotlib|20\d\d-\d\d", pdf + svg.encode())


def test_a_map_of_many_cells_is_no_drawing_of_each(tmp_path):
    """Drawn as paths, 30,000 cells would take megabytes."""
    profile = make_profile(tokens=65_536, block=128, step=8)
    assert profile.heat_mass.size > 30_000
    figure = stripe_heatmap(profile)
    save_figure(figure, tmp_path / "f.svg", dpi=60)
    low = (tmp_path / "f.svg").stat().st_size
    save_figure(figure, tmp_path / "f.svg", dpi=180)
    assert low < 600_000
    assert low < (tmp_path / "f.svg").stat().st_size < 3_000_000, "pixels are those of the dpi asked for"


def test_pixels_are_those_of_the_dpi(tmp_path):
    figure = new_figure(6, 3, "t", "s")
    for dpi in (50, 300):
        save_figure(figure, tmp_path / "f.png", dpi=dpi)
        with Image.open(tmp_path / "f.png") as image:
            assert image.size == tuple(int(x * dpi) for x in figure.get_size_inches())
    tall = new_figure(1, 200, "t", "s", constrained=False)
    save_figure(tall, tmp_path / "f.png", dpi=600)  # as fine as matplotlib draws
    with Image.open(tmp_path / "f.png") as image:
        assert 28_000 < image.size[1] <= MOST_PIXELS


def test_other_endings_are_refused(tmp_path):
    for name in ("f.jpg", "f", "f.png.gz"):
        with pytest.raises(InputError, match=r"does not end in one of \.png, \.pdf, \.svg"):
            save_figure(Figure(), tmp_path / name)


def test_file_names_are_told_apart_by_every_file_system():
    prompts = [
        "a/b",
        "a_b",
        "a-b",
        "a?b",
        "A-B",
        "中文",
        "日本",
        "中文.txt",
        "",
        "..",
        "x" * 300,
        "x" * 301,
        "é",
        "e\u0301",
        "con",
    ]
    names = file_names(prompts)
    assert list(names) == prompts
    assert len({unicodedata.normalize("NFKC", x).casefold() for x in names.values()}) == len(prompts)
    assert names["中文"] == "中文"
    assert names["a-b"] == "a-b"
    assert all(len(x.encode()) <= 80 and not re.search(r'[/\\:*?"<>|\s$]', x) for x in names.values())
    assert file_names(prompts) == names
    assert file_names([*prompts, *prompts]) == names
