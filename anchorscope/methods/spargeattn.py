"""SpargeAttn: pooled scores where blocks are self-similar, everything where they are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, covering, pool
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class SpargeAttn(Method):
    """Blocks with dissimilar rows are always computed; the others by descending pooled weight until `cdf` is covered.

    A block's self-similarity is the mean cosine between its rows (each with itself included). Query blocks of low
    similarity keep all their keys, key blocks of low similarity are kept by all queries. For the rest, a softmax over
    the self-similar visible key blocks of the pooled scores gives weights, and the fewest largest that reach `cdf` are
    kept; all of them where `cdf` is 1, however sums are rounded. The diagonal is not forced.

    Simplified: keys are not smoothed (mean-subtracted) first, and the second, in-kernel filter on the running maximum
    and the quantized arithmetic are left out.
    """

    name: ClassVar = "spargeattn"
    parameter: ClassVar = "cdf"
    sweep: ClassVar = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.999, 0.99999)
    sweep_end: ClassVar = 1.0
    granularity: ClassVar = "block"
    source: ClassVar = "Zhang et al., SpargeAttn, ICML 2025, arXiv 2502.18137"

    cdf: float = setting(0.98, "share of the pooled weight to cover", low=0.0, high=1.0)
    similarity: float = setting(0.6, "self-similarity below which a block is always computed", low=-1.0, high=1.0)
    query_block: int = setting(128, "query block, tokens", low=1)
    key_block: int = setting(64, "key block, tokens", low=1)

    def select(self, head: Head) -> Selection:
        bq, bk = self.query_block, self.key_block
        visible = head.visible_blocks(bq, bk)
        alike_q = head.once(("similar-q", bq), lambda: self_similarity(head.q, bq)) >= self.similarity
        alike_k = head.once(("similar-k", bk), lambda: self_similarity(head.k, bk)) >= self.similarity
        scores = head.block_scores(bq, bk).masked_fill(~alike_k, -math.inf)
        weights = torch.softmax(scores, 1).nan_to_num(0.0)  # a row without self-similar blocks has no weights
        keep = visible if self.cdf == 1 else covering(weights, self.cdf) | ~alike_q[:, None] | ~alike_k
        products = int((visible & alike_q[:, None] & alike_k).sum())
        return Selection((Blocks(keep & visible, bq, bk),), identify=products)


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Mean cosine between the rows of each block, which is the squared length of their mean direction: (blocks,)."""
    return pool(torch.nn.functional.normalize(x, dim=1, eps=1e-12), block).square().sum(1)
