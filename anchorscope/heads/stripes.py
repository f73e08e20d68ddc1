"""Which stripes a head selects, kept in one bit per (group, column), and how much two selections have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from anchorscope.methods import Head
from anchorscope.methods.margins import column_margins
from anchorscope.moved import moved
from anchorscope.params import AnchorParams
from anchorscope.runs.environment import full_precision

__getattr__ = moved(__name__, {"Stripes": "anchorscope.heads.stripes:HeadStripes"})


@dataclass(frozen=True)
class HeadStripes:
    """The stripes of one head at one theta.

    Attributes:
        bits: (groups, ceil(N / 8)) uint8, packed; bit j of row g says that column j is a stripe of group g.
        start, stop: (groups,) int64; the group's visible candidates are the columns start..stop-1.
        tokens: N.
    """

    bits: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tokens: int

    def row(self, group: int) -> np.ndarray:
        """(N,) bool: which columns are stripes of the group."""
        return np.unpackbits(self.bits[group], count=self.tokens).astype(bool)

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64: groups that select each column, and groups of which it is a visible candidate."""
        selected, candidate = (np.zeros(self.tokens, dtype=np.int64) for _ in range(2))
        for g in range(len(self.bits)):
            selected += self.row(g)
            candidate[self.start[g] : self.stop[g]] += 1
        return selected, candidate

    @property
    def density(self) -> float:
        """Stripes / visible candidates, both summed over groups; NaN without candidates."""
        selected, candidate = self.chosen()
        return float(selected.sum() / candidate.sum()) if candidate.any() else float("nan")


def head_stripes(head: Head, params: AnchorParams, theta: float) -> HeadStripes:
    """The stripes of one head: columns whose margin is at most theta (nats), per group (docs/method.md)."""
    geo = params.at(head.n, head.window, softcap=head.softcap)
    with torch.inference_mode(), full_precision():
        margins = column_margins(head, geo).value
        # theta = inf selects every candidate, and only those.
        selected = ((margins <= theta) & torch.isfinite(margins)).cpu().numpy()
    start, stop = np.array([geo.candidates(g) for g in range(geo.groups)]).T
    return HeadStripes(np.packbits(selected, axis=1), start, stop, head.n)


def overlap(a: HeadStripes, b: HeadStripes, *, shift: int = 0) -> float:
    """Jaccard overlap of two selections, pooled over groups: |both| / |either|, NaN where neither selects anything.

    Only columns that are visible candidates on both sides count, so that a column cannot be missing for being local, or
    hidden by a window, in one of them.

    Args:
        a, b: selections of the same prompt with the same groups.
        shift: compare group g of `a` with group g + shift of `b`.
    """
    both = either = 0
    for g in range(len(a.bits) - shift):
        low, high = max(a.start[g], b.start[g + shift]), min(a.stop[g], b.stop[g + shift])
        if high > low:
            x, y = a.row(g)[low:high], b.row(g + shift)[low:high]
            both += int((x & y).sum())
            either += int((x | y).sum())
    return both / either if either else float("nan")
