"""Difference-aware margins: how far below its group's anchor each column stays. Shared by `anchor` and
`anchor-released`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anchorscope.methods.head import Head

_ROWS = 512


class Margins(NamedTuple):
    """Margins of all columns, and the dot products they cost.

    Attributes:
        value: (groups, N), nats; +inf where a column is no candidate or no block of the group sees it.
        products: scored (block, candidate) pairs.
    """

    value: Tensor
    products: int


def column_margins(
    head: Head,
    block: int,
    step: int,
    region: Callable[[int], tuple[int, int]],
    candidates: Callable[[int], tuple[int, int]],
) -> Margins:
    """Margins of the candidate columns of every group of `block * step` queries.

    A query's anchor is its largest score over keys j < init or j >= start, later keys excepted, where (init, start) is
    `region(first query of the group)`. The margin of column j is the least, over the group's blocks whose first query
    sees j, of the block's mean anchor minus the score of its mean query with key j.

    Args:
        head: the head.
        block, step: queries pooled, and blocks per group.
        region, candidates: both map a group's first query to a pair of key positions; candidates are half open.
    """
    group = block * step
    count = math.ceil(head.n / group)
    value = torch.full((count, head.n), math.inf, dtype=head.q.dtype, device=head.device)
    pooled = head.pooled_queries(block)
    products = 0
    for g in range(count):
        first, last = g * group, min((g + 1) * group, head.n)
        start, stop = candidates(first)
        start = max(start, head.low(first))
        if stop <= start:
            continue
        anchors = torch.cat(
            [_anchors(head, a, min(a + _ROWS, last), *region(first)) for a in range(first, last, _ROWS)]
        )
        means = torch.stack([x.mean() for x in anchors.split(block)])
        t0 = torch.arange(first, last, block, device=head.device)[:, None]
        delta = means[:, None] - head.cap(pooled[first // block : first // block + len(means)] @ head.k[start:stop].T)
        if head.window is None:
            products += delta.numel()
        else:
            hidden = t0 - torch.arange(start, stop, device=head.device) >= head.window
            delta.masked_fill_(hidden, math.inf)
            products += int((~hidden).sum())
        value[g, start:stop] = delta.amin(0)
    return Margins(value, products)


def _anchors(head: Head, first: int, last: int, init: int, start: int) -> Tensor:
    """Largest score of queries first..last-1 over keys below `init` and from `start` on, (last - first,)."""
    low = head.low(first)
    start = max(start, low)
    best = head.scores(first, last, start, last).amax(1)
    stop = min(init, start)
    if stop > low:
        best = torch.maximum(best, head.scores(first, last, low, stop).amax(1))
    return best
