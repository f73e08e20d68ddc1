"""The engine against the float64 brute force, on shapes chosen for their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from brute import THETAS, Brute, compare, make
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head
from anchorscope.params import AnchorParams
from anchorscope.shown import theta_text


def check(
    n, d, params, *, thetas=THETAS, window=None, softcap=None, seed=0, scale=None, dtype=torch.float32, engine=None
):
    q, k, v = make(n, d, seed)
    scale = d**-0.5 if scale is None else scale
    shape = HeadShape(n, d, params, tuple(thetas), scale, window, softcap)
    got = profile_head(q, k, v, shape, dtype=dtype) if engine is None else engine(q, k, v, shape)
    brute = Brute(q, k, v, params, scale=scale, window=window, softcap=softcap)
    compare(got, brute, thetas)
    return got, brute


B, S = 8, 4
EDGES = sorted({1, 2, B - 1, B, B + 1, B * S - 1, B * S, B * S + 1, 3 * B * S, 5 * B * S + 3, 97, 251})


@pytest.mark.parametrize("n", EDGES)
def test_any_length(n):
    check(n, 16, AnchorParams(B, S))


@pytest.mark.parametrize("window", [1, 5, 40, 75, 1000])
@pytest.mark.parametrize("n", [97, 160])
def test_window(n, window):
    check(n, 16, AnchorParams(B, S), window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    check(130, 16, AnchorParams(B, S), softcap=softcap)


@pytest.mark.parametrize(("init", "lookback"), [(0, 0), (0, 9), (3, 0), (17, 5), (500, 1), (1, 500), (40, 40)])
def test_anchor_region(init, lookback):
    check(150, 16, AnchorParams(B, S, init, lookback))
    check(150, 16, AnchorParams(B, S, init, lookback), window=50)


def test_group_longer_than_prompt_is_all_anchor():
    got, _ = check(60, 16, AnchorParams(16, 32))
    assert got.candidate_pairs == 0
    assert got.kept_pairs[0] == got.visible_pairs


def test_many_chunks(monkeypatch):
    """Groups larger than a chunk of rows give the same numbers."""
    import anchorscope.analysis.engine as engine

    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 1)  # 16 rows at a time
    check(300, 16, AnchorParams(16, 5))
    check(300, 16, AnchorParams(16, 5), window=90)


def test_float64_matches_brute_force_to_rounding():
    got, brute = check(200, 16, AnchorParams(B, S), dtype=torch.float64)
    want = brute.at(0.5)
    assert got.output_error[2] == pytest.approx(want["output_error"], abs=1e-9)


def test_extremes():
    got, _ = check(200, 16, AnchorParams(B, S))
    dense, anchor = THETAS.index(math.inf), THETAS.index(-math.inf)
    assert got.kept_pairs[dense] == got.visible_pairs
    assert got.recall[dense] == pytest.approx(1, abs=1e-6)
    assert got.output_error[dense] == 0
    assert got.kept_pairs[anchor] == got.anchor_pairs
    assert got.stripe_pairs[anchor] == 0


def test_curve_holds_every_theta():
    """The all-theta curve, evaluated at its own thetas, is what asking for that theta gives."""
    got, brute = check(251, 16, AnchorParams(B, S))
    for theta in (-2.0, 0.0, 0.05, 1.0, 2.5, 10.0, -math.inf, math.inf):
        at = int(np.flatnonzero(got.curve_theta == theta)[0])
        keep = brute.keep(theta)
        assert got.curve_pairs[at] == int(keep.sum())
        assert got.curve_recall[at] == pytest.approx(float((brute.p * keep).sum() / 251), abs=1e-6)
    assert (np.diff(got.curve_theta) > 0).all()
    assert (np.diff(got.curve_pairs) >= 0).all()
    assert (np.diff(got.curve_recall) >= 0).all()


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 0.99, 1.0])
def test_the_theta_needed_typed_again_reaches_its_target(target):
    """Exactly: the recall of an asked theta and the curve's are one sum, and a theta is shown in full."""
    params, hit = AnchorParams(B, S), 0
    for seed in range(6):
        q, k, v = make(420, 16, seed=seed)
        first = profile_head(q, k, v, HeadShape(420, 16, params, (0.0,), 0.3))
        at = int(np.flatnonzero(first.curve_recall >= target)[0])
        theta = float(theta_text(float(first.curve_theta[at])))
        assert theta == first.curve_theta[at]
        again = profile_head(q, k, v, HeadShape(420, 16, params, (theta, theta - 0.05), 0.3))
        assert again.recall[0] >= target
        assert again.kept_pairs[0] == first.curve_pairs[at]
        if math.isfinite(theta) and at > 1:
            hit += 1
            assert again.recall[1] < target
    assert hit or target == 1.0


