"""The best a method can do that keeps the anchor region and whole columns of each group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.oracle_row import ORACLE_SWEEP
from anchorscope.methods.selection import Columns, Selection
from anchorscope.params import AnchorParams


@dataclass(frozen=True)
class OracleStripe(Method):
    """Keep the anchor region, and the candidate columns whose mean weight per visible pair reaches a threshold.

    The same threshold in all groups: a prefix of the order by descending mass per visible pair, so optimal at its
    size.
    """

    name: ClassVar = "oracle-stripe"
    parameter: ClassVar = "threshold"
    sweep: ClassVar = ORACLE_SWEEP
    sweep_end: ClassVar = 0.0
    granularity: ClassVar = "stripe"
    oracle: ClassVar = True
    source: ClassVar = "exact attention weights, at the anchor's granularity (docs/method.md)"

    threshold: float = setting(1e-3, "least mean weight per pair of a column", low=0.0, high=1.0)
    block: int = setting(128, "anchor block, tokens", low=1)
    step: int = setting(16, "query blocks per group", low=1)

    def select(self, head: Head) -> Selection:
        p = AnchorParams(self.block, self.step)
        mean = head.once(("oracle-stripe", p.group), lambda: mean_column_weights(head, p.group))
        j = torch.arange(head.n, device=head.device)
        start = torch.arange(len(mean), device=head.device)[:, None] * p.group
        keep = (mean >= self.threshold) | (j < p.init_tokens) | (j >= start - p.lookback_tokens)
        return Selection((Columns.grouped(keep, p.group),), identify=head.pairs)


def mean_column_weights(head: Head, group: int) -> Tensor:
    """Attention weight of each column per visible pair, by groups of queries: (groups, N) float64; 0 where hidden."""
    count = math.ceil(head.n / group)
    mass = torch.zeros(count, head.n, dtype=torch.float64, device=head.device)
    for first, last, low, scores in head.chunks():
        weights = torch.softmax(scores, 1)
        for a in range(first // group * group, last, group):
            rows = weights[max(a - first, 0) : min(a + group, last) - first]
            mass[a // group, low:last] += rows.sum(0, dtype=torch.float64)
    g0 = torch.arange(0, head.n, group, device=head.device)[:, None]
    j = torch.arange(head.n, device=head.device)
    end = (g0 + group).clamp_max(head.n)
    if head.window is not None:
        end = torch.minimum(end, j + head.window)
    pairs = (end - torch.maximum(g0, j)).clamp_min(0)
    return mass / pairs.clamp_min(1)
