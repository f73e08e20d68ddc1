"""The page's data against the profiles it came from, its size, its escaping, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from anchorscope import names, palette
from anchorscope.errors import DumpError, MissingBackendError, RunFailure
from anchorscope.report import curves, html
from anchorscope.report.curves import curve_at
from anchorscope.report.heat import shrink_heat
from anchorscope.report.html import build_data, build_report, open_sources, write_report

from .runs import (
    IDENTITY,
    floats,
    heads_csv,
    make_profiles,
    renamed,
    unpack,
    write_methods,
    write_run,
)

ROOT = Path(__file__).parents[2]
PLOTLY_SOURCE = html.plotly_source
HOSTILE = "</script><script>alert(1)</script><!-- {{script}} & \"'"


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    """The charts' library is only needed in a browser; most tests put a word in its place."""
    monkeypatch.setattr(html, "plotly_source", lambda: "/* plotly */")


@pytest.fixture
def real_plotly(short_plotly, monkeypatch):
    """The charts' library itself."""
    monkeypatch.setattr(html, "plotly_source", PLOTLY_SOURCE)


def records(data_set: dict) -> list[dict[str, np.ndarray]]:
    """Per head what the page reads out of `curves`."""
    table = floats(data_set["curves"]).reshape(len(data_set["heads"]), -1)
    out = []
    for line in table:
        start, record = 0, {}
        for name, rows, columns in data_set["layout"]:
            record[name] = line[start : start + rows * columns].reshape(rows, columns)
            start += rows * columns
        assert start == line.size
        out.append(record)
    return out


class Scripts(HTMLParser):
    """Elements of the page, as an HTML parser sees them."""

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.json = ""
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.json += data


# ---- values ----------------------------------------------------------------------------------------------------


def test_values_at_the_thetas_asked_equal_the_csv(run, profiles):
    data = build_data(open_sources([run]))
    grid = [float(t) for t in data["runs"][0]["grid"]]
    rows = heads_csv(run)
    only = data["sets"][0]
    assert sorted(data["runs"][0]["asked"]) == [4.0, 8.0, 12.0]
    assert only["heads"] == [[p.layer, p.head, p.kv_head] for p in profiles]
    for (layer, head, _), record in zip(only["heads"], records(only), strict=True):
        for t, theta in enumerate(data["runs"][0]["asked"]):
            row, g = rows["prose", layer, head, f"{theta:g}"], grid.index(theta)
            for name in ("recall", "density"):
                assert record[name][0, g] == pytest.approx(float(row[name]), rel=1e-6)
            for i, name in enumerate(curves.EXTRAS):
                assert record["extras"][i, t] == pytest.approx(float(row[name]), rel=1e-6)


def test_between_the_saved_thetas_interpolation_is_close():
    profiles = make_profiles(tokens=4096, layers=1)
    grid, low, high = curves.theta_grid(profiles)
    assert np.all(np.diff(grid) > 0)
    assert grid[0] == -np.inf
    assert grid[-1] == np.inf
    assert {4.0, 8.0, 12.0} <= set(grid)
    inside = np.isfinite(grid)
    for p in profiles:
        recall, density = curve_at(p, grid)
        fine = p.curve_theta[(p.curve_theta >= low) & (p.curve_theta <= high)]
        for kept, true in ((recall, p.curve_recall), (density, p.curve_pairs / p.visible_pairs)):
            exact = true[np.searchsorted(p.curve_theta, fine)]
            assert np.abs(np.interp(fine, grid[inside], kept[inside]) - exact).max() < 0.02


def test_ends_of_the_grid_are_the_anchor_region_and_dense(run, profiles):
    only = build_data(open_sources([run]))["sets"][0]
    for p, record in zip(profiles, records(only), strict=True):
        assert record["density"][0, 0] == pytest.approx(p.anchor_pairs / p.visible_pairs, rel=1e-4)
        assert record["density"][0, -1] == 1
        assert record["recall"][0, -1] == pytest.approx(1, abs=1e-4)


def test_needs_oracle_positions_and_top_columns(run, profiles):
    data = build_data(open_sources([run]))
    only, order = data["sets"][0], [(8.0, 4.0, 12.0).index(t) for t in data["runs"][0]["asked"]]
    for p, record in zip(profiles, records(only), strict=True):
        wanted = (p.theta_at_recall(0.95), p.density_at_recall(0.95), p.density_at_recall(0.95, "oracle"))
        assert record["scalars"][0, :3] == pytest.approx([math.nan if x is None else x for x in wanted], nan_ok=True)
        density, recall = p.curve("oracle")
        assert record["oracle_recall"][0] == pytest.approx(
            np.interp(record["oracle_density"][0], density, recall), abs=2e-3
        )
        assert record["oracle_density"][0, [0, -1]] == pytest.approx(density[[0, -1]], rel=1e-4)
        # equal weights of queries: the mean over bins is the mean over queries
        queries = np.diff(p.position_edges)
        mean = (p.position_recall[order] * queries).sum(1) / queries.sum()
        assert record["position"].mean(1) == pytest.approx(mean, abs=1e-3)
        assert record["top_columns"][0].astype(int).tolist() == p.top_columns[: curves.TOP].tolist()


