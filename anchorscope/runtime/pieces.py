"""One sparse call in pieces: prompts of a batch that lie alike, and heads that run alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anchorscope.anchors import LayerAnchors
from anchorscope.params import AnchorParams
from anchorscope.runtime.masks import CallPositions


class Piece(NamedTuple):
    """Rows of a batch whose prompts lie alike.

    Attributes:
        rows: of the batch.
        queries: of the call, without padding.
        keys: of those given, without padding.
        offset: position of the first query in its prompt.
    """

    rows: slice
    queries: slice
    keys: slice
    offset: int

    @property
    def prompts(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def size(self) -> int:
        """Queries per row."""
        return int(self.queries.stop - self.queries.start)


def pieces_of(positions: CallPositions, n: int) -> list[Piece]:
    """The prompts of a call of n queries; those that are still padding have none."""
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
    """Pieces of a call's queries without its last `tail`, and pieces of those."""
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
    """Whether a piece has keys to choose from, and is no short one (at most `block` queries) behind a cache."""
    behind_cache = piece.offset > 0 and piece.size <= params.block
    return not behind_cache and params.at(piece.size, offset=piece.offset).most_stripes > 0


class HeadGroup(NamedTuple):
    """Heads of a layer that run alike.

    Attributes:
        theta: (H',) float32, nats; +inf for dense heads.
        query: (H',) int64, which query heads, or None for all.
        kv: (Hkv',) int64, the kv heads that they read, or None for all.
    """

    theta: Tensor
    query: Tensor | None
    kv: Tensor | None

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Their share of the tensors."""
        if self.query is None or self.kv is None:
            return q, k, v
        return q.index_select(1, self.query), k.index_select(1, self.kv), v.index_select(1, self.kv)

    def place(self, out: Tensor, result: Tensor) -> None:
        """Write their result (b, n', H', d) into all heads' output (b, n', H, d)."""
        if self.query is None:
            out.copy_(result)
        else:
            out.index_copy_(2, self.query, result)


def split_heads(
    anchors: LayerAnchors, kv_heads: int, device: torch.device
) -> tuple[HeadGroup | None, HeadGroup | None]:
    """Heads for the pipeline and heads for the model's own attention; None where there are none.

    Of a kv head whose query heads are not all dense, every query head goes to the pipeline, dense ones with theta =
    +inf: they keep every key.
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
