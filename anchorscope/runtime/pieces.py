"""A sparse call is cut into pieces (prompts of a batch with the same padding) and groups of heads that run alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anchorscope.anchors import LayerAnchors
from anchorscope.params import AnchorParams
from anchorscope.runtime.masks import CallPositions


class Piece(NamedTuple):
    """Rows of a batch whose prompts have the same padding, with the queries and keys that are real.

    Attributes:
        rows: the rows of the batch.
        queries: the queries of the call that are no padding.
        keys: the keys of the call that these queries may see and that are no padding.
        offset: the position of the first query in its prompt.
    """

    rows: slice
    queries: slice
    keys: slice
    offset: int

    @property
    def prompts(self) -> int:
        """Return the number of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def size(self) -> int:
        """Return the number of queries in each row."""
        return int(self.queries.stop - self.queries.start)


def pieces_of(positions: CallPositions, n: int) -> list[Piece]:
    """Cut a call of n queries into its prompts. Rows that are still all padding have no piece."""
    alike = len(set(positions.spans)) == 1
    rows = [slice(0, len(positions.spans))] if alike else [slice(b, b + 1) for b in range(len(positions.spans))]
    found = []
    for row, (start, stop) in zip(rows, positions.spans, strict=False):
        first, last = max(start - positions.offset, 0), min(stop - positions.offset, n)
        if first < last:
            place = slice(start, positions.offset + last)
            found.append(Piece(row, slice(first, last), place, positions.offset + first - start))
    return found


def split_tail(pieces: list[Piece], n: int, tail: int) -> tuple[list[Piece], list[Piece]]:
    """Cut the last `tail` queries of a call off its pieces. Return the pieces before and the pieces after the cut."""
    before, after = [], []
    for rows, queries, keys, offset in pieces:
        here = max(queries.start, min(queries.stop, n - tail))
        size = here - queries.start
        if here > queries.start:
            before.append(
                Piece(rows, slice(queries.start, here), slice(keys.start, keys.start + offset + size), offset)
            )
        if here < queries.stop:
            after.append(Piece(rows, slice(here, queries.stop), keys, offset + size))
    return before, after


def runs_sparse(piece: Piece, params: AnchorParams) -> bool:
    """Return whether a piece has keys to choose from and is no short one (at most `block` queries) behind a cache."""
    behind_cache = piece.offset > 0 and piece.size <= params.block
    return not behind_cache and params.at(piece.size, offset=piece.offset).most_stripes > 0


class HeadGroup(NamedTuple):
    """Heads of a layer that run alike.

    Attributes:
        theta: (H',) float32, nats; +inf for dense heads.
        query: (H',) int64, the query heads, or None for all.
        kv: (Hkv',) int64, the kv heads that they read, or None for all.
    """

    theta: Tensor
    query: Tensor | None
    kv: Tensor | None

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this group's share of the tensors."""
        if self.query is None or self.kv is None:
            return q, k, v
        return q.index_select(1, self.query), k.index_select(1, self.kv), v.index_select(1, self.kv)

    def place(self, out: Tensor, result: Tensor) -> None:
        """Write this group's result (b, n', H', d) into the output of all heads (b, n', H, d)."""
        if self.query is None:
            out.copy_(result)
        else:
            out.index_copy_(2, self.query, result)


def split_heads(
    anchors: LayerAnchors, kv_heads: int, device: torch.device
) -> tuple[HeadGroup | None, HeadGroup | None]:
    """Return the heads that run sparse and those left to the model's own attention; None where there are none.

    If some query heads of a kv head are dense and others are not, all of them run in the kernels, the dense ones with
    theta = +inf: they keep every key.
    """
    ratio = len(anchors.thetas) // kv_heads
    dense = [all(anchors.dense[r * ratio : (r + 1) * ratio]) for r in range(kv_heads)]

    def heads(kind: bool) -> HeadGroup | None:
        kv = [r for r in range(kv_heads) if dense[r] is kind]
        query = [h for r in kv for h in range(r * ratio, (r + 1) * ratio)]
        theta = torch.tensor([math.inf if (t := anchors.thetas[h]) is None else t for h in query], device=device)
        if len(kv) == kv_heads:
            return HeadGroup(theta, None, None)
        return HeadGroup(theta, *(torch.tensor(x, device=device) for x in (query, kv))) if kv else None

    return heads(False), heads(True)