def test_infinite_thetas_and_missing_values(tmp_path):
    profiles = make_profiles(layers=1, heads=2, thetas=(math.inf, -math.inf, 6.0), values=False)
    page = build_report([write_run(tmp_path / "run", profiles)])
    data = parsed(page)
    assert data["runs"][0]["asked"] == [6.0, "inf", "-inf"]
    record = records(data["sets"][0])[0]
    assert np.isnan(record["extras"][curves.EXTRAS.index("output_error")]).all()
    assert record["recall"][0, -1] == pytest.approx(profiles[0].recall[0])


def test_opens_at_the_theta_of_the_figures_whatever_their_order(tmp_path):
    """The thetas of which the page keeps everything begin with it, and are spread over the range."""
    thetas = [x / 2 for x in range(60)]
    for name, order in (("up", thetas), ("down", thetas[::-1])):
        profiles = make_profiles(layers=2, heads=3, thetas=tuple(order))
        folder = write_run(tmp_path / name, profiles)
        mean = np.mean([p.recall for p in profiles], axis=0)
        want = min(t for t, recall in zip(order, mean, strict=True) if recall >= 0.95)
        assert want not in (0.0, 29.5)
        data = build_data(open_sources([folder]))
        run, record = data["runs"][0], records(data["sets"][0])[0]
        assert run["asked"][0] == want
        assert sorted(run["asked"]) == thetas
        kept = sorted(run["asked"][: run["kept"]])
        assert (kept[0], kept[-1]) == (0.0, 29.5)
        assert np.diff(kept).max() <= 2.5  # even would be 1.28
        rows = heads_csv(folder)
        for t, theta in enumerate(run["asked"][: run["kept"]]):
            row = rows["prose", 0, 0, f"{theta:g}"]
            assert record["extras"][0, t] == pytest.approx(float(row[curves.EXTRAS[0]]), rel=1e-6)
        report = json.loads((folder / "report.json").read_text())
        report["figure_theta"] = {"theta": 29.5, "why": "asked"}  # what the analysis says counts
        (folder / "report.json").write_text(json.dumps(report))
        assert build_data(open_sources([folder]))["runs"][0]["asked"][0] == 29.5
    report["figure_theta"] = {"theta": "soon"}
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(DumpError, match="theta"):
        build_data(open_sources([folder]))


def test_a_short_prompt_that_is_all_anchor_region(tmp_path):
    profiles = make_profiles(layers=1, heads=1, tokens=50)
    only = build_data(open_sources([write_run(tmp_path / "run", profiles)]))["sets"][0]
    record = records(only)[0]
    assert (record["density"] == 1).all()
    assert only["heat"][0]["rows"] == [0, 50]


# ---- heat maps -------------------------------------------------------------------------------------------------


def test_shrunk_heat_keeps_mass_and_smallest_margins(profiles):
    p = profiles[1]
    rows, columns, mass, margin = shrink_heat(p, (5, 37))
    assert mass.shape == margin.shape == (5, 37)
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, p.tokens, 0, p.tokens)
    assert mass.sum(1) == pytest.approx(np.ones(5), abs=0.02)
    for r in range(5):
        for c in range(37):
            inside = p.heat_margin[(p.heat_rows[:-1] >= rows[r]) & (p.heat_rows[:-1] < rows[r + 1])][
                :, (p.heat_columns[:-1] >= columns[c]) & (p.heat_columns[:-1] < columns[c + 1])
            ]
            assert margin[r, c] == inside.min()


def test_heat_bytes_are_within_half_a_step(run, profiles):
    data = build_data(open_sources([run]))
    low, high = data["margin"]["low"], data["margin"]["high"]
    packed = data["sets"][0]["heat"][2]
    rows, columns = len(packed["rows"]) - 1, len(packed["columns"]) - 1
    level, step = np.frombuffer(unpack(packed["cells"]), np.uint8).reshape(2, rows, columns).astype(float)
    _, _, mass, margin = shrink_heat(profiles[2], (rows, columns))
    seen = mass > 1e-6
    shown = 10 ** (((level - 1) / 62 - 1) * 6)
    assert np.abs(np.log10(shown[seen] / mass[seen])).max() <= 0.5 * 6 / 62 + 1e-9
    assert (level[mass == 0] == 0).all()
    assert (step[np.isinf(margin)] == 0).all()
    # A step is an upper bound: a cell never looks like a stripe that it has not.
    inside = np.isfinite(margin) & (margin > low) & (margin < high)
    above = low + (step - 1) / 61 * (high - low) - margin
    assert above[inside].min() >= -1e-6
    assert above[inside].max() <= (high - low) / 61 + 1e-6


