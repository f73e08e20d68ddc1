"""The scoring engine against dense masks in float64: every part, unions, windows, duplicates, underflow, empty rows."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anchorscope.compare import score, score_lineup
from anchorscope.methods import (
    METHODS,
    BlockDiagonals,
    Blocks,
    Buckets,
    Columns,
    Diagonals,
    Head,
    Selection,
    Sinks,
    Threshold,
    Window,
    line_up,
)

N, D = 210, 8  # more than two runs of 128 queries, the last one short


def inputs(seed=0, strength=1.0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(N, D, generator=g) for _ in range(3))
    k[:2] += 2
    q += 0.5
    return q * strength, k, v


def random_mask(*shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def dense_mask(selection, head):
    """The union, written from the definition of each part, loops and all."""
    keep = np.zeros((N, N), bool)
    s = (head.q @ head.k.T).double().numpy()
    s = s if head.softcap is None else head.softcap * np.tanh(s / head.softcap)
    i, j = np.arange(N)[:, None], np.arange(N)[None]
    seen = (j <= i) & (i - j < (head.window or N))
    p = np.exp(np.where(seen, s, -np.inf) - np.where(seen, s, -np.inf).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for part in selection.parts:
        x = SimpleNamespace(**{k: y.numpy() if isinstance(y, torch.Tensor) else y for k, y in vars(part).items()})
        for a in range(N):
            for b in range(a + 1):
                match part:
                    case Columns():
                        row = sum(a >= bound for bound in x.bounds[1:])
                        hit = x.keep[row, b]
                    case Blocks():
                        hit = x.keep[a // x.query_block, b // x.key_block]
                    case Sinks():
                        hit = b < x.count
                    case Window():
                        hit = a - b < x.size
                    case Diagonals():
                        hit = x.keep[a - b]
                    case BlockDiagonals():
                        first = a // x.block * x.block
                        offsets = range(max(first - b, 0), min(first + x.block - b, N))
                        hit = any(x.keep[o] for o in offsets)
                    case Buckets():
                        hit = x.query[a] == x.key[b] and x.query[a] >= 0
                    case Threshold():
                        hit = p[a, b] >= x.weight
                keep[a, b] |= bool(hit)
    return keep & seen, seen, s, p


def check(selection, head, v, got):
    keep, seen, s, p = dense_mask(selection, head)
    rows = (p * keep).sum(1)
    assert got.pairs == keep.sum()
    assert got.density == keep.sum() / seen.sum()
    assert got.recall == pytest.approx(rows.mean(), abs=2e-6)
    assert got.recall_p05 == pytest.approx(np.percentile(rows, 5), abs=5e-6)
    assert got.recall_last == pytest.approx(rows[-128:].mean(), abs=5e-6)
    assert got.identify_cost == selection.identify / (2 * seen.sum())
    weight = keep.astype(float)
    if selection.twice is not None:
        bounds = selection.twice.bounds
        row = np.searchsorted(bounds, np.arange(N), side="right") - 1
        weight += keep & selection.twice.keep.numpy()[row]
    top = np.where(keep, s, -np.inf).max(1, keepdims=True)
    e = weight * np.exp(np.where(keep, s - np.where(np.isfinite(top), top, 0), -np.inf))
    total = e.sum(1, keepdims=True)
    out = np.divide(e @ v.double().numpy(), total, out=np.zeros((N, v.shape[1])), where=total > 0)
    dense = p @ v.double().numpy()
    assert got.output_error == pytest.approx(np.linalg.norm(out - dense) / np.linalg.norm(dense), abs=2e-5)


def edges():
    return np.array([0, 100, 130, 131, 209, N])


SELECTIONS = {
    "columns": Selection((Columns(random_mask(5, N, share=0.2, seed=1), edges()),), identify=123),
    "dense-columns": Selection((Columns(random_mask(5, N, share=0.9, seed=2), edges()),)),
    "blocks": Selection((Blocks(random_mask(7, 7, share=0.4, seed=3), 32, 32),)),
    "sinks": Selection((Sinks(5),)),
    "window": Selection((Window(17),)),
    "diagonals": Selection((Diagonals(random_mask(N, share=0.1, seed=4)),)),
    "block-diagonals": Selection((BlockDiagonals(random_mask(N, share=0.02, seed=5), 48),)),
    "buckets": Selection(
        (
            Buckets(
                torch.randint(-1, 5, (N,), generator=torch.Generator().manual_seed(6)),
                torch.randint(-1, 5, (N,), generator=torch.Generator().manual_seed(7)),
            ),
        )
    ),
    "threshold": Selection((Threshold(0.02),)),
    "union": Selection((Sinks(5), Window(9), Blocks(random_mask(7, 7, share=0.3, seed=8), 32, 32), Threshold(0.05))),
    "shared-union": Selection((Sinks(5), Columns(random_mask(5, N, share=0.1, seed=9), edges()))),
    "nothing": Selection((Sinks(0),)),
    "everything": Selection((Window(N),)),
    "everything-shared": Selection((Sinks(N),)),
}


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("name", SELECTIONS)
def test_each_part_alone(name, window):
    q, k, v = inputs()
    head = Head(q, k, scale=0.35, window=window)
    (got,) = score(head, v, [SELECTIONS[name]])
    check(SELECTIONS[name], head, v, got)


def test_all_at_once_gives_the_same_as_one_by_one():
    """Sums are carried from one selection to the next where it contains it; that must not show."""
    q, k, v = inputs()
    head = Head(q, k, scale=0.35, softcap=3.0)
    base = random_mask(5, N, share=0.1, seed=1)
    growing = [Selection((Columns(base | random_mask(5, N, share=x, seed=2), edges()),)) for x in (0, 0.2, 0.2, 0.9, 1)]
    shrinking = growing[::-1]
    for selections in (growing, shrinking, list(SELECTIONS.values())):
        for selection, got in zip(selections, score(head, v, selections), strict=True):
            check(selection, head, v, got)


def test_keys_counted_twice():
    q, k, v = inputs()
    head = Head(q, k, scale=0.35)
    keep = random_mask(5, N, share=0.4, seed=1)
    keep[:, 0] = True
    plain = Selection((Columns(keep, edges()),))
    double = Selection(plain.parts, twice=Columns(keep & random_mask(5, N, share=0.5, seed=2), edges()))
    a, b = score(head, v, [plain, double])
    check(plain, head, v, a)
    check(double, head, v, b)
    assert (a.pairs, a.recall) == (b.pairs, b.recall), "a pair counts once in density and recall"
    assert b.output_error != pytest.approx(a.output_error, abs=1e-3)


@pytest.mark.parametrize("part", [Window(1), Sinks(3)], ids=["rows", "shared"])
def test_kept_share_underflows(part):
    """Scores hundreds of nats below the row's maximum still have a well-defined softmax among themselves."""
    q, k, v = inputs(strength=150.0)
    head = Head(q, k, scale=0.35)
    (got,) = score(head, v, [Selection((part,))])
    p = torch.softmax(head.scores(0, N, 0, N), 1)
    mask = Selection((part,)).mask(0, N, 0, N, p)
    assert ((p * mask).sum(1) < 1e-30).any(), "the branch under test was not reached"
    check(Selection((part,)), head, v, got)


