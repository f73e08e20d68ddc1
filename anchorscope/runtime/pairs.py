"""Exact (query, key) pairs of a call whose queries start at a position of their prompt: integers, no scores."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anchorscope import params
from anchorscope.kernels.types import Stripes
from anchorscope.params import AnchorParams


def visible_pairs(n: int, offset: int, window: int | None = None) -> int:
    """Causal pairs of n queries at positions offset, offset + 1, ..., with a sliding window if there is one."""
    return params.visible_pairs(offset + n, window) - params.visible_pairs(offset, window)


@lru_cache(maxsize=1024)
def region_pairs(n: int, offset: int, shape: AnchorParams, window: int | None = None) -> int:
    """Pairs of the same queries in their anchor regions; groups start at the first query."""
    i = torch.arange(offset, offset + n)
    first = torch.zeros_like(i) if window is None else (i - window + 1).clamp_(min=0)
    local = ((i - offset) // shape.group * shape.group + offset - shape.lookback_tokens).clamp_(min=0)
    init = (local.clamp(max=shape.init_tokens) - first).clamp_(min=0)
    return int((i + 1 - torch.maximum(local, first) + init).sum())


def has_candidates(n: int, offset: int, shape: AnchorParams) -> bool:
    """Whether some group has keys outside its anchor region; if not, any theta is dense attention."""
    last = (n - 1) // shape.group * shape.group + offset
    return last - shape.lookback_tokens > shape.init_tokens


def stripe_pairs(stripes: Stripes, n: int, offset: int, shape: AnchorParams, window: int | None = None) -> Tensor:
    """Pairs that the stripes add, over all heads: () int64 on their device, without waiting for it."""
    counts = stripes.counts.long()
    if window is None:
        short = shape.groups(n) * shape.group - n
        return counts.sum() * shape.group - counts[..., -1].sum() * short
    at = torch.arange(len(stripes.columns), device=counts.device)
    row = torch.searchsorted(stripes.offsets, at, right=True) - 1
    first = row % shape.groups(n) * shape.group + offset
    last = (first + shape.group).clamp(max=offset + n)
    seen = torch.minimum(stripes.columns.long() + window, last) - first
    return torch.where(at < stripes.offsets[-1], seen.clamp(min=0), 0).sum()