def test_heat_maps_become_coarser_until_they_fit(run, monkeypatch):
    sizes = []
    monkeypatch.setattr(html, "PAGE_BYTES", 0)
    for budget in (10_000_000, 30_000, 6_000):
        monkeypatch.setattr(html, "LEAST_HEAT", budget)
        heat = build_data(open_sources([run]))["sets"][0]["heat"]
        assert len(json.dumps(heat)) <= budget
        sizes.append(len(heat[0]["columns"]))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
@pytest.mark.usefixtures("real_plotly")
def test_a_model_of_1024_heads_stays_under_15_mb(tmp_path):
    kinds = make_profiles(layers=3, heads=8, tokens=32768)
    folder = write_run(tmp_path / "big", kinds)
    names = [f"p000-layer{layer:03d}-head{head:03d}.safetensors" for layer in range(32) for head in range(32)]
    saved = sorted((folder / "profile").iterdir())
    for i, name in enumerate(names):
        if not (folder / "profile" / name).exists():
            os.link(saved[i % len(saved)], folder / "profile" / name)
    state = json.loads((folder / "analysis.json").read_text())
    (folder / "analysis.json").write_text(json.dumps({**state, "profiles": names}))
    methods = write_methods(tmp_path / "methods", kinds)
    assert write_report([folder, methods], tmp_path / "big.html").stat().st_size < 15_000_000


# ---- the page --------------------------------------------------------------------------------------------------


def parsed(page: str) -> dict:
    reader = Scripts()
    reader.feed(page)
    return json.loads(reader.json)


def test_hostile_text_stays_text(tmp_path):
    profiles = [renamed(p, prompt=HOSTILE) for p in make_profiles(layers=1, heads=2)]
    folder = write_run(tmp_path / "run", profiles, model=HOSTILE)
    page = build_report([folder], tokens={(IDENTITY, HOSTILE): [HOSTILE] * profiles[0].tokens})
    reader = Scripts()
    reader.feed(page)
    assert [t for t, _ in reader.tags].count("script") == 3
    assert "alert(1)</script>" not in page
    data = json.loads(reader.json)
    assert data["sets"][0]["prompt"] == HOSTILE
    assert data["runs"][0]["dump"]["model"]["name"] == HOSTILE
    assert json.loads(unpack(data["words"][data["sets"][0]["text"]]))[0] == HOSTILE


def test_script_never_writes_markup():
    script = html.page_script()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert word not in script
    assert "http" not in script


def test_page_asks_nothing_of_a_network(run):
    reader = Scripts()
    reader.feed(build_report([run]))
    for tag, attributes in reader.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy
    ids = [a["id"] for _, a in reader.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_script_names_only_elements_that_exist():
    assets = ROOT / "anchorscope" / "report" / "assets"
    script = html.page_script()
    assert {path.stem for path in assets.glob("*.js")} == set(html.SCRIPTS)
    page = (assets / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'(?:byId|fill|drawRecall)\(\s*"([\w-]+)"', script))
    assert len(used) > 25
    assert used <= set(re.findall(r'id="([\w-]+)"', page))


@pytest.mark.usefixtures("real_plotly")
def test_plotly_is_put_in_whole(run):
    pytest.importorskip("plotly")
    source = html.plotly_source()
    assert "plotly.js v" in source[:200]
    assert "</script" not in source.lower()
    assert source in build_report([run])


@pytest.mark.usefixtures("real_plotly")
def test_without_plotly_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingBackendError, match=r"anchorscope\[report\]"):
        build_report([run])


def test_same_results_same_bytes_and_no_path(run, tmp_path):
    a, b = write_report([run], tmp_path / "a.html"), write_report([run], tmp_path / "b.html")
    assert a.read_bytes() == b.read_bytes()
    assert str(run.parent) not in a.read_text(encoding="utf-8")


def test_building_needs_no_torch(run, tmp_path):
    code = (
        "import sys; from anchorscope.report import html; html.plotly_source = lambda: '';"
        f"html.write_report([{str(run)!r}], {str(tmp_path / 'x.html')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_a_file_that_cannot_be_written(run, tmp_path):
    with pytest.raises(RunFailure, match="cannot write"):
        write_report([run], tmp_path / "nowhere" / "x.html")


def test_columns_and_colors_stand_once():
    """heads.csv and the palette of the figures are the source; the page's script holds neither."""
    from anchorscope.analysis.tables import HEADS_COLUMNS
    from anchorscope.plots import style
    from anchorscope.report.curves import EXTRAS

    script = html.page_script()
    assert "output_close_005" not in script
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", script)) <= {"#111111", "#ffffff"}, "ink on a ground alone"
    assert HEADS_COLUMNS[4:] == names.THETA_COLUMNS
    assert set(EXTRAS) < set(names.THETA_COLUMNS)
    data = build_data(html.Sources(()))
    assert data["columns"] == names.THETA_COLUMNS
    assert data["colors"]["short"] == palette.RED
    for name in ("BLUE", "ORANGE", "GREEN", "RED", "SKY"):
        assert getattr(style, name) == getattr(palette, name), "figures and page mean the same by a color"
