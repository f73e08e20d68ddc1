"""Figures show the numbers of the profiles, mark the right regions, and fit on their canvas."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from PIL import Image
from synthetic import make_profile

from anchorscope.errors import DumpError, InputError
from anchorscope.plots import draw
from anchorscope.plots.analysis import layer_head_grid, mean_curve, pooled_oracle, recall_by_position, recall_density
from anchorscope.plots.draw import draw_all
from anchorscope.plots.heatmap import _shown_cells, stripe_heatmap
from anchorscope.plots.maps import cell_share
from anchorscope.plots.save import save_figure
from anchorscope.plots.style import share
from anchorscope.profiles import HeadProfile
from anchorscope.shown import exact_theta


def heads(count: int = 3, layers: tuple[int, ...] = (5,), **options: object) -> list[HeadProfile]:
    options = {"tokens": 1024, "block": 32, "step": 2, **options}
    return [make_profile(layer=layer, head=head, **options) for layer in layers for head in range(count)]


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]


def assert_fits(figure: Figure) -> None:
    """Nothing drawn runs off the canvas."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    assert max(width, height) <= 2000
    box = figure.get_tightbbox(canvas.get_renderer())  # inches
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


@pytest.mark.parametrize(
    ("layers", "count", "tokens"),
    [((5, 15, 25), 3, 1024), (tuple(range(30)), 9, 200), (tuple(range(32)), 32, 100)],
)
def test_everything_written_fits_the_canvas(layers: tuple[int, ...], count: int, tokens: int) -> None:
    profiles = heads(count, layers, tokens=tokens, prompt="a name of a prompt that is much longer than any title.txt")
    assert_fits(layer_head_grid(profiles))
    assert_fits(recall_density(profiles[:count]))
    assert_fits(recall_by_position(profiles[:count]))
    assert_fits(stripe_heatmap(profiles[0]))


@pytest.mark.parametrize(
    ("tokens", "block", "step", "window"),
    [(1, 128, 16, None), (2, 1, 1, None), (300, 128, 16, 40), (16_384, 128, 16, None)],
)
def test_heat_map_of_any_length(tokens: int, block: int, step: int, window: int | None) -> None:
    assert_fits(stripe_heatmap(make_profile(tokens=tokens, block=block, step=step, window=window)))


def test_grid_shows_every_number_rounded_to_the_safe_side() -> None:
    profiles = heads(3, (2, 7))
    shown = texts(layer_head_grid(list(reversed(profiles)), target_recall=0.9))
    for p in profiles:
        assert cell_share(float(p.recall[0]), below=0.9) in shown
        assert cell_share(float(p.sparsity[0])) in shown
        theta = p.theta_at_recall(0.9)
        assert theta is not None
        text = exact_theta(theta) if math.isinf(theta) else f"{math.ceil(theta * 10 - 1e-6) / 10:.1f}"
        assert text in shown
        assert math.isinf(theta) or float(text) >= theta
    below = sum(p.recall[0] < 0.9 for p in profiles)
    assert any(f"{below} of 6 heads below recall 0.9" in text for text in shown)
    mean = np.mean([p.recall[0] for p in profiles])
    assert any(f"mean recall {share(float(mean))}" in text for text in shown)


def test_grid_frames_exactly_the_heads_that_fall_short() -> None:
    profiles = heads(4, (0, 1, 2))
    target = float(np.median([p.recall[0] for p in profiles]))
    panel = layer_head_grid(profiles, target_recall=target).axes[0]
    frames = {
        (round(f.get_y() + f.get_height() / 2), round(f.get_x() + f.get_width() / 2))
        for f in panel.patches
        if isinstance(f, Rectangle)
    }
    assert frames == {(p.layer, p.head) for p in profiles if p.recall[0] < target}
    assert 0 < len(frames) < len(profiles)


def test_grid_leaves_heads_that_are_not_there_gray() -> None:
    figure = layer_head_grid([make_profile(tokens=256, block=16, step=2, layer=x, head=x) for x in range(2)])
    image = figure.axes[0].images[0].get_array()
    assert np.allclose(image[0, 1], image[1, 0])
    assert not np.allclose(image[0, 0], image[0, 1])
    assert "not analyzed" in texts(figure)


def test_mean_curve_moves_all_heads_with_one_theta() -> None:
    first, second = heads(2)
    theta, density, recall = mean_curve([first, second])
    assert theta[0] == -math.inf
    at = int(np.flatnonzero(theta == 8.0)[0])
    for values, name in ((density, "density"), (recall, "recall")):
        want = np.mean([getattr(p, name)[0] for p in (first, second)])  # measured at theta 8
        assert values[at] == pytest.approx(want, abs=1e-9)


