"""Margins of a head's columns, by the torch back end's own rule. Shared by `anchor`, `anchor-released` and `heads`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anchorscope.kernels.geometry import Geometry
from anchorscope.kernels.torch_backend import anchor_scores, block_means, margins
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
    head: Head, region: Geometry, candidates: Geometry | None = None, groups: int | None = None
) -> Margins:
    """Margins of the candidate columns of every group.

    A query's anchor is its largest score over its anchor region. The margin of column j is the least, over the group's
    blocks whose first query sees j, of the block's mean anchor minus the score of its mean query with key j.

    Args:
        head: the head.
        region: the head's geometry (`AnchorParams.at`), whose anchor regions are used.
        candidates: the geometry whose candidates are used, if another; of the same groups.
        groups: how many groups to look at, if not all.
    """
    candidates = candidates or region
    value = torch.full((region.groups, head.n), math.inf, dtype=head.q.dtype, device=head.device)
    pooled = head.pooled_queries(region.block)
    keys = head.k.T
    products = 0
    for g in range(region.groups if groups is None else groups):
        (first, last), (start, stop) = region.rows(g), candidates.candidates(g)
        if stop == start:
            continue
        rows = head.q[first:last].split(_ROWS)
        scored = [anchor_scores(q, keys, region, g, first + i * _ROWS)[0] for i, q in enumerate(rows)]
        a_bar = block_means(torch.cat([s.amax(1) for s in scored]), region.block, 0)
        q_bar = pooled[first // region.block :][: len(a_bar)]
        value[g, start:stop] = margins(q_bar, a_bar, keys, region, g, (start, stop))
        products += sum(max(stop - max(start, head.low(t)), 0) for t in range(first, last, region.block))
    return Margins(value, products)
