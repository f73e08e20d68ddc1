"""HiP: a tree search for the key blocks of each query block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Columns, Selection


@dataclass(frozen=True)
class HiP(Method):
    """Per query block, keep k keys found by halving ranges and scoring each by its middle key.

    The R keys before the query block are cut into n ranges, twice as many as are kept (k // key_block), or as few as
    are needed for ranges of `key_block`; range r is [r R // n, (r + 1) R // n). Ranges are scored by the key at (start
    + stop) // 2 against the block's mean query, the best are kept, and those longer than `key_block` are halved there
    and scored again, until none is. The first `sinks` keys, the last `window` keys before the block and the block
    itself are always kept. Ties go to the earliest range.

    Simplified: the mean query stands for the block, and one middle key for a range; the authors sample representatives
    and refine over several iterations. Ranges wholly hidden by a sliding window are never preferred.
    """

    name: ClassVar = "hip"
    parameter: ClassVar = "k"
    sweep: ClassVar = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "block"
    source: ClassVar = "Lee et al., HiP attention, ICLR 2025, arXiv 2406.09827"

    k: int = setting(512, "keys kept per query block", low=1)
    block: int = setting(64, "queries that share a search, tokens", low=1)
    key_block: int = setting(8, "longest range kept, tokens", low=1)
    sinks: int = setting(32, "first keys always kept", low=0)
    window: int = setting(64, "keys before the block always kept", low=0)

    def dense_at(self, tokens: int) -> float:
        return self.key_block * math.ceil(tokens / self.key_block)

    def select(self, head: Head) -> Selection:
        queries = head.pooled_queries(self.block)
        first = torch.arange(len(queries), device=head.device) * self.block
        kept = max(1, self.k // self.key_block)
        count = 2 * kept
        ranges = (-(-first // self.key_block)).clamp(1, count)[:, None]
        edge = torch.arange(count + 1, device=head.device).minimum(ranges) * first[:, None] // ranges
        start, stop = edge[:, :-1], edge[:, 1:]
        products = 0
        while True:
            scored = stop > start
            scores = self._scores(head, queries, first, start, stop)
            products += int(scored.sum())
            best = scores.argsort(stable=True, dim=1, descending=True)[:, :kept].sort(1).values
            start, stop = start.gather(1, best), stop.gather(1, best)
            if int((stop - start).max()) <= self.key_block:
                break
            middle = (start + stop) // 2
            # Ranges that are short enough stay whole; their second half is empty.
            middle = torch.where(stop - start > self.key_block, middle, stop)
            start = torch.stack([start, middle], 2).flatten(1)
            stop = torch.stack([middle, stop], 2).flatten(1)

        j = torch.arange(head.n, device=head.device)
        keep = _marked(start, stop, head.n) | (j < self.sinks) | (j >= first[:, None] - self.window)
        return Selection((Columns.grouped(keep, self.block),), identify=products)

    def _scores(self, head: Head, queries: Tensor, first: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Score of each range's middle key, -inf for empty ranges and those that the block's first query cannot see."""
        middle = ((start + stop) // 2).clamp_max(head.n - 1)
        scores = torch.empty(middle.shape, dtype=head.q.dtype, device=head.device)
        rows = max(1, (1 << 22) // (middle.shape[1] * head.d))  # gathered keys held at a time
        for a in range(0, len(queries), rows):
            keys = head.k[middle[a : a + rows]]
            scores[a : a + rows] = torch.einsum("bd,bcd->bc", queries[a : a + rows], keys)
        scores = head.cap(scores).masked_fill_(stop <= start, -math.inf)
        if head.window is not None:
            scores.masked_fill_(stop <= first[:, None] - head.window + 1, -math.inf)
        return scores


def _marked(start: Tensor, stop: Tensor, n: int) -> Tensor:
    """(rows, N) bool: keys inside one of the row's disjoint ranges."""
    step = torch.zeros(len(start), n + 1, dtype=torch.int32, device=start.device)
    one = torch.ones_like(start, dtype=torch.int32)
    step.scatter_add_(1, start, one).scatter_add_(1, stop, -one)
    return step.cumsum(1)[:, :n] > 0
