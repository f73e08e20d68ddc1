"""Every metric against its dense definition in float64, and heads made by hand whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anchorscope.heads import classify, diagnose_head, head_stripes, overlap
from anchorscope.heads import diagnostics as module
from anchorscope.kernels import reference
from anchorscope.methods import Head
from anchorscope.params import AnchorParams


def dense_weights(q, k, *, scale, window=None, softcap=None):
    """(N, N) float64 weights and what is visible, written from docs/method.md."""
    q, k = q.double(), k.double()
    s = scale * q @ k.T
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
    seen = (j <= i) if window is None else (j <= i) & (i - j < window)
    return torch.softmax(s.masked_fill(~seen, -math.inf), 1).numpy(), seen.numpy()


def dense_metrics(p, seen):
    """Every metric of docs/heads.md from N x N weights."""
    n = len(p)
    i, j = np.arange(n)[:, None], np.arange(n)
    gap = i - j
    log = np.log(p, where=p > 0, out=np.zeros_like(p))
    keys = np.exp(-(p * log).sum(1))
    far = (p * (gap >= 256)).sum(0)
    later = (seen & (gap >= 256)).sum(0)
    mean = far / np.maximum(later, 1)
    hidden = [c for c in range(4, n) if later[c] >= max(256, math.ceil(n / 8)) and mean[c] >= 0.03]
    hidden.sort(key=lambda c: (-mean[c], c))
    band = seen & (gap >= 128) & (gap <= 1023)
    count = band.sum(0)
    influence = {c: (p * band)[:, c].sum() / count[c] for c in range(n) if count[c] >= 128}
    top = sorted(influence, key=lambda c: (-influence[c], c))[:8]
    diagonal = np.array([p.diagonal(-d).sum() for d in range(n)])
    lines = diagonal[[bool(seen.diagonal(-d).any()) for d in range(n)]]
    tiles = [
        p[a : a + 64, b : b + 64].sum()
        for a in range(0, n, 64)
        for b in range(0, n, 64)
        if seen[a : a + 64, b : b + 64].any()
    ]

    def heaviest(mass):
        return np.sort(mass)[::-1][: math.ceil(len(mass) / 64)].sum() / n

    window = (p * ((j < 64) | (gap < 256))).sum(1)
    return {
        "sink_1": p[:, 0].mean(),
        "sink_4": p[:, :4].sum(1).mean(),
        "hidden_sinks": tuple(hidden),
        "hidden_sink_masses": tuple(mean[hidden]),
        "hidden_sink_mass": p[:, hidden].sum() / n,
        "local_128": (p * (gap < 128)).sum(1).mean(),
        "local_1024": (p * (gap < 1024)).sum(1).mean(),
        "distance": (p * gap).sum(1).mean(),
        "distance_1024": (p * np.minimum(gap, 1024)).sum(1).mean(),
        "effective_keys_mean": keys.mean(),
        "effective_keys_median": np.median(keys),
        "influence": np.mean([influence[c] for c in top]) if top else math.nan,
        "influential": tuple(top),
        "influences": tuple(influence[c] for c in top),
        "vertical_mass": heaviest(p.sum(0)),
        "slash_mass": heaviest(lines),
        "block_mass": heaviest(np.array(tiles)),
        "window_recall": window[320:].mean() if n > 320 else math.nan,
        "column_mass": p.sum(0),
        "far_mass": far,
    }


def random_head(n, d=16, seed=0):
    """Queries and keys with a sink, a hidden sink and a few strong columns."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    u = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    q += 4 * u
    k[0] += 9 * u
    k[min(77, n - 1)] += 8 * u
    k[:: max(n // 9, 1)] += 4 * u
    return q, k


@pytest.mark.parametrize(
    ("n", "window", "softcap"),
    [
        (1, None, None),
        (2, None, 5.0),
        (63, None, None),
        (129, 40, None),
        (320, None, None),
        (321, None, None),
        (700, None, None),
        (701, None, 4.0),
        (899, 500, None),
        (833, 300, 6.0),
        (600, 64, None),
        (500, 1, None),
        (1100, None, None),
        (1060, 1059, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_dense_definition(n, window, softcap, dtype):
    q, k = random_head(n, seed=n)
    got = diagnose_head(Head(q, k, scale=0.4, window=window, softcap=softcap, dtype=dtype))
    want = dense_metrics(*dense_weights(q, k, scale=0.4, window=window, softcap=softcap))
    tolerance = {"rel": 3e-5, "abs": 3e-6} if dtype == torch.float32 else {"rel": 1e-10, "abs": 1e-12}
    for name, value in want.items():
        mine = getattr(got, name)
        if name in ("hidden_sinks", "influential"):
            assert mine == value, name
        elif name in ("column_mass", "far_mass"):
            np.testing.assert_allclose(mine, value, rtol=3e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)
        else:
            assert mine == pytest.approx(value, nan_ok=True, **tolerance), name
    assert got.kind == classify(want["window_recall"])


def test_the_case_above_has_sinks_of_both_kinds():
    """Else the comparison of hidden sinks would compare nothing."""
    q, k = random_head(700, seed=700)
    got = diagnose_head(Head(q, k, scale=0.4))
    assert 77 in got.hidden_sinks
    assert got.sink_1 > 0.1
    assert 0 in got.influential


@pytest.mark.parametrize("rows", [128, 256, 1024])
def test_run_length_changes_nothing(monkeypatch, rows):
    """GPUs take longer runs of queries."""
    q, k = random_head(901, seed=3)
    head = Head(q, k, scale=0.4, window=700, dtype=torch.float64)
    want = diagnose_head(head)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: rows)
    got = diagnose_head(head)
    for name, value in vars(want).items():
        if name in ("kind", "hidden_sinks", "influential"):
            assert getattr(got, name) == value
        else:
            assert np.asarray(getattr(got, name)) == pytest.approx(np.asarray(value), abs=1e-9), name


def test_huge_logits_stay_finite():
    q, k = random_head(400)
    got = diagnose_head(Head(q, k, scale=1e4))
    assert all(math.isfinite(x) for x in vars(got).values() if isinstance(x, float))
    assert got.effective_keys_mean == pytest.approx(1.0, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------
# heads made by hand: one-hot positions in q and k, so that scores are chosen at will

N = 1024


def from_scores(s):
    """A head whose scores are s: identity keys, queries the rows of s."""
    return Head(s, torch.eye(len(s)), scale=1.0)


def test_pure_sink():
    s = torch.zeros(N, N)
    s[:, 0] = 60
    got = diagnose_head(from_scores(s))
    assert got.kind == "streaming"
    assert (got.sink_1, got.window_recall, got.vertical_mass) == pytest.approx((1, 1, 1), abs=1e-6)
    assert got.effective_keys_mean == pytest.approx(1, abs=1e-6)
    assert got.hidden_sinks == ()
    assert got.distance == pytest.approx((N - 1) / 2, rel=1e-6)
    assert got.influential[0] == 0
    assert got.influences[0] == pytest.approx(1, abs=1e-6)


def test_pure_local():
    """Every query looks at itself alone."""
    got = diagnose_head(from_scores(60 * torch.eye(N)))
    assert got.kind == "streaming"
    assert (got.local_128, got.slash_mass, got.window_recall) == pytest.approx((1, 1, 1), abs=1e-6)
    assert got.distance == pytest.approx(0, abs=1e-6)
    assert got.sink_1 == pytest.approx(1 / N, abs=1e-6)
    assert got.vertical_mass == pytest.approx(1 / 64, abs=1e-6)
    # 16 diagonal blocks of 136 visible ones hold everything; the best 3 of them 3/16.
    assert got.block_mass == pytest.approx(3 / 16, abs=1e-6)


def test_one_column_far_from_the_start():
    s = torch.zeros(N, N)
    s[:, 200] = 60
    got = diagnose_head(from_scores(s))
    assert got.hidden_sinks == (200,)
    assert got.hidden_sink_masses == pytest.approx((1,), abs=1e-6)
    assert got.hidden_sink_mass == pytest.approx((N - 200) / N, abs=1e-6)
    # Of the 704 queries from 320 on, those from 456 on no longer have column 200 among their last 256 keys.
    assert got.window_recall == pytest.approx((456 - 320) / (N - 320), abs=1e-5)
    assert got.kind == "retrieval"
    assert got.influential[0] == 200


def test_one_diagonal():
    """Every query looks 300 tokens back: neither sink nor recent."""
    s = 60 * torch.diag(torch.ones(N - 300), -300)
    got = diagnose_head(from_scores(s))
    assert got.kind == "retrieval"
    assert got.distance == pytest.approx((300 * (N - 300) + sum(i / 2 for i in range(300))) / N, rel=1e-5)
    assert got.slash_mass > (N - 300) / N
    assert got.hidden_sinks == ()


def test_uniform():
    got = diagnose_head(from_scores(torch.zeros(N, N)))
    assert got.effective_keys_mean == pytest.approx((N + 1) / 2, rel=1e-6)
    assert got.effective_keys_median == pytest.approx((N + 1) / 2, rel=1e-6)
    assert got.window_recall == pytest.approx(np.mean([320 / (i + 1) for i in range(320, N)]), rel=1e-6)
    assert got.kind == "retrieval"
    assert got.distance == pytest.approx((N - 1) / 4, rel=1e-6)


def test_mixed():
    """A quarter of the late queries' mass on a far column: recall about 0.9."""
    s = torch.zeros(N, N)
    s[:, 0] = 60
    s[:, 100] = 60 + math.log(0.15 / 0.85)
    got = diagnose_head(from_scores(s))
    assert got.kind == "mixed"
    assert 0.8 < got.window_recall < 0.95


def test_classes_at_their_thresholds():
    assert [classify(x) for x in (0.0, 0.7999, 0.8, 0.9499, 0.95, 1.0)] == [
        "retrieval",
        "retrieval",
        "mixed",
        "mixed",
        "streaming",
        "streaming",
    ]
    assert classify(math.nan) == ""


# ----------------------------------------------------------------------------------------------------------------
# stripes


def dense_stripes(q, k, params, theta, **how):
    """(groups, N) bool of stripes and of visible candidates, from the reference."""
    q, k = q.double()[None, None], k.double()[None, None]
    geo = reference.geometry(
        q, k, block=params.block, step=params.step, init=params.init, lookback=params.lookback, **how
    )
    margin = reference.margins(q, k, geo)[0, 0]
    return (margin <= theta) & torch.isfinite(margin), torch.isfinite(margin)


@pytest.mark.parametrize(
    ("window", "softcap", "params"),
    [
        (None, None, AnchorParams(16, 2)),
        (None, 4.0, AnchorParams(16, 2, init=5, lookback=0)),
        (90, None, AnchorParams(8, 4, init=3, lookback=20)),
        (70, 6.0, AnchorParams(16, 1)),
        (None, None, AnchorParams(128, 16)),
    ],
)
@pytest.mark.parametrize("theta", [3.0, 18.0, math.inf, -math.inf])
def test_stripes_and_overlaps_equal_the_dense_definition(window, softcap, params, theta):
    n = 301
    how = {"scale": 0.4, "softcap": softcap, "window": window}
    (q, k), (q2, _) = random_head(n, seed=1), random_head(n, seed=2)
    a, b = (head_stripes(Head(x, k, **how, dtype=torch.float64), params, theta) for x in (q, q2))
    want_a, seen = dense_stripes(q, k, params, theta, **how)
    want_b, _ = dense_stripes(q2, k, params, theta, **how)
    for got, want in ((a, want_a), (b, want_b)):
        assert torch.equal(torch.from_numpy(np.stack([got.row(g) for g in range(len(got.bits))])), want)
    selected, candidate = a.chosen()
    assert (selected == want_a.sum(0).numpy()).all()
    assert (candidate == seen.sum(0).numpy()).all()

    def jaccard(x, y, both):
        either = int(((x | y) & both).sum())
        return int((x & y & both).sum()) / either if either else math.nan

    assert overlap(a, b) == pytest.approx(jaccard(want_a, want_b, seen), nan_ok=True)
    neighbors = jaccard(want_a[:-1], want_a[1:], seen[:-1] & seen[1:])
    assert overlap(a, a, shift=1) == pytest.approx(neighbors, nan_ok=True)
    density = int(want_a.sum()) / int(seen.sum()) if seen.any() else math.nan
    assert a.density == pytest.approx(density, nan_ok=True)


def test_overlap_of_a_head_with_itself_and_by_hand():
    q, k = random_head(300)
    mine = head_stripes(Head(q, k, scale=0.4), AnchorParams(16, 2), 18.0)
    assert 0 < mine.density < 1
    assert overlap(mine, mine) == 1.0
    everything = head_stripes(Head(q, k, scale=0.4), AnchorParams(16, 2), math.inf)
    assert overlap(everything, everything, shift=1) == 1.0
    assert overlap(mine, everything) == pytest.approx(mine.density)