def test_pooled_oracle_is_the_best_split_of_one_budget() -> None:
    """Against every way of stopping the two heads' oracles at a breakpoint."""
    profiles = heads(2, tokens=128, block=8, step=2)
    density, recall = pooled_oracle(profiles)
    assert (np.diff(density) >= 0).all()
    points = [p.curve("oracle") for p in profiles]
    for i in range(0, points[0][0].size, 7):
        for j in range(0, points[1][0].size, 7):
            budget = (points[0][0][i] + points[1][0][j]) / 2
            kept = (points[0][1][i] + points[1][1][j]) / 2
            assert np.interp(budget, density, recall) >= kept - 1e-9
    _, mean_density, mean_recall = mean_curve(profiles)
    assert (np.interp(mean_density, density, recall) >= mean_recall - 1e-9).all()
    assert density[-1] == pytest.approx(1.0)
    assert recall[-1] == pytest.approx(1.0)


def test_recall_density_draws_the_curves_it_names() -> None:
    profiles = heads(3)
    axes = recall_density(profiles).axes[0]
    lines = [line.get_xydata() for line in axes.lines]
    for p in profiles:
        assert any(x.shape[0] == p.curve_pairs.size and np.allclose(x.T, p.curve()) for x in lines)
    for density, recall in (mean_curve(profiles)[1:], pooled_oracle(profiles)):
        assert any(x.shape[0] == recall.size and np.allclose(x.T, (density, recall)) for x in lines)
    assert "theta 8" in texts(axes.figure)
    assert axes.get_xscale() == "log"
    assert recall_density(heads(2, tokens=100, block=128, step=16)).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize(
    ("tokens", "block", "step", "init", "lookback", "window"),
    [
        (96, 4, 2, 4, 4, None),
        (97, 4, 3, 10, 0, None),
        (100, 8, 2, 0, 8, None),
        (90, 4, 2, 30, 5, None),
        (20, 64, 2, 64, 64, None),
        (96, 4, 2, 6, 4, 20),
        (96, 4, 2, 6, 4, 5),
        (96, 4, 2, 6, 4, 95),
    ],
)
def test_marked_regions_are_the_anchor_region(
    tokens: int, block: int, step: int, init: int, lookback: int, window: int | None
) -> None:
    """A visible pair lies in a filled polygon exactly when it belongs to the anchor region."""
    p = make_profile(tokens=tokens, block=block, step=step, init=init, lookback=lookback, window=window)
    axes = stripe_heatmap(p).axes[1]
    fills = [x for x in axes.patches if isinstance(x, Polygon) and x.get_zorder() == 2]
    covers = [x for x in axes.patches if isinstance(x, Polygon) and x.get_zorder() == 3]
    i, j = (x.ravel() for x in np.mgrid[:tokens, :tokens])
    points = np.stack([j + 0.4, i + 0.6], 1)  # inside the pair's cell, off the diagonal

    def inside(patches: list[Polygon]) -> np.ndarray:
        return np.any([x.get_path().contains_points(points) for x in patches], axis=0)

    visible = (j <= i) & (i - j < (window or tokens))
    start = i // (block * step) * (block * step)
    anchor = visible & ((j < init) | (j >= start - lookback))
    assert (inside(covers) == ~visible).all()
    assert ((inside(fills) & ~inside(covers)) == anchor).all()


def test_shown_cells_keep_the_mass() -> None:
    p = make_profile(tokens=40_000, block=64, step=2)
    assert p.heat_mass.shape[0] > 64
    cells = _shown_cells(p)
    assert cells.mass.shape[0] <= 64
    assert cells.mass.shape[1] <= 480
    assert np.allclose(cells.mass.sum(1), 1, atol=5e-3)
    assert cells.by_key(cells.missed).sum() == pytest.approx(1 - p.recall[0], abs=5e-3)
    queries, keys = np.diff(cells.rows), np.diff(cells.columns)
    fine = p.heat_stripes.astype(float)
    want = np.diff(p.heat_rows) @ fine @ np.diff(p.heat_columns)
    assert queries @ cells.stripes @ keys == pytest.approx(want)


def test_one_hot_column_is_seen_at_any_length() -> None:
    """A single bin among a thousand must not fall between two pixels."""
    p = make_profile(tokens=65_536, block=128, step=16)
    pictures = []
    for factor in (0.0, 1.0):
        mass = np.full(p.heat_mass.shape, 1e-5)
        mass[:, 0] = 0.5
        column = 301
        mass[:, column] = 0.4 * factor
        q = HeadProfile(**{**_fields(p), "heat_mass": mass, "heat_kept": mass * 0})
        canvas = FigureCanvasAgg(stripe_heatmap(q))
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()).astype(int)[..., :3])
    changed = np.abs(pictures[0] - pictures[1]).sum(-1) > 100
    assert changed.any(0).sum() >= 2  # once in each heat map
    assert changed.any(1).sum() > 200


def _fields(p: HeadProfile) -> dict[str, object]:
    return {name: getattr(p, name) for name in HeadProfile.__dataclass_fields__}


