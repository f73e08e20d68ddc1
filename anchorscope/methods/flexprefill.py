"""FlexPrefill: per head, pooled block scores or vertical and slash lines, by how well pooling predicts the last
queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, block_sums, ranks
from anchorscope.methods.selection import Blocks, Selection
from anchorscope.methods.vertical_slash import line_sums


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Cover a share gamma of the attention that the last block of queries pays.

    Column and diagonal means of the last `block` queries give the number of tokens that cover gamma on each side; as
    many blocks (tokens // block + 1, at least the minimum budget) of the pooled columns and of the pooled diagonals
    are kept, block column 0 and the main block diagonal first. If the Jensen-Shannon distance (square root, nats)
    between the pooled columns and the softmax of the mean last query over mean keys stays below tau, the head is
    *query-aware*: columns and diagonals get the minimum budget, and the block pairs of softmax(pooled Q, pooled K) are
    added by descending weight as long as their sum stays within gamma of the total. Prompts of at most max(2 blocks,
    minimum budget) are dense, and so is gamma = 1, however sums are rounded.

    Ties go to the lowest index. Per query head (the authors' code does the same).
    """

    name: ClassVar = "flexprefill"
    parameter: ClassVar = "gamma"
    sweep: ClassVar = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995, 0.9999)
    sweep_end: ClassVar = 1.0
    granularity: ClassVar = "block"
    source: ClassVar = "Lai et al., FlexPrefill, ICLR 2025, arXiv 2502.20766"

    gamma: float = setting(0.95, "share of the attention to cover", low=0.0, high=1.0, above=True)
    tau: float = setting(0.1, "Jensen-Shannon distance below which a head is query-aware", low=0.0)
    block: int = setting(128, "block side, tokens", low=1)
    min_budget: int = setting(1024, "least tokens of columns and of diagonals", low=0)

    def select(self, head: Head) -> Selection:
        b, n = self.block, head.n
        visible = head.visible_blocks(b, b)
        least = math.ceil(self.min_budget / b)
        if n <= max(2 * b, least * b):
            return Selection((Blocks(visible, b, b),))
        columns, diagonals, products = head.once(("vertical-slash", b), lambda: line_sums(head, b))
        columns, diagonals = columns / b, diagonals / b
        pooled = block_sums(columns, b)
        aware = self._distance(head, pooled) < self.tau
        products += visible.shape[1]

        count = visible.shape[0]
        wide, tall = (least, least) if aware else (max(self._blocks(x), least) for x in (columns, diagonals))
        block_columns = ranks(_first_forced(pooled)) < wide
        block_diagonals = ranks(_first_forced(block_sums(diagonals, b))) < tall
        index = torch.arange(count, device=head.device)
        offset = index[:, None] - index
        keep = block_columns | (block_diagonals[offset.clamp_min(0)] & (offset >= 0))
        if aware:
            keep |= self._query_aware(head)
            products += int(visible.sum())
        if self.gamma == 1:
            keep = visible
        return Selection((Blocks(keep & visible, b, b),), identify=products)

    def _blocks(self, means: Tensor) -> int:
        """Blocks that hold as many tokens as it takes to exceed gamma."""
        total = means.double().sort(descending=True).values.cumsum(0)
        return (int((total <= self.gamma).sum()) + 1) // self.block + 1

    def _distance(self, head: Head, columns: Tensor) -> float:
        """Jensen-Shannon distance between the last queries' pooled columns and what pooling predicts."""
        query = head.q[max(head.n - self.block, 0) :].mean(0, keepdim=True)
        scores = head.cap(query @ head.pooled_keys(self.block).T)[0]
        # Block means predict only what the last queries see.
        scores = scores.masked_fill(~head.visible_blocks(self.block, self.block)[-1], -math.inf)
        p, q = torch.softmax(scores, 0).double(), columns.double()
        m = (p + q) / 2
        return math.sqrt(max(0.0, float(torch.xlogy(p, p / m).nansum() + torch.xlogy(q, q / m).nansum()) / 2))

    def _query_aware(self, head: Head) -> Tensor:
        """Block pairs by descending pooled weight while their sum stays within gamma of the total."""
        weights = torch.softmax(head.block_scores(self.block, self.block), 1).flatten()
        order = weights.argsort(descending=True, stable=True)
        within = weights.double()[order].cumsum(0) <= self.gamma * len(head.pooled_queries(self.block))
        keep = torch.zeros_like(within).scatter_(0, order, within)
        return keep.view(len(head.pooled_queries(self.block)), -1)


def _first_forced(x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = math.inf
    return x
