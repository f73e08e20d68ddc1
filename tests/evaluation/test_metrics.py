"""Token metrics against brute force in float64, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anchorscope.evaluation import metrics
from anchorscope.evaluation.metrics import Reference, TokenScores, summarize_tokens, token_intervals


def logits(rows=70, width=311, seed=0, scale=4.0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows_at_a_time", [1, 32, 1000])
def test_against_brute_force(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(metrics, "SLICE_BYTES", 4 * 311 * rows_at_a_time)
    dense, sparse = logits(), logits() + logits(seed=1, scale=0.7)
    targets = torch.randint(0, 311, (70,), generator=torch.Generator().manual_seed(2))
    p, q = (x.double().log_softmax(1) for x in (dense, sparse))
    reference = Reference(dense, targets)
    got = reference.compare(sparse)
    np.testing.assert_allclose(got.nll, -q.gather(1, targets[:, None])[:, 0], atol=1e-5)
    np.testing.assert_allclose(got.kl, (p.exp() * (p - q)).sum(1), atol=1e-6, rtol=1e-5)
    np.testing.assert_array_equal(got.agree, (p.argmax(1) == q.argmax(1)).double())
    nll = reference.nll
    np.testing.assert_allclose(nll, -p.gather(1, targets[:, None])[:, 0], atol=1e-5)
    summary = summarize_tokens(nll, got)
    assert summary["perplexity_dense"] == pytest.approx(float((-p.gather(1, targets[:, None])).mean().exp()), rel=1e-5)
    assert summary["perplexity_ratio"] == pytest.approx(summary["perplexity_sparse"] / summary["perplexity_dense"])
    assert summary["kl_p99"] == pytest.approx(float(np.quantile(got.kl, 0.99)))


def test_small_divergences_survive():
    dense = logits(rows=200, width=5000, scale=6.0)
    sparse = dense + 1e-3 * logits(rows=200, width=5000, seed=1)
    p, q = (x.double().log_softmax(1) for x in (dense, sparse))
    want = (p.exp() * (p - q)).sum(1)
    assert 1e-8 < float(want.mean()) < 1e-4
    got = Reference(dense, torch.zeros(200, dtype=torch.long)).compare(sparse).kl
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_equal_logits_are_exactly_equal():
    reference = Reference(logits(), torch.zeros(70, dtype=torch.long))
    same = reference.compare(logits())
    for name in ("nll", "kl", "agree"):
        np.testing.assert_array_equal(getattr(same, name), getattr(reference.scores, name))


def test_sixteen_bit_logits_are_compared_in_float32():
    dense, sparse = logits().bfloat16(), (logits() + logits(seed=1)).bfloat16()
    targets = torch.arange(70)
    a, b = Reference(dense, targets).compare(sparse), Reference(dense.float(), targets).compare(sparse.float())
    np.testing.assert_array_equal(a.kl, b.kl)
    np.testing.assert_array_equal(a.nll, b.nll)


def correlated(rng, tokens, blocks=8):
    """Noise that stays similar for a few tokens, mean 0."""
    return np.convolve(rng.normal(size=tokens + blocks - 1), np.ones(blocks) / blocks**0.5, "valid")


def test_intervals_cover_the_truth_of_correlated_tokens():
    rng = np.random.default_rng(0)
    hits = {"perplexity_ratio": 0, "kl_mean": 0}
    trials = 150
    for trial in range(trials):
        noise = correlated(rng, 1024)
        scores = TokenScores(2 + noise, 1 + noise, np.ones(1024), np.ones(1024))
        found = token_intervals(np.full(1024, 1.5), scores, trial)
        hits["perplexity_ratio"] += found["perplexity_ratio"][0] <= np.exp(0.5) <= found["perplexity_ratio"][1]
        hits["kl_mean"] += found["kl_mean"][0] <= 1 <= found["kl_mean"][1]
    for count in hits.values():
        assert 0.85 <= count / trials <= 0.99  # 95% nominal; tokens drawn one by one would cover about 55%


def test_intervals_are_paired():
    """What both arms find hard does not widen the interval of their ratio."""
    nll = 5 + correlated(np.random.default_rng(1), 2048)
    scores = TokenScores(nll + 0.01, np.full(2048, 0.2), np.ones(2048), np.ones(2048))
    found = token_intervals(nll, scores, 0)
    assert found["perplexity_ratio"] == pytest.approx([np.exp(0.01)] * 2)
    assert found["perplexity_dense"][1] > 1.05 * found["perplexity_dense"][0]
    assert found["kl_mean"] == pytest.approx([0.2, 0.2])
    assert token_intervals(nll, scores, 0) == found
    assert token_intervals(nll, scores, 1) != found


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 1000])
def test_by_position_adds_up(tokens):
    rng = np.random.default_rng(tokens)
    nll, scores = rng.random(tokens), TokenScores(*rng.random((4, tokens)))
    curve = metrics.by_position(nll, scores)
    edges = [*curve["position"], tokens]
    assert len(curve["kl"]) == min(32, tokens) == len(set(curve["position"]))
    for i in range(len(curve["kl"])):
        assert curve["nll_dense"][i] == pytest.approx(nll[edges[i] : edges[i + 1]].mean())
        assert curve["kl"][i] == pytest.approx(scores.kl[edges[i] : edges[i + 1]].mean())


def test_known_wilson_intervals():
    assert metrics.wilson(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert metrics.wilson(0.0, 4) == pytest.approx([0, 0.4899], abs=1e-4)
    assert metrics.wilson(1.0, 4)[1] == 1.0


def test_mean_interval():
    low, high = metrics.mean_interval([0.0, 1.0, 2.0, 3.0], 0)
    assert 0 <= low < 1.5 < high <= 3
    assert metrics.mean_interval([1.0], 0) is None
