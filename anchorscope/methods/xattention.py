"""XAttention: blocks scored by sums over antidiagonals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.errors import InputError
from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, block_sums, covering
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class XAttention(Method):
    """Estimate block masses from antidiagonals, and keep the largest until a share of each block row is covered.

    Tokens are cut into strides of s. The score of a (query stride, key stride) pair is the mean over t of the score of
    query s - 1 - t with key t; a softmax runs over the key strides that are not later, and sums over blocks estimate
    their mass. Block column 0 and the diagonal block are kept, and then blocks by descending mass until the row's kept
    mass reaches `threshold` of its total; 1 keeps all, however sums are rounded. Tokens missing from the last stride
    count as zero vectors, as in the authors' padding.

    Simplified: the authors calibrate the threshold per head for one model; here it is swept.
    """

    name: ClassVar = "xattention"
    parameter: ClassVar = "threshold"
    sweep: ClassVar = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995, 0.9995)
    sweep_end: ClassVar = 1.0
    granularity: ClassVar = "block"
    source: ClassVar = "Xu et al., XAttention, ICML 2025, arXiv 2503.16428"

    threshold: float = setting(0.9, "share of a block row's estimated mass to cover", low=0.0, high=1.0)
    block: int = setting(128, "block side, tokens; a multiple of stride", low=1)
    stride: int = setting(16, "antidiagonal length, tokens (the authors use 8 or 16)", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise InputError(f"xattention.block {self.block} must be a multiple of xattention.stride {self.stride}")

    def select(self, head: Head) -> Selection:
        mass, products = head.once(("xattention", self.block, self.stride), lambda: self._mass(head))
        visible = head.visible_blocks(self.block, self.block)
        forced = torch.eye(len(visible), dtype=torch.bool, device=head.device)
        forced[:, 0] = True
        forced &= visible
        missing = self.threshold * mass.sum(1) - mass.masked_fill(~forced, 0.0).sum(1)
        keep = visible if self.threshold == 1 else forced | covering(mass.masked_fill(forced, 0.0), missing)
        return Selection((Blocks(keep, self.block, self.block),), identify=products)

    def _mass(self, head: Head) -> tuple[Tensor, float]:
        """Estimated mass of every block, (blocks, blocks) float64, and the dot products spent."""
        s, per = self.stride, self.block // self.stride
        pad = (0, 0, 0, -head.n % s)
        q = torch.nn.functional.pad(head.q, pad).view(-1, s, head.d).flip(1).flatten(1)
        k = torch.nn.functional.pad(head.k, pad).view(-1, s, head.d).flatten(1)
        seen = head.visible_blocks(s, s)
        rows = []
        for a in range(0, len(q), per):
            scores = head.cap(q[a : a + per] @ k.T / s).masked_fill_(~seen[a : a + per], -math.inf)
            rows.append(block_sums(torch.softmax(scores, 1).double().sum(0), per))
        return torch.stack(rows), int(seen.sum()) * s