def test_without_values():
    q, k, _ = inputs()
    (got,) = score(Head(q, k, scale=0.35), None, [Selection((Window(20),))])
    assert math.isnan(got.output_error)
    assert 0 < got.recall < 1


def test_every_method_scored_like_its_mask():
    """The whole way in float32: selection, engine; where rounding flips a choice, the mask flips along."""
    q, k, v = inputs()
    head = Head(q, k, scale=0.35)
    for name, cls in METHODS.items():
        method = cls()
        selection = method.select(head)
        (got,) = score(head, v, [selection])
        check(selection, head, v, got) if name != "oracle-row" else None
        assert 0 < got.density <= 1, name


def test_no_method_beats_the_oracle_of_its_density():
    """oracle-row keeps the largest weights: at equal pairs nothing keeps more."""
    q, k, v = inputs()
    head = Head(q, k, scale=0.35)
    rows = score_lineup(head, v, line_up())
    weights = torch.softmax(head.scores(0, N, 0, N), 1).double().flatten().sort(descending=True).values.cumsum(0) / N
    for contender, value, got in rows:
        assert got.recall <= float(weights[got.pairs - 1]) + 1e-5, (contender.label, value)


def test_anchor_agrees_with_analyze():
    """Two engines written apart: the analysis of anchor attention and this one, to the pair."""
    from anchorscope.analysis.accumulate import HeadShape
    from anchorscope.analysis.engine import profile_head
    from anchorscope.params import AnchorParams

    thetas = (-math.inf, 0.5, 1.5, 3.0, math.inf)
    q, k, v = inputs()
    for window in (None, 70):
        want = profile_head(q, k, v, HeadShape(N, D, AnchorParams(16, 2), thetas, 0.35, window))
        head = Head(q, k, scale=0.35, window=window)
        method = METHODS["anchor"](block=16, step=2)
        got = score(head, v, [method.at(t).select(head) for t in thetas])
        assert [x.pairs for x in got] == want.kept_pairs.tolist()
        for name in ("recall", "recall_p05", "output_error"):
            assert [getattr(x, name) for x in got] == pytest.approx(getattr(want, name), abs=2e-5), name


