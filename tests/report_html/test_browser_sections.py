"""Sections of other folders in a real browser: alone and beside an analysis, in both themes, on paper."""

from __future__ import annotations

import csv
import math

import pytest

from anchorscope.report.html import write_report

from .browser import Page
from .results import evaluated

pytestmark = pytest.mark.browser
NO_ANALYSIS = "!document.getElementById('analyses') && document.querySelector('.chart .main-svg')"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, run, calibration, bench):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'anchorscope[report]'")
    folder = tmp_path_factory.mktemp("page")
    return {
        "alone": write_report([calibration], folder / "alone.html"),
        "all": write_report([run, calibration, bench], folder / "all.html"),
        "evaluation": write_report([evaluated(folder)], folder / "evaluation.html"),
    }


@pytest.fixture
def alone(driver, pages):
    shown = Page(driver, pages["alone"], ready=NO_ANALYSIS)
    yield shown
    shown.check()


@pytest.fixture
def whole(driver, pages):
    shown = Page(driver, pages["all"])
    yield shown
    shown.check()


@pytest.fixture
def evaluation(driver, pages):
    shown = Page(driver, pages["evaluation"], ready=NO_ANALYSIS)
    yield shown
    shown.check()


def cells(page, section: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Text and title of every cell of the grid shown, by row and column."""
    rows = page.js(
        "const table = document.querySelector(`#${arguments[0]} table.cells`);"
        "const names = [...table.querySelectorAll('thead th')].slice(1).map((x) => x.textContent);"
        "return [...table.querySelectorAll('tbody tr')].flatMap((row) => [...row.querySelectorAll('td')].map("
        "(td, i) => [row.querySelector('th').textContent, names[i], td.textContent, td.title]));",
        section,
    )
    return {(row, column): (text, title) for row, column, text, title in rows}


def test_the_grid_shows_what_is_chosen(alone, calibration):
    with open(calibration / "calibration.csv", newline="") as file:
        rows = {(r["layer"], r["head"]): r for r in csv.DictReader(file)}
    choices = alone.js(
        "return [...document.querySelectorAll('#calibration-0 select option')].map((o) => o.textContent)"
    )
    for name, column in (("recall, held out", "held_out_recall"), ("density, fitted", "fitted_density")):
        alone.choose("#calibration-0 select", str(choices.index(name)))
        shown = cells(alone, "calibration-0")
        assert set(shown) == set(rows)
        for place, (text, _) in shown.items():
            assert float(text) == pytest.approx(float(rows[place][column]), abs=6e-4)
    alone.choose("#calibration-0 select", str(choices.index("theta, nats")))
    for place, (_, title) in cells(alone, "calibration-0").items():
        assert f"theta {rows[place]['theta']} nats" in title


def test_needles_are_a_grid_of_depth_and_length(evaluation):
    assert set(cells(evaluation, "evaluation-0")) == {(d, n) for d in "01" for n in ("400", "600")}
    options = "[...document.querySelectorAll('#evaluation-0 select option')]"
    names = evaluation.js(f"return {options}.map((o) => o.textContent)")
    assert names == ["needle: all", "needle: none", "needle: dense"]
    evaluation.choose("#evaluation-0 select", "2")
    assert "needle: dense" in evaluation.text("#evaluation-0 .key")


def test_times_are_drawn_against_the_lengths_timed(whole):
    chart = "document.querySelector('#bench-0 .chart')"
    drawn = whole.js(f"return [{chart}.layout.xaxis.tickvals, {chart}.data.length]")
    assert drawn == [[256, 512], 3]


def test_shares_that_are_all_1_have_no_axis_beyond_it(driver, tmp_path):
    folder = evaluated(tmp_path, arms={"all": math.inf}, tasks=[], lengths=[400])
    shown = Page(driver, write_report([folder], tmp_path / "dense.html"), ready=NO_ANALYSIS)
    drawn = shown.js("return [...document.querySelectorAll('.chart')].map((x) => [x.data[0].y, x.layout.yaxis.range])")
    assert len(drawn) == 2, "density and recall by layer"
    for values, span in drawn:
        assert values == pytest.approx([1.0] * len(values))
        assert span == [0, 1.05]
    shown.check()


def test_the_grid_uses_the_width(alone):
    alone.size(1280, 800, dark=False)
    shown = alone.js("return document.querySelector('#calibration-0 table.cells').getBoundingClientRect().width")
    assert shown > 0.97 * alone.js("return document.getElementById('calibration-0').clientWidth")


def test_sections_stand_below_the_analysis_and_in_the_contents(whole):
    links = whole.js("return [...document.querySelectorAll('#contents a')].map((a) => a.getAttribute('href'))")
    assert links == ["#summary", "#analyses", "#calibration-0", "#bench-0", "#glossary"]
    assert whole.js("return links = arguments[0].every((l) => document.querySelector(l))", links)
    assert "Calibration" in whole.text("#calibration-0 h2")
    assert whole.js("return document.querySelectorAll('#grid [data-key]').length") == 6


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700, 390])
@pytest.mark.parametrize("which", ["alone", "whole", "evaluation"])
def test_fits_the_screen_in_both_themes(request, driver, which, width, dark):
    page = request.getfixturevalue(which)
    page.size(width, 844, dark=dark)
    assert page.js("return document.documentElement.scrollWidth") <= width
    ink = page.js("return document.querySelector('#after .chart').layout.font.color")
    assert ink == ("#e8eaee" if dark else "#1c1f24")
    page.shoot(f"sections-{which}-{width}-{'dark' if dark else 'light'}.png", width)


def test_prints_on_white_paper(alone):
    alone.size(1280, 800, dark=True)
    alone.js("dispatchEvent(new Event('beforeprint'))")
    assert alone.js("return document.documentElement.dataset.theme") == "light"
    assert alone.js("return document.querySelector('#after .chart').layout.font.color") == "#1c1f24"
    assert alone.js("return document.querySelector('#after .main-svg').getBoundingClientRect().width") <= 700
    alone.js("dispatchEvent(new Event('afterprint'))")
    assert alone.js("return document.documentElement.dataset.theme") == "dark"


def test_terms_are_explained_on_hover_on_focus_and_at_the_end(alone):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    term = alone.driver.find_element("css selector", "#calibration-0 dt .term[data-term='density']")
    alone.js("arguments[0].scrollIntoView({block: 'center'})", term)
    alone.settle()
    ActionChains(alone.driver).move_to_element(term).perform()
    words = alone.text("#term-density")
    assert "pairs" in words
    assert (alone.js("return document.getElementById('tip').hidden"), alone.text("#tip")) == (False, words)
    alone.press("body", Keys.ESCAPE)
    assert alone.js("return document.getElementById('tip').hidden")
    alone.js("arguments[0].focus()", term)
    assert not alone.js("return document.getElementById('tip').hidden")
    described = "[...document.querySelectorAll('.term')].map((t) => t.getAttribute('aria-describedby'))"
    assert alone.js(f"return {described}.every((id) => document.getElementById(id))")


def test_the_summary_comes_first_and_the_grid_of_heads_uses_the_width(whole):
    whole.size(1280, 800, dark=False)
    top = "document.getElementById(arguments[0]).getBoundingClientRect().top"
    assert whole.js(f"return {top}", "summary") < whole.js(f"return {top}", "analyses")
    assert "recall promised" in whole.text("#summary dl")
    row = whole.js("const r = document.querySelectorAll('#grid [data-key]'); return r[2].getBoundingClientRect().right")
    assert row > 1200
