"""Anchor attention as its released kernels compute it, defects included."""

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
class AnchorReleased(Method):
    """The released kernels' partition of the keys: some are counted twice, and the block before each group never.

    With groups of G = block * step queries (2048): the anchor region of a query is the first G tokens and its own
    group up to itself. Columns searched are block <= j < (group's start) - block. Those selected below G are in the
    anchor region already, so they enter the softmax twice; the `block` keys before a group that starts at 2 G or later
    are never seen. Queries after the last full group are dense, as the released module computes them.

    Not reproduced: the rounding of anchors and scores to 16 bits before they are compared.
    """

    name: ClassVar = "anchor-released"
    parameter: ClassVar = "theta"
    sweep: ClassVar = (4.0, 6.0, 8.0, 9.0, 10.0, 11.0, 12.0, 14.0, 17.0, 22.0, 32.0, math.inf)
    never_dense: ClassVar = "the block of keys before each group is never attended"
    granularity: ClassVar = "stripe"
    source: ClassVar = "released AnchorAttention kernels (v4), as described in docs/methods.md"

    theta: float = setting(12.0, "largest difference to the anchor that is kept, nats")
    block: int = setting(128, "queries pooled together, tokens", low=1)
    step: int = setting(16, "query blocks that share one selection", low=1)

    def select(self, head: Head) -> Selection:
        block, group = self.block, self.block * self.step
        margins = head.once(
            ("anchor-released", block, self.step),
            lambda: column_margins(
                head,
                AnchorParams(block, self.step, group, 0).at(head.n, head.window, softcap=head.softcap),
                AnchorParams(block, self.step).at(head.n, head.window),
                groups=head.n // group,
            ),
        )
        j = torch.arange(head.n, device=head.device)
        start = torch.arange(len(margins.value), device=head.device)[:, None] * group
        stripes = margins.value <= self.theta
        searched = (j >= block) & (j < start - block)
        stripes &= searched
        keep = stripes | (j < group) | (j >= start)
        keep |= start + group > head.n  # the remainder is dense
        twice = stripes & (j < group)
        return Selection(
            (Columns.grouped(keep, group),), identify=margins.products, twice=Columns.grouped(twice, group)
        )
