"""Anchor attention with the exact partition of docs/method.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.margins import column_margins
from anchorscope.methods.selection import Columns, Selection
from anchorscope.params import AnchorParams


@dataclass(frozen=True)
class Anchor(Method):
    """Keep the anchor region of each group, and the columns whose pooled score comes within theta of the pooled
    anchor.

    Finding them costs one dot product per query block and candidate column; the anchor region's scores are used again.
    """

    name: ClassVar = "anchor"
    parameter: ClassVar = "theta"
    sweep: ClassVar = (4.0, 6.0, 8.0, 9.0, 10.0, 11.0, 12.0, 14.0, 17.0, 22.0, 32.0)
    sweep_end: ClassVar = math.inf
    granularity: ClassVar = "stripe"
    source: ClassVar = "Zhang et al., AnchorAttention, EMNLP 2025, arXiv 2505.23520"

    theta: float = setting(12.0, "largest difference to the anchor that is kept, nats")
    block: int = setting(128, "queries pooled together, tokens", low=1)
    step: int = setting(16, "query blocks that share one selection", low=1)
    init: int = setting(-1, "first tokens always kept; -1 means block", low=-1)
    lookback: int = setting(-1, "tokens before a group always kept; -1 means block", low=-1)

    @property
    def params(self) -> AnchorParams:
        """The same parameters as the analysis knows them."""
        init, lookback = (None if x < 0 else x for x in (self.init, self.lookback))
        return AnchorParams(self.block, self.step, init, lookback)

    def select(self, head: Head) -> Selection:
        p = self.params
        init, lookback = p.init_tokens, p.lookback_tokens
        margins = head.once(
            ("anchor", self.block, self.step, init, lookback),
            lambda: column_margins(head, p.at(head.n, head.window, softcap=head.softcap)),
        )
        j = torch.arange(head.n, device=head.device)
        local = torch.arange(p.groups(head.n), device=head.device)[:, None] * p.group - lookback
        keep = (margins.value <= self.theta) | (j < init) | (j >= local)
        return Selection((Columns.grouped(keep, p.group),), identify=margins.products)
