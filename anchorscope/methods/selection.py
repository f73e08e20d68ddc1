"""What a method keeps, compactly: a union of parts, none of them N x N.

A part says which keys j some queries i keep. Whether a query *sees* the key (causality, sliding window) is decided by
the engine that scores the selection, so parts may name keys that are hidden. There are two kinds of parts:

- shared parts (`Columns`, `Blocks`, `Sinks`, `BlockDiagonals`): all queries between two `edges` keep the same keys;
- row parts (`Window`, `Diagonals`, `Buckets`, `Threshold`): every query has its own.

Key ranges are half open; `low` and `high` bound the keys asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class SharedPart(ABC):
    """Keys kept by all queries of a range."""

    @abstractmethod
    def edges(self, n: int) -> np.ndarray:
        """Ascending int64 query positions where the kept keys may change: 0 first, n last."""

    @abstractmethod
    def columns(self, row: int, low: int, high: int) -> Tensor:
        """(high - low,) bool: keys low..high-1 that the queries of the range around `row` keep."""


class RowPart(ABC):
    """Keys kept by each query on its own."""

    @abstractmethod
    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        """(last - first, high - low) bool for queries first..last-1 and keys low..high-1.

        `weights` are the exact attention weights of these pairs, float, zero where hidden.
        """


Part = SharedPart | RowPart


def multiples(step: int, n: int) -> np.ndarray:
    """0, step, 2 * step, ... below n, and n."""
    return np.append(np.arange(0, n, step, dtype=np.int64), n)


@dataclass(frozen=True, eq=False)
class Columns(SharedPart):
    """Token columns per query range.

    Attributes:
        keep: (G, N) bool.
        bounds: (G + 1,) int64 ascending, the query ranges; the first is 0 and the last N.
    """

    keep: Tensor
    bounds: np.ndarray

    @classmethod
    def grouped(cls, keep: Tensor, group: int) -> Columns:
        """Ranges of `group` queries; the last may be short."""
        return cls(keep, multiples(group, keep.shape[1]))

    def edges(self, n: int) -> np.ndarray:
        return self.bounds

    def columns(self, row: int, low: int, high: int) -> Tensor:
        return self.keep[int(np.searchsorted(self.bounds, row, side="right")) - 1, low:high]


@dataclass(frozen=True, eq=False)
class Blocks(SharedPart):
    """Key blocks per query block.

    Attributes:
        keep: (ceil(N / query_block), ceil(N / key_block)) bool.
        query_block, key_block: tokens.
    """

    keep: Tensor
    query_block: int
    key_block: int

    def edges(self, n: int) -> np.ndarray:
        return multiples(self.query_block, n)

    def columns(self, row: int, low: int, high: int) -> Tensor:
        first, last = low // self.key_block, -(-high // self.key_block)
        wide = self.keep[row // self.query_block, first:last].repeat_interleave(self.key_block)
        return wide[low - first * self.key_block : high - first * self.key_block]


@dataclass(frozen=True)
class Sinks(SharedPart):
    """The first `count` keys."""

    count: int
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    def edges(self, n: int) -> np.ndarray:
        return np.array([0, n], dtype=np.int64)

    def columns(self, row: int, low: int, high: int) -> Tensor:
        return torch.arange(low, high, device=self.device) < self.count


@dataclass(frozen=True, eq=False)
class BlockDiagonals(SharedPart):
    """Diagonals executed as tiles: a query block keeps every key that a chosen diagonal crosses within the block.

    Attributes:
        keep: (N,) bool, the offsets i - j chosen.
        block: queries per tile, which is also the tile's width in keys.
    """

    keep: Tensor
    block: int

    def __post_init__(self) -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=self.keep.device)
        object.__setattr__(self, "_before", torch.cat([zero, self.keep.long().cumsum(0)]))

    def edges(self, n: int) -> np.ndarray:
        return multiples(self.block, n)

    def columns(self, row: int, low: int, high: int) -> Tensor:
        first = row // self.block * self.block
        # Key j is crossed when an offset among first - j .. first + block - 1 - j is chosen.
        offset = first - torch.arange(low, high, device=self.keep.device)
        n = self.keep.numel()
        before: Tensor = self._before  # type: ignore[attr-defined]
        return before[(offset + self.block).clamp(0, n)] > before[offset.clamp(0, n)]


@dataclass(frozen=True)
class Window(RowPart):
    """The last `size` keys up to the query itself: i - j < size."""

    size: int

    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        i = torch.arange(first, last, device=weights.device)[:, None]
        return torch.arange(low, high, device=weights.device) > i - self.size


@dataclass(frozen=True, eq=False)
class Diagonals(RowPart):
    """Whole diagonals; `keep` is (N,) bool over the offsets i - j."""

    keep: Tensor

    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        i = torch.arange(first, last, device=self.keep.device)[:, None]
        offset = i - torch.arange(low, high, device=self.keep.device)
        return self.keep[offset.clamp_min(0)] & (offset >= 0)


@dataclass(frozen=True, eq=False)
class Buckets(RowPart):
    """Pairs in the same bucket: query[i] == key[j], both (N,) int64; negative means in no bucket."""

    query: Tensor
    key: Tensor

    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        q, k = self.query[first:last, None], self.key[low:high]
        return (q == k) & (q >= 0)


@dataclass(frozen=True)
class Threshold(RowPart):
    """Pairs whose attention weight is at least `weight`; only an oracle knows them."""

    weight: float

    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        return weights >= self.weight


@dataclass(frozen=True, eq=False)
class Selection:
    """The union of `parts`, each pair counted once, and what finding it cost.

    Attributes:
        parts: what is kept; hidden pairs are dropped when scored.
        identify: arithmetic beyond the sparse attention itself, in d-dimensional dot products (2 * d FLOPs each).
            `density + identify_cost` is then the share of dense arithmetic. Only dot products count; sums, sorts and
            exponentials do not, as they do not for dense attention either.
        twice: columns, all of them kept, whose weight enters the softmax twice (a defect of `anchor-released`).
    """

    parts: tuple[Part, ...]
    identify: float = 0.0
    twice: Columns | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the selection holds."""
        parts = [*self.parts, *([] if self.twice is None else [self.twice])]
        return sum(x.nbytes for p in parts for x in vars(p).values() if isinstance(x, (Tensor, np.ndarray)))

    def edges(self, n: int) -> np.ndarray | None:
        """Query positions where the kept keys may change, or None if they may change at every query."""
        shared = [p for p in self.parts if isinstance(p, SharedPart)]
        if len(shared) < len(self.parts):
            return None
        if self.twice is not None:
            shared.append(self.twice)
        return np.unique(np.concatenate([np.array([0, n], dtype=np.int64), *(p.edges(n) for p in shared)]))

    def columns(self, row: int, low: int, high: int) -> Tensor:
        """(high - low,) bool, for a selection of shared parts only; see `SharedPart.columns`."""
        shared = [p.columns(row, low, high) for p in self.parts if isinstance(p, SharedPart)]
        keep = shared[0]
        for other in shared[1:]:
            keep = keep | other
        return keep

    def mask(self, first: int, last: int, low: int, high: int, weights: Tensor) -> Tensor:
        """(last - first, high - low) bool for a run of queries; hidden pairs are not removed."""
        keep = torch.zeros(last - first, high - low, dtype=torch.bool, device=weights.device)
        for part in self.parts:
            if isinstance(part, RowPart):
                keep |= part.mask(first, last, low, high, weights)
                continue
            edges = part.edges(max(last, 1))
            inside = edges[(edges > first) & (edges < last)]
            for a, b in zip([first, *inside], [*inside, last], strict=True):
                keep[a - first : b - first] |= part.columns(int(a), low, high)
        return keep
