"""Skip-softmax: tiles that cannot matter to the running softmax are not exponentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class SkipSoftmax(Method):
    """Within dense attention, skip a tile when (tile maximum - running maximum) < ln(threshold) for all of its
    queries.

    Key tiles are visited first to last; the running maximum includes the tile itself and tiles skipped before. Scores
    of all pairs are computed, so skipping saves at most half of the arithmetic: the dot products of pairs that are not
    kept count as identification.

    Simplified: the authors calibrate the threshold per model and length; here it is swept.
    """

    name: ClassVar = "skip-softmax"
    parameter: ClassVar = "threshold"
    sweep: ClassVar = (0.5, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
    sweep_end: ClassVar = 0.0
    granularity: ClassVar = "block"
    source: ClassVar = "BLASST, arXiv 2512.12087; NVIDIA ModelOpt and TensorRT-LLM"

    threshold: float = setting(1e-3, "least share of the running maximum's exponential", low=0.0, high=1.0)
    block: int = setting(128, "tile side, tokens", low=1)

    def select(self, head: Head) -> Selection:
        gap, pairs = head.once(("skip-softmax", self.block), lambda: _gaps(head, self.block))
        keep = gap >= (math.log(self.threshold) if self.threshold > 0 else -math.inf)
        keep &= pairs > 0
        # Every score is computed and those of kept pairs are used: what remains is waste.
        return Selection((Blocks(keep, self.block, self.block),), identify=int(pairs[~keep].sum()))


def _gaps(head: Head, block: int) -> tuple[Tensor, Tensor]:
    """Largest (tile maximum - running maximum) over the queries of each tile, and visible pairs of each tile.

    Both (tiles, tiles); the gap is -inf where nothing is visible. Queries for which a tile is hidden have no say.
    """
    count = math.ceil(head.n / block)
    gap = torch.full((count, count), -math.inf, dtype=head.q.dtype, device=head.device)
    pairs = torch.zeros(count, count, dtype=torch.int64, device=head.device)
    for tile in range(count):
        first, last = tile * block, min((tile + 1) * block, head.n)
        low = head.low(first) // block * block
        scores = head.scores(first, last, low, last)
        padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % block), value=-math.inf)
        tiles = padded.unflatten(1, (-1, block))
        best = tiles.amax(2)
        behind = best - best.cummax(1).values
        behind.masked_fill_(best == -math.inf, -math.inf)  # before the first visible tile: -inf - -inf
        seen = slice(low // block, low // block + best.shape[1])
        gap[tile, seen] = behind.amax(0)
        pairs[tile, seen] = (tiles > -math.inf).sum((0, 2))
    return gap, pairs