def test_everything_kept_is_recall_one():
    """Whatever sums were rounded: 1 exactly, also at the finite theta that keeps all pairs."""
    q, k, v = make(300, 16, seed=3)
    shape = HeadShape(300, 16, AnchorParams(B, S), (1000.0, math.inf, 0.0), 0.3)
    got = profile_head(q, k, v, shape)
    assert got.kept_pairs[0] == got.visible_pairs
    for name in ("recall", "recall_p05", "recall_min", "recall_last"):
        assert getattr(got, name)[:2].tolist() == [1.0, 1.0]
        assert getattr(got, name)[2] < 1
    assert got.curve_recall[-1] == got.oracle_recall[-1] == 1.0
    assert got.curve_recall[int(np.argmax(got.curve_pairs == got.visible_pairs))] == 1.0


@pytest.mark.parametrize("window", [None, 70])
def test_oracle_points_are_exact_breakpoints(window):
    got, brute = check(251, 16, AnchorParams(B, S), window=window)
    pairs, recall = brute.oracle()
    assert got.oracle_pairs[0] == got.anchor_pairs
    assert got.oracle_pairs[-1] == got.visible_pairs
    assert len(got.oracle_pairs) > 20
    near = np.interp(got.oracle_pairs, pairs, recall)
    assert got.oracle_recall == pytest.approx(near, abs=1e-6)
    # A frontier: never below the anchors' own curve at equal pairs.
    mine = np.interp(got.curve_pairs, got.oracle_pairs, got.oracle_recall)
    assert (mine >= got.curve_recall - 1e-4).all()


def test_heat_map_adds_up():
    n = 251
    got, brute = check(n, 16, AnchorParams(B, S), thetas=(0.5, 2.0))
    queries = np.diff(got.heat_rows)[:, None]
    assert (got.heat_mass * queries).sum() == pytest.approx(n, rel=1e-6)
    assert (got.heat_kept * queries).sum() == pytest.approx(got.recall[0] * n, rel=1e-5)
    mass, _ = brute.columns()
    assert got.heat_mass * queries == pytest.approx(mass.numpy(), abs=1e-5)
    finite = np.isfinite(got.heat_margin)
    want = brute.margin[0, 0].numpy()
    assert (finite == np.isfinite(want)).all()
    assert got.heat_margin[finite] == pytest.approx(want[finite], abs=1e-4)
    assert ((got.heat_stripes > 0) == (finite & (want <= 0.5))).all()
    assert got.top_mass[0] == pytest.approx(float(mass.sum(0).max()) / n, abs=1e-6)


def test_position_recall():
    got, brute = check(251, 16, AnchorParams(B, S), thetas=(0.5,))
    rows = (brute.p * brute.keep(0.5)).sum(1).numpy()
    assert got.position_recall[0] == pytest.approx(rows, abs=1e-5)


def test_without_values():
    q, k, _ = make(100, 16)
    got = profile_head(q, k, None, HeadShape(100, 16, AnchorParams(B, S), (1.0,), 0.25))
    assert np.isnan(got.output_error).all()
    assert np.isnan(got.output_close_01).all()
    assert 0 < got.recall[0] <= 1


def test_large_scores():
    check(130, 16, AnchorParams(B, S), scale=300.0, thetas=(1.0, math.inf, 500.0))


def test_constant_keys():
    n, d = 100, 8
    q, _, v = make(n, d)
    k = torch.ones(n, d)
    shape = HeadShape(n, d, AnchorParams(B, S), (-1.0, 0.5), 0.3)
    got = profile_head(q, k, v, shape)
    # All scores of a query are equal, so every margin is zero.
    assert got.kept_pairs[0] == got.anchor_pairs
    assert got.kept_pairs[1] == got.visible_pairs


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 140),
    block=st.integers(1, 20),
    step=st.integers(1, 6),
    init=st.none() | st.integers(0, 30),
    lookback=st.none() | st.integers(0, 30),
    window=st.none() | st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_any_geometry(n, block, step, init, lookback, window, seed):
    got, _ = check(n, 8, AnchorParams(block, step, init, lookback), window=window, seed=seed)
    order = np.argsort(THETAS, kind="stable")
    assert (np.diff(got.recall[order]) >= -1e-6).all()
    assert (np.diff(got.kept_pairs[order]) >= 0).all()
