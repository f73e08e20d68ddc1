"""The best key blocks by pooled scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, ranks
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class BlockTopK(Method):
    """Mean-pool queries and keys in blocks; every query block keeps the k visible key blocks of highest score.

    The diagonal is not forced. Ties go to the lowest block.
    """

    name: ClassVar = "block-topk"
    parameter: ClassVar = "k"
    sweep: ClassVar = (2, 4, 8, 16, 32, 64, 100, 200)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "block"
    source: ClassVar = "block-sparse pattern of MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    k: int = setting(100, "key blocks per query block", low=1)
    block: int = setting(64, "block side, tokens", low=1)

    def dense_at(self, tokens: int) -> float:
        return math.ceil(tokens / self.block)

    def select(self, head: Head) -> Selection:
        visible = head.visible_blocks(self.block, self.block)
        rank = head.once(("block-topk", self.block), lambda: ranks(head.block_scores(self.block, self.block)))
        keep = (rank < self.k) & visible
        return Selection((Blocks(keep, self.block, self.block),), identify=int(torch.count_nonzero(visible)))
