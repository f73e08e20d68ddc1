"""The best a method can do that keeps whole blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, block_sums
from anchorscope.methods.oracle_row import ORACLE_SWEEP
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class OracleBlock(Method):
    """Keep the diagonal blocks, and the blocks whose mean weight per visible pair reaches a threshold."""

    name: ClassVar = "oracle-block"
    parameter: ClassVar = "threshold"
    sweep: ClassVar = ORACLE_SWEEP
    sweep_end: ClassVar = 0.0
    granularity: ClassVar = "block"
    oracle: ClassVar = True
    source: ClassVar = "exact attention weights, in blocks"

    threshold: float = setting(1e-3, "least mean weight per pair of a block", low=0.0, high=1.0)
    block: int = setting(128, "block side, tokens", low=1)

    def select(self, head: Head) -> Selection:
        mean = head.once(("oracle-block", self.block), lambda: mean_block_weights(head, self.block))
        visible = head.visible_blocks(self.block, self.block)
        diagonal = torch.eye(len(mean), dtype=torch.bool, device=head.device)
        keep = ((mean >= self.threshold) | diagonal) & visible
        return Selection((Blocks(keep, self.block, self.block),), identify=head.pairs)


def mean_block_weights(head: Head, block: int) -> Tensor:
    """Attention weight of each block per visible pair, (blocks, blocks) float64; 0 where hidden."""
    count = math.ceil(head.n / block)
    mean = torch.zeros(count, count, dtype=torch.float64, device=head.device)
    for tile in range(count):
        first, last = tile * block, min((tile + 1) * block, head.n)
        low = head.low(first) // block * block
        scores = head.scores(first, last, low, last)
        mass = block_sums(torch.softmax(scores, 1).sum(0, dtype=torch.float64), block)
        pairs = block_sums((scores > -math.inf).sum(0), block)
        mean[tile, low // block : low // block + len(mass)] = mass / pairs.clamp_min(1)
    return mean
