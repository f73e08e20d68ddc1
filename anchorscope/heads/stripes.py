"""Which stripes a head selects, kept in one bit per (group, column), and how much two selections have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from anchorscope.kernels.geometry import Geometry
from anchorscope.methods import Head
from anchorscope.methods.margins import column_margins
from anchorscope.moved import moved
from anchorscope.params import AnchorParams
from anchorscope.runs.environment import full_precision

_COUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # bits set in each byte

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

    def chosen(self, columns: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64: groups that select each column, and groups of which it is a visible candidate.

        Args:
            columns: (c,) int64, look at these columns only; the results are then (c,).
        """
        columns = np.arange(self.tokens) if columns is None else columns
        selected = np.zeros(len(columns), dtype=np.int64)
        # Groups each of which has a column as a candidate: those that start before it less those that stop before it.
        candidate = sum(
            np.searchsorted(np.sort(x), columns, "right") * s for x, s in ((self.start, 1), (self.stop, -1))
        )
        shift = (7 - columns % 8).astype(np.uint8)
        for row in self.bits:
            selected += (row[columns // 8] >> shift) & 1
        return selected, np.asarray(candidate, dtype=np.int64)

    def columns(self) -> np.ndarray:
        """(c,) int64, ascending: the columns that some group selects."""
        return np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(self.bits, 0), count=self.tokens))

    @property
    def density(self) -> float:
        """Stripes / visible candidates, both summed over groups; NaN without candidates."""
        candidates = int((self.stop - self.start).sum())
        return _ones(self.bits) / candidates if candidates else float("nan")


def head_stripes(head: Head, params: AnchorParams, theta: float) -> HeadStripes:
    """The stripes of one head: columns whose margin is at most theta (nats), per group (docs/method.md)."""
    geo = params.at(head.n, head.window, softcap=head.softcap)
    with torch.inference_mode(), full_precision():
        margins = column_margins(head, geo).value
        # theta = inf selects every candidate, and only those.
        selected = ((margins <= theta) & torch.isfinite(margins)).cpu().numpy()
    return HeadStripes(np.packbits(selected, axis=1), *candidates_of(geo), head.n)


def candidates_of(geo: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """(groups,) int64 each: first candidate key of every group that it sees, and the one past the last."""
    start, stop = np.array([geo.candidates(g) for g in range(geo.groups)], dtype=np.int64).T
    return start, stop


def packed_stripes(margin: Tensor, theta: float, geo: Geometry) -> list[HeadStripes]:
    """The stripes of heads from their margins (H, groups, N); theta in nats."""
    start, stop = candidates_of(geo)
    n = margin.shape[-1]
    weight = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=margin.device)
    found = []
    for head in margin:
        selected = ((head <= theta) & torch.isfinite(head)).to(torch.uint8)
        bits = (torch.nn.functional.pad(selected, (0, -n % 8)).unflatten(-1, (-1, 8)) * weight).sum(
            -1, dtype=torch.uint8
        )
        found.append(HeadStripes(bits.cpu().numpy(), start, stop, n))
    return found


def overlap(a: HeadStripes, b: HeadStripes, *, shift: int = 0) -> float:
    """Jaccard overlap of two selections, pooled over groups: |both| / |either|, NaN where neither selects anything.

    Only columns that are visible candidates on both sides count, so that a column cannot be missing for being local, or
    hidden by a window, in one of them.

    Args:
        a, b: selections of the same prompt with the same groups.
        shift: compare group g of `a` with group g + shift of `b`.
    """
    count = len(a.bits) - shift
    if count <= 0:
        return float("nan")
    x, y = a.bits[:count], b.bits[shift:]
    low, high = (f(p[:count], q[shift:]) for f, p, q in ((np.maximum, a.start, b.start), (np.minimum, a.stop, b.stop)))
    # A stripe is a candidate, so what both select lies among the candidates of both.
    either = _ones((x | y) & _between(low.tobytes(), np.maximum(low, high).tobytes(), x.shape[1]))
    return _ones(x & y) / either if either else float("nan")


@lru_cache(maxsize=2)
def _between(low: bytes, high: bytes, width: int) -> np.ndarray:
    """(groups, width) uint8 with the bits of the columns low..high-1 of each group set; int64 arrays as bytes."""
    first = np.arange(width) * 8
    edges = [np.frombuffer(x, dtype=np.int64)[:, None] for x in (low, high)]
    after, upto = ((0xFF >> np.clip(edge - first, 0, 8)).astype(np.uint8) for edge in edges)
    return after & ~upto


def _ones(bits: np.ndarray) -> int:
    """How many bits are set in a uint8 array."""
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(bits).sum(dtype=np.int64))
    return int(_COUNT[bits].sum(dtype=np.int64))
