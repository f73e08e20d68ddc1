"""Vertical and slash lines read off the last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head, ranks
from anchorscope.methods.selection import BlockDiagonals, Columns, Diagonals, Selection


@dataclass(frozen=True)
class VerticalSlash(Method):
    """From the attention of the last queries, keep the columns and the diagonals with most of it.

    The first 30 columns and the 100 diagonals next to the main one are always among those kept. Diagonals are executed
    as tiles of `block` queries by the `block` keys they cross; `block` 1 keeps exact diagonals. Both budgets are
    multiplied by `budget`, which is swept (a whole number of lines, at least one, halves rounded to even).

    Simplified: the authors search (vertical, slash) per head offline; here all heads share their default.
    """

    name: ClassVar = "vertical-slash"
    parameter: ClassVar = "budget"
    sweep: ClassVar = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "pattern"
    source: ClassVar = "Jiang et al., MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    budget: float = setting(1.0, "multiplies vertical and slash", low=0.0, above=True)
    vertical: int = setting(1000, "columns kept", low=0)
    slash: int = setting(6096, "diagonals kept", low=0)
    last: int = setting(64, "last queries looked at", low=1)
    block: int = setting(64, "side of the tiles that diagonals run as, tokens", low=1)

    FORCED_COLUMNS: ClassVar = 30
    FORCED_DIAGONALS: ClassVar = 100

    def dense_at(self, tokens: int) -> float | None:
        most = max(self.vertical, self.slash)
        return tokens / most if most else None

    def select(self, head: Head) -> Selection:
        columns, diagonals, products = head.once(("vertical-slash", self.last), lambda: line_sums(head, self.last))
        index = torch.arange(head.n, device=head.device)
        v = max(1, round(self.vertical * self.budget)) if self.vertical else 0
        s = max(1, round(self.slash * self.budget)) if self.slash else 0
        keep_columns = ranks(columns.masked_fill(index < self.FORCED_COLUMNS, torch.inf)) < v
        keep_diagonals = ranks(diagonals.masked_fill(index < self.FORCED_DIAGONALS, torch.inf)) < s
        lines = Diagonals(keep_diagonals) if self.block == 1 else BlockDiagonals(keep_diagonals, self.block)
        return Selection((Columns.grouped(keep_columns[None], head.n), lines), identify=products)


def line_sums(head: Head, last: int) -> tuple[Tensor, Tensor, int]:
    """Attention of the last queries summed along columns and along diagonals, and the dot products that took.

    Returns:
        (N,) sums over the queries per key j, (N,) sums per offset i - j, both in the head's dtype; scored visible
        pairs.
    """
    first = max(head.n - last, 0)
    p = torch.softmax(head.scores(first, head.n, 0, head.n), 1)
    columns = p.sum(0)
    i = torch.arange(first, head.n, device=head.device)[:, None]
    offset = i - torch.arange(head.n, device=head.device)
    seen = offset >= 0
    if head.window is not None:
        seen &= offset < head.window
    diagonals = torch.zeros_like(columns).index_add_(0, offset[seen], p[seen])
    return columns, diagonals, int(seen.sum())
