"""DHSA: chunk vectors against chunk vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, ranks
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class Dhsa(Method):
    """Every query chunk keeps the k visible key chunks whose length-normalized vectors score highest.

    A chunk's vector is the mean of its rows times the square root of its length, for queries and keys alike.

    Simplified: chunks of fixed length (the paper's baseline) instead of boundaries predicted by a trained network.
    Ties go to the lowest chunk; the diagonal is not forced.
    """

    name: ClassVar = "dhsa"
    parameter: ClassVar = "k"
    sweep: ClassVar = (1, 2, 4, 8, 16, 32, 64, 128)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "block"
    source: ClassVar = "DHSA, arXiv 2510.24606"

    k: int = setting(16, "key chunks per query chunk", low=1)
    chunk: int = setting(128, "chunk length, tokens", low=1)

    def dense_at(self, tokens: int) -> float:
        return math.ceil(tokens / self.chunk)

    def select(self, head: Head) -> Selection:
        visible = head.visible_blocks(self.chunk, self.chunk)
        rank = head.once(("dhsa", self.chunk), lambda: self._ranks(head))
        keep = (rank < self.k) & visible
        return Selection((Blocks(keep, self.chunk, self.chunk),), identify=int(visible.sum()))

    def _ranks(self, head: Head) -> Tensor:
        first = torch.arange(0, head.n, self.chunk, device=head.device)
        root = ((first + self.chunk).clamp_max(head.n) - first).to(head.q.dtype).sqrt()[:, None]
        scores = head.cap((head.pooled_queries(self.chunk) * root) @ (head.pooled_keys(self.chunk) * root).T)
        return ranks(scores.masked_fill_(~head.visible_blocks(self.chunk, self.chunk), -math.inf))
