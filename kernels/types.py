"""What the stages hand to each other; the torch and the Triton back end return the same tuples.

Sizes: B batch, H query heads, n queries, d head dimension; `blocks` = ceil(n / block) query blocks and `groups` =
ceil(blocks / step) groups, both counted from the first query; the last of each may be short.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
