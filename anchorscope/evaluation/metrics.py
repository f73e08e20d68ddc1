"""How far a sparse model is from the dense one: per token, and with intervals over tokens or samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anchorscope.models.proof import log_sum_exp, row_slices

SLICE_BYTES = 2 << 20
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
        right: 1 where the arm's most likely token is the true one, else 0.
    """

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    right: np.ndarray


class Reference:
    """The dense arm's logits of some tokens, against which every sparse arm's are scored."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Take what all comparisons share.

        Args:
            logits: (T, vocabulary).
            targets: (T,) int64, the true next tokens.
        """
        self._logits, self._targets = logits, targets
        parts = [(log_sum_exp(z), z.argmax(1)) for z in (logits[rows].float() for rows in _slices(logits))]
        self._lse, self._first = (torch.cat(x) for x in zip(*parts, strict=True))
        picked = logits.gather(1, targets[:, None])[:, 0].double()
        self.nll: np.ndarray = (self._lse - picked).cpu().numpy()
        self._right: np.ndarray = (self._first == targets).double().cpu().numpy()

    @property
    def scores(self) -> TokenScores:
        """The scores of the dense arm itself."""
        return TokenScores(self.nll, np.zeros_like(self.nll), np.ones_like(self.nll), self._right)

    def compare(self, logits: torch.Tensor) -> TokenScores:
        """Score another arm's logits (T, vocabulary) of the same positions.

        The divergence is sum p (z - z') - (lse - lse'), exponentials summed in float64: equal logits give exactly 0 and
        rounding stays below 1e-6 nats.
        """
        lse, kl, first = [], [], []
        for rows in _slices(logits):
            a, b = self._logits[rows].float(), logits[rows].float()
            lse.append(log_sum_exp(b))
            first.append(b.argmax(1))
            p = (a - self._lse[rows].float()[:, None]).exp_()
            kl.append((p.mul_(a - b).sum(1).double() - (self._lse[rows] - lse[-1])).clamp_(min=0))
        picked = logits.gather(1, self._targets[:, None])[:, 0].double()
        choice = torch.cat(first)
        agree, right = (choice == self._first).double(), (choice == self._targets).double()
        return TokenScores(*(x.cpu().numpy() for x in (torch.cat(lse) - picked, torch.cat(kl), agree, right)))


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    """Rows to score at a time: float32 copies that stay in a CPU's cache, or keep a GPU busy."""
    return row_slices(logits, SLICE_BYTES if logits.device.type == "cpu" else 128 * SLICE_BYTES)


def summarize_tokens(dense_nll: np.ndarray, scores: TokenScores) -> dict[str, float]:
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
    """95% intervals of the means by a paired block bootstrap: neighboring tokens are not independent.

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
    center = (score + Z * Z / (2 * samples)) / (1 + Z * Z / samples)
    half = Z / (1 + Z * Z / samples) * math.sqrt(score * (1 - score) / samples + Z * Z / (4 * samples**2))
    # rounding must not keep an end from 0 or 1
    return [0.0 if score == 0 else center - half, 1.0 if score == 1 else center + half]


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
