"""What the stages hand to each other; the torch and the Triton back end return the same tuples.

Sizes: B batch, H query heads, n queries, d head dimension; `blocks` = ceil(n / block) query blocks and `groups` =
ceil(blocks / step) groups, both counted from the first query; the last of each may be short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry

_COUNTED = 1 << 24  # columns counted at a time: their int64 copies take memory


class AnchorState(NamedTuple):
    """Softmax over the anchor region of every query, and what identification needs of it.

    Attributes:
        out: (B, H, n, d), softmax-weighted values over the anchor region alone, normalized; dtype of the back end.
        lse: (B, H, n) float32, log-sum-exp of the anchor region's scores in nats; -inf where the region is empty.
        q_bar: (B, H, blocks, d), mean query of each block.
        a_bar: (B, H, blocks) float32, mean anchor (largest score over the anchor region) of each block, in nats.
    """

    out: Tensor
    lse: Tensor
    q_bar: Tensor
    a_bar: Tensor


class Stripes(NamedTuple):
    """Selected key columns of every (batch, head, group), as compressed rows.

    Row r = (b * H + h) * groups + g holds `columns[offsets[r]:offsets[r + 1]]`, absolute key positions in ascending
    order. `columns` may be longer than `offsets[-1]` (a capacity); what lies beyond is undefined.

    Attributes:
        columns: (>= total,) int32.
        offsets: (B * H * groups + 1,) int64, starts at 0.
        counts: (B, H, groups) int32, stripes of each group.
    """

    columns: Tensor
    offsets: Tensor
    counts: Tensor

    def pairs(self, geo: Geometry) -> Tensor:
        """(query, stripe) pairs of all batches and heads: () int64 on the device, which nothing here waits for."""
        counts = self.counts.long()
        if geo.window is None:  # every query of a group sees its stripes; the last group may be short
            short = geo.groups * geo.group - geo.queries
            return counts.sum() * geo.group - counts[..., -1].sum() * short
        total = counts.new_zeros(())
        for low in range(0, len(self.columns), _COUNTED):
            columns = self.columns[low : low + _COUNTED].long()
            at = torch.arange(low, low + len(columns), device=counts.device)
            row = torch.searchsorted(self.offsets, at, right=True) - 1
            first = row % geo.groups * geo.group
            last = (first + geo.group).clamp(max=geo.queries)
            total += torch.where(at < self.offsets[-1], geo.column_pairs(columns, first, last), 0).sum()
        return total
