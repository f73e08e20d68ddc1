"""The Triton back end against the float64 brute force and against the torch engine.

In Triton's interpreter on a machine without a GPU; the tests marked `gpu` repeat it, larger, on one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from brute import THETAS, Brute, compare, make

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head
from anchorscope.params import AnchorParams

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()


def run(q, k, v, shape):
    from anchorscope.analysis.triton_engine import profile_head_triton

    if GPU:
        q, k, v = (None if x is None else x.cuda() for x in (q, k, v))
    return profile_head_triton(q, k, v, shape)


def same(a, b, tolerance=2e-5):
    """Two results of one head: counts exactly, shares within rounding."""
    for name in ("visible_pairs", "anchor_pairs", "candidate_pairs"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("kept_pairs", "stripe_pairs", "curve_pairs", "heat_rows", "heat_columns", "position_edges"):
        assert (getattr(a, name) == getattr(b, name)).all(), name
    for name in (
        "recall",
        "recall_p05",
        "recall_min",
        "recall_last",
        "output_error",
        "curve_recall",
        "position_recall",
    ):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=tolerance, nan_ok=True), name
    for name in ("heat_mass", "heat_kept", "heat_stripes"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-4), name
    finite = np.isfinite(b.heat_margin)
    assert (np.isfinite(a.heat_margin) == finite).all()
    assert a.heat_margin[finite] == pytest.approx(b.heat_margin[finite], abs=1e-3)
    # The oracle's breakpoints fall where rounding puts them; the frontier is the same.
    grid = np.linspace(a.oracle_pairs[0], a.oracle_pairs[-1], 50)
    frontiers = [np.interp(grid, x.oracle_pairs, x.oracle_recall) for x in (a, b)]
    assert frontiers[0] == pytest.approx(frontiers[1], abs=1e-3)


@pytest.mark.parametrize("n", [1, 16, 97, 128, 200])
def test_any_length(n):
    q, k, v = make(n, 16)
    shape = HeadShape(n, 16, AnchorParams(16, 2), THETAS, 0.25)
    got = run(q, k, v, shape)
    compare(got, Brute(q, k, v, shape.params, scale=0.25), THETAS)
    same(got, profile_head(q, k, v, shape))


@pytest.mark.parametrize(("window", "softcap"), [(40, None), (None, 1.0), (70, 2.0)])
def test_window_and_softcap(window, softcap):
    q, k, v = make(200, 16)
    shape = HeadShape(200, 16, AnchorParams(16, 2, 5, 20), THETAS, 0.25, window, softcap)
    got = run(q, k, v, shape)
    compare(got, Brute(q, k, v, shape.params, scale=0.25, window=window, softcap=softcap), THETAS)
    same(got, profile_head(q, k, v, shape))


def test_without_values_and_half_precision():
    q, k, _ = (x.half() for x in make(150, 16))
    shape = HeadShape(150, 16, AnchorParams(16, 2), (1.0, math.inf), 0.25)
    got = run(q, k, None, shape)
    assert np.isnan(got.output_error).all()
    same(got, profile_head(q, k, None, shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "d", "block", "step"), [(8192, 64, 64, 4), (5000, 128, 128, 16), (3001, 80, 64, 8)])
def test_agrees_with_torch_on_a_gpu(n, d, block, step, dtype):
    q, k, v = (x.to(dtype) for x in make(n, d, strength=6.0))
    thetas = (4.0, -math.inf, 2.0, 6.0, math.inf)
    shape = HeadShape(n, d, AnchorParams(block, step), thetas, d**-0.5)
    got = run(q, k, v, shape)
    want = profile_head(q.cuda(), k.cuda(), v.cuda(), shape)
    share = np.abs(got.kept_pairs - want.kept_pairs) / got.visible_pairs
    assert share.max() < 1e-5, "margins within float32 rounding of theta may flip, no others"
    for name in ("recall", "recall_p05", "recall_last", "output_error"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=2e-4), name
    assert got.curve_recall == pytest.approx(want.curve_recall, abs=2e-4)


@pytest.mark.gpu
def test_agrees_with_brute_force_on_a_gpu():
    q, k, v = (x.bfloat16() for x in make(2500, 128, strength=6.0))
    thetas = (2.0, 4.0, -math.inf, math.inf)
    shape = HeadShape(2500, 128, AnchorParams(64, 4), thetas, 128**-0.5)
    compare(run(q, k, v, shape), Brute(q, k, v, shape.params, scale=shape.scale), thetas)