def test_rounding_is_not_called_missed_mass() -> None:
    p = make_profile(tokens=512, block=16, step=2)
    kept = np.nextafter(p.heat_mass, np.float16(0))
    cells = _shown_cells(HeadProfile(**{**_fields(p), "heat_kept": kept}))
    assert cells.missed.sum() < 1e-4


def test_profiles_of_different_runs_are_not_mixed() -> None:
    with pytest.raises(InputError, match="no head profiles"):
        layer_head_grid([])
    with pytest.raises(InputError, match="share the prompt"):
        recall_density([*heads(1), *heads(1, prompt="other")])
    with pytest.raises(InputError, match="share the thetas"):
        recall_by_position([*heads(1), *heads(1, thetas=(1.0,))])
    with pytest.raises(InputError, match="heat=True"):
        stripe_heatmap(heads(1)[0].without_heat())


def test_draw_all_writes_the_figures_named(tmp_path: Path) -> None:
    profiles = heads(3, (5, 15), tokens=128, block=8) + heads(1, prompt="../../we ird/na me.txt") + heads(1, prompt="")
    seen: list[Path] = []
    files = draw_all(profiles, tmp_path / "figures", progress=seen.append)
    names = [f.name for f in files]
    assert seen == files
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(names)
    assert len(set(names)) == len(names)
    assert [n for n in names if n.startswith("prose") and "heatmap" not in n] == [
        "prose-grid.png",
        "prose-layer05-recall-density.png",
        "prose-layer05-recall-by-position.png",
        "prose-layer15-recall-density.png",
        "prose-layer15-recall-by-position.png",
    ]
    ranked = sorted(profiles[:6], key=lambda p: p.recall[0])
    wanted = {f"prose-layer{p.layer:02d}-head{p.head:02d}-heatmap.png" for p in (ranked[0], ranked[3], ranked[5])}
    assert {n for n in names if n.startswith("prose") and "heatmap" in n} == wanted
    assert {"na-me-grid.png", "prompt-grid.png"} <= set(names)
    for file in files:
        with Image.open(file) as image:
            image.verify()
            assert image.format == "PNG"
            assert image.width > 900


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty figures: for tests of which are drawn, not of what they show."""
    for name in ("layer_head_grid", "recall_density", "recall_by_position", "stripe_heatmap"):
        monkeypatch.setattr(draw, name, lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.mark.usefixtures("blank")
def test_heat_maps_are_drawn_for_the_heads_asked(tmp_path: Path) -> None:
    profiles = heads(2, (5, 15), tokens=128, block=8)
    files = draw_all(profiles, tmp_path, heatmaps=[(15, 1)])
    assert [f.name for f in files if "heatmap" in f.name] == ["prose-layer15-head01-heatmap.png"]
    assert sum("heatmap" in f.name for f in draw_all(profiles, tmp_path, heatmaps="all")) == 4
    with pytest.raises(InputError, match="layer 5, head 2: it was not analyzed"):
        draw_all(profiles, tmp_path, heatmaps=[(5, 2)])
    with pytest.raises(InputError, match="'all' or a list"):
        draw_all(profiles, tmp_path, heatmaps="worst")
    with pytest.raises(InputError, match="no head profiles"):
        draw_all([], tmp_path)
    with pytest.raises(DumpError, match="no profile at"):
        draw_all([tmp_path / "none"], tmp_path)


@pytest.mark.usefixtures("blank")
def test_heat_maps_are_read_only_when_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for p in heads(3, (5, 15), tokens=128, block=8):
        paths.append(tmp_path / f"{p.layer}-{p.head}")
        p.save(paths[-1])
    read: list[str] = []
    load = HeadProfile.load

    def spy(path: Path, *, heat: bool = True) -> HeadProfile:
        if heat:
            read.append(Path(path).name)
        return load(path, heat=heat)

    monkeypatch.setattr(HeadProfile, "load", spy)
    draw_all(paths, tmp_path / "out", heatmaps=[(5, 1)])
    assert read == ["5-1"]


def test_same_profiles_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_figure(stripe_heatmap(make_profile(tokens=256, block=16, step=2)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_needs_no_torch_no_pyplot_and_changes_no_setting() -> None:
    code = "import sys, anchorscope.report; sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    before = dict(matplotlib.rcParams)
    stripe_heatmap(make_profile(tokens=64, block=8, step=2))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9434, "0.943"),
        (1.0, "1.000"),
        (0.0312, "0.0312"),
        (0.00637, "0.00637"),
        (4.2e-5, "4.2e-05"),
        (1e-16, "0.000"),
    ],
)
def test_shares_keep_the_digits_that_matter(value: float, text: str) -> None:
    assert share(value) == text


def test_names_in_titles() -> None:
    shown = texts(recall_by_position(heads(1, prompt="cost $5 and $6\nlines")))
    assert any("cost $5 and $6\\nlines" in text for text in shown)