def test_oracle_stripe_lies_on_the_oracle_curve_of_analyze():
    from anchorscope.analysis.accumulate import HeadShape
    from anchorscope.analysis.engine import profile_head
    from anchorscope.params import AnchorParams

    q, k, v = inputs()
    want = profile_head(q, k, v, HeadShape(N, D, AnchorParams(16, 2), (1.0,), 0.35))
    head = Head(q, k, scale=0.35)
    method = METHODS["oracle-stripe"](block=16, step=2)
    for got in score(head, v, [method.at(t).select(head) for t in method.sweep]):
        bound = np.interp(got.pairs, want.oracle_pairs, want.oracle_recall)
        assert got.recall == pytest.approx(bound, abs=2e-4), got


def test_cancelled():
    from anchorscope.runs.progress import Cancelled

    q, k, v = inputs()
    with pytest.raises(Cancelled):
        score(Head(q, k, scale=0.35), v, [Selection((Window(20),))], cancelled=lambda: True)


@pytest.mark.parametrize("name", SELECTIONS)
def test_masks_of_whole_runs_give_the_same(name, monkeypatch):
    """The way that GPUs take, on the CPU."""
    from anchorscope.compare import score as module

    calls = []
    real = Selection.mask
    monkeypatch.setattr(Selection, "mask", lambda self, *a: (calls.append(1), real(self, *a))[1])
    monkeypatch.setattr(sys.modules[module.__module__], "_gathers", lambda _: False)
    q, k, v = inputs()
    head = Head(q, k, scale=0.35, window=90)
    keep = random_mask(5, N, share=0.4, seed=1)
    selection = SELECTIONS[name]
    if name == "columns":
        selection = Selection((Columns(keep, edges()),), twice=Columns(keep, edges()))
    (got,) = score(head, v, [selection])
    assert calls
    check(selection, head, v, got)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    q, k, v = inputs()
    lineup = line_up(settings=["anchor.block=16,anchor.step=2"], labels=["small"])
    want = score_lineup(Head(q, k, scale=0.35, dtype=torch.float64), v, lineup)
    cuda = Head(q.cuda(), k.cuda(), scale=0.35, dtype=torch.float64)
    for (c, value, a), (_, _, b) in zip(want, score_lineup(cuda, v.cuda(), lineup), strict=True):
        assert a.pairs == b.pairs, (c.label, value)
        assert a.identify_cost == b.identify_cost
        assert a.recall == pytest.approx(b.recall, abs=1e-9)
        assert a.output_error == pytest.approx(b.output_error, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 129, 257])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_any_length_and_window(n, window):
    """Prompts shorter than a block, one token over it, and windows of a single key: no method may stumble."""
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(n, D, generator=g) for _ in range(3))
    lineup = line_up(settings=["hyper.leaf=1/8/32,hyper.block=4,hyper.samples=2"], labels=["small-leaves"])
    for contender, value, got in score_lineup(Head(q, k, scale=0.35, window=window), v, lineup):
        name = contender.label, value
        assert all(0 <= x <= 1 for x in (got.recall, got.recall_p05, got.recall_last)), name
        assert 0 <= got.density <= 1, name
        assert math.isfinite(got.output_error), name
        assert got.identify_cost >= 0, name
        if got.density == 1:
            assert got.recall == pytest.approx(1.0, abs=1e-6), name
            if contender.method.name != "anchor-released":
                assert got.output_error < 1e-5, name


@pytest.mark.parametrize(("n", "released", "exact"), [(4096, 1.0, 0.56), (8192, 0.63, 0.30)])
def test_least_density_of_both_anchor_partitions(n, released, exact):
    """Nothing selected: the released kernels' region is two to four times what the exact partition needs."""
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), scale=0.7)
    methods = [METHODS[name](theta=-math.inf) for name in ("anchor-released", "anchor")]
    got = [x.density for x in score(head, None, [m.select(head) for m in methods])]
    assert got == pytest.approx([released, exact], abs=6e-3)
