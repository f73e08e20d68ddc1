"""What was kept and what it cost in accuracy: pair counts, recall and output error of a timed selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchorscope.kernels import torch_backend
from anchorscope.kernels.types import Stripes
from anchorscope.params import AnchorParams


@dataclass(frozen=True)
class Kept:
    """Exact (query, key) pair counts over all heads.

    Attributes:
        visible: pairs of dense attention.
        anchor: pairs in the anchor regions.
        stripes: pairs of queries with the stripes of their group.
        candidates: pairs of queries with the candidate columns of their group.
    """

    visible: int
    anchor: int
    stripes: int
    candidates: int

    @property
    def kept(self) -> int:
        return self.anchor + self.stripes

    @property
    def density(self) -> float:
        """Kept pairs / visible pairs."""
        return self.kept / self.visible

    @property
    def stripe_density(self) -> float | None:
        """Stripe pairs / candidate pairs; None when there are no candidates."""
        return self.stripes / self.candidates if self.candidates else None


def count_pairs(n: int, params: AnchorParams, stripes: Stripes, window: int | None = None) -> Kept:
    """Count what a selection keeps, in integers, from its lists (every list's columns, not an estimate).

    Args:
        n: tokens.
        params: block, step and anchor region.
        stripes: the selection of all heads; `counts` has shape (B, H, groups).
        window: sliding window, or None.
    """
    geo = params.at(n, window)
    heads = stripes.counts[..., 0].numel()
    pairs = int(stripes.pairs(geo))
    return Kept(heads * geo.visible_pairs, heads * geo.anchor_pairs, pairs, heads * geo.candidate_pairs)


def exact_dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Dense causal attention in float32, in chunks of rows: output (B, H, N, d) and LSE (B, H, N).

    One group as long as the prompt makes every visible key anchor region: the anchor stage is the dense pass.
    """
    n = q.shape[2]
    state = torch_backend.anchor(q, k, v, block=n, step=1, scale=scale, window=window, softcap=softcap)
    return state.out, state.lse


def output_error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """||out - exact||_F / ||exact||_F per head: the mean over heads and the largest."""
    difference, size = [], []
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):  # head by head: no second float32 copy of everything
            difference.append((out[b, h].float() - exact[b, h]).norm())
            size.append(exact[b, h].norm())
    ratio = (torch.stack(difference) / torch.stack(size)).double().cpu()
    return float(ratio.mean()), float(ratio.max())


def recall(lse: Tensor, lse_all: Tensor) -> tuple[float, float]:
    """Attention mass kept, mean over queries of exp(LSE_kept - LSE_all) per head: mean and least head."""
    per_head = torch.exp(lse.float() - lse_all).double().mean(-1)
    return float(per_head.mean()), float(per_head.min())
