"""How far a sparse model is from the dense one: per token, and with intervals over tokens or samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SLICE_BYTES = 64 << 20  # of float32 logits compared at a time
CURVE_BINS = 32
REPLICATES = 2000
CONFIDENCE = 0.95
Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class TokenScores:
    """One arm against dense, per predicted token, (T,) float64 each.

    Attributes:
        nll: negative log-likelihood of the true next token, nats.
        kl: KL(dense || arm) of the distributions of the next token, nats.
        agree: 1 where both have the same most likely token, else 0.
    """

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Negative log-likelihood of the targets, nats, (T,) float64.

    Args:
        logits: (T, vocabulary).
        targets: (T,) int64.
    """
    parts = [
        _lse(z) - z.gather(1, t[:, None])[:, 0].double()
        for z, t in ((z.float(), t) for z, t in zip(_slices(logits), _slices(targets, logits), strict=True))
    ]
    return _joined(parts)


def compare_tokens(dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Score one arm's logits against the dense ones.

    The divergence is sum p (z - z') - (lse - lse'), exponentials summed in float64: equal logits give exactly 0 and
    rounding stays below 1e-6 nats.

    Args:
        dense, sparse: (T, vocabulary) of the same positions.
        targets: (T,) int64, the true next tokens.
    """
    nll, kl, agree = [], [], []
    for a, b, t in zip(_slices(dense), _slices(sparse), _slices(targets, dense), strict=True):
        a, b = a.float(), b.float()
        lse_a, lse_b = _lse(a), _lse(b)
        nll.append(lse_b - b.gather(1, t[:, None])[:, 0].double())
        agree.append((a.argmax(1) == b.argmax(1)).double())
        p = (a - lse_a.float()[:, None]).exp_()
        kl.append((p.mul_(a - b).sum(1).double() - (lse_a - lse_b)).clamp_(min=0))
    return TokenScores(_joined(nll), _joined(kl), _joined(agree))


def _lse(z: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials of each row, float64."""
    top = z.amax(1, keepdim=True)
    return (z - top).exp_().sum(1, dtype=torch.float64).log_() + top[:, 0].double()


def _slices(x: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    width = (x if like is None else like).shape[1]
    return x.split(max(1, SLICE_BYTES // (4 * width)))


def _joined(parts: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat([x.cpu() for x in parts]).numpy() if parts else np.zeros(0)


def summarise_tokens(dense_nll: np.ndarray, scores: TokenScores) -> dict[str, float]:
    """Perplexities, their ratio, divergence (mean, 99th percentile by linear interpolation) and agreement."""
    return {
        "perplexity_dense": math.exp(float(dense_nll.mean())),
        "perplexity_sparse": math.exp(float(scores.nll.mean())),
        "perplexity_ratio": math.exp(float(scores.nll.mean() - dense_nll.mean())),
        "kl_mean": float(scores.kl.mean()),
        "kl_p99": float(np.quantile(scores.kl, 0.99)),
        "top1_agreement": float(scores.agree.mean()),
    }


def token_intervals(dense_nll: np.ndarray, scores: TokenScores, seed: int) -> dict[str, list[float]]:
    """95% intervals of the means by a paired block bootstrap: neighbouring tokens are not independent.

    Contiguous blocks of tokens are drawn with replacement, the same ones for both arms; percentiles of 2,000 draws.
    Blocks are T ** (1/2) tokens long (90 at 8,192 tokens), so that blocks and their number grow together.
    """
    tokens = len(dense_nll)
    size = max(1, math.isqrt(tokens))
    edges = np.arange(0, tokens, size)
    columns = np.stack([dense_nll, scores.nll, scores.kl, scores.agree])
    sums = np.add.reduceat(columns, edges, axis=1)  # (4, blocks)
    counts = np.diff(np.append(edges, tokens))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(edges), np.full(len(edges), 1 / len(edges)), size=REPLICATES)
    dense, sparse, kl, agree = (draws @ sums.T / (draws @ counts)[:, None]).T
    return {
        "perplexity_dense": _percentiles(np.exp(dense)),
        "perplexity_sparse": _percentiles(np.exp(sparse)),
        "perplexity_ratio": _percentiles(np.exp(sparse - dense)),
        "kl_mean": _percentiles(kl),
        "top1_agreement": _percentiles(agree),
    }


def by_position(dense_nll: np.ndarray, scores: TokenScores) -> dict[str, list[float]]:
    """Means over up to 32 equal stretches of the prompt; `position` is the first token predicted from in each."""
    tokens = len(dense_nll)
    edges = np.linspace(0, tokens, min(CURVE_BINS, tokens) + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, tokens))
    columns = {"nll_dense": dense_nll, "nll_sparse": scores.nll, "kl": scores.kl, "agreement": scores.agree}
    means = {name: (np.add.reduceat(x, edges) / counts).tolist() for name, x in columns.items()}
    return {"position": edges.tolist(), **means}


def wilson(score: float, samples: int) -> list[float]:
    """95% interval of a mean score between 0 and 1 (Wilson's, for shares; wider than needed for part scores)."""
    centre = (score + Z * Z / (2 * samples)) / (1 + Z * Z / samples)
    half = Z / (1 + Z * Z / samples) * math.sqrt(score * (1 - score) / samples + Z * Z / (4 * samples**2))
    # rounding must not keep an end from 0 or 1
    return [0.0 if score == 0 else centre - half, 1.0 if score == 1 else centre + half]


def mean_interval(values: Sequence[float], seed: int) -> list[float] | None:
    """95% interval of a mean over samples by bootstrap; None for a single sample."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = rng.choice(np.asarray(values, dtype=float), size=(REPLICATES, len(values)))
    return _percentiles(draws.mean(1))


def _percentiles(draws: np.ndarray) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    return [float(x) for x in np.quantile(draws, (tail, 1 - tail))]
