"""The one engine that scores every selection: recall, exact density, output error, identification cost.

The attention weights of a run of queries are computed once for all selections and thrown away. Where a run of queries
keeps the same keys, only those keys are touched, so the cost of a selection falls with its density; where every query
keeps its own, a mask of that run is used. Every selection is intersected with what the query sees, and a union counts
each pair once.

Accuracy: scores and weights in float32 (float64 if the head is), totals in float64, pair counts in int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anchorscope.methods.head import Chunk, Head
from anchorscope.methods.registry import Contender
from anchorscope.methods.selection import Selection
from anchorscope.params import AnchorParams
from anchorscope.ranges import unit_scaled
from anchorscope.runs.environment import full_precision
from anchorscope.runs.progress import Cancelled

LAST_ROWS = AnchorParams().block  # `recall_last` averages over the last block, of the default size for all methods
BATCH_BYTES = 1 << 28  # selections held at a time; beyond it, a head's scores are computed once more
_TINY = 1e-30  # kept shares of a row below this are renormalized around their own maximum


@dataclass(frozen=True)
class Score:
    """One selection of one head, scored.

    Attributes:
        recall: attention mass kept, mean over queries.
        recall_p05: its 5th percentile over queries, by linear interpolation.
        recall_last: its mean over the last `LAST_ROWS` queries.
        pairs: kept (query, key) pairs.
        density: pairs / visible causal pairs.
        output_error: ||O_sparse - O_dense||_F / ||O_dense||_F; NaN without values. Queries that keep nothing output
            zero.
        identify_cost: arithmetic spent beyond the sparse attention itself, as a share of dense attention's 4 * d FLOPs
            per visible pair: density + identify_cost is the share of dense arithmetic.
    """

    recall: float
    recall_p05: float
    recall_last: float
    pairs: int
    density: float
    output_error: float
    identify_cost: float


def score(
    head: Head,
    v: Tensor | None,
    selections: Sequence[Selection],
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Score]:
    """Score selections of one head.

    Args:
        head: queries and keys.
        v: (N, d_v) values of its kv head, or None.
        selections: what each setting of each method keeps.
        cancelled: asked before every run of queries.

    Returns:
        One score per selection, in their order.

    Raises:
        Cancelled: `cancelled` returned true.
    """
    with torch.inference_mode(), full_precision():
        books = _Books(head, v, selections)
        for chunk in head.chunks():
            if cancelled():
                raise Cancelled
            books.add(chunk)
        return books.result()


class _Run(NamedTuple):
    """What a selection kept in one run of queries: keys, sums (R, d_v + 1) and visible pairs."""

    keep: Tensor
    total: Tensor
    pairs: Tensor


class _Books:
    """Running totals of all selections."""

    def __init__(self, head: Head, v: Tensor | None, selections: Sequence[Selection]) -> None:
        self.head, self.selections = head, selections
        self.values = None if v is None else unit_scaled(v).to(head.q.dtype)
        ones = head.k.new_ones(head.n, 1)
        # One product gives the output and, in the last column, the mass kept.
        self.extended = ones if self.values is None else torch.cat([self.values, ones], 1)
        self.edges = [s.edges(head.n) if _gathers(head.device) else None for s in selections]
        dev, count = head.device, len(selections)
        self.rows = torch.zeros(count, head.n, dtype=head.q.dtype, device=dev)
        self.pairs = torch.zeros(count, dtype=torch.int64, device=dev)
        self.error = torch.zeros(count, dtype=torch.float64, device=dev)
        self.norm = torch.zeros((), dtype=torch.float64, device=dev)

    def add(self, chunk: Chunk) -> None:
        weights = torch.softmax(chunk.scores, 1)
        dense = weights @ self.extended[chunk.low : chunk.last]
        self.norm += dense[:, :-1].double().square().sum()
        before: dict[tuple[int, int], _Run] = {}
        for index, (selection, edges) in enumerate(zip(self.selections, self.edges, strict=True)):
            if edges is None:
                self._add_mask(index, selection, chunk, weights, dense)
                continue
            inside = edges[(edges > chunk.first) & (edges < chunk.last)].tolist()
            for first, last in zip([chunk.first, *inside], [*inside, chunk.last], strict=True):
                self._add_run(index, selection, chunk, weights, dense, (first, last), before)

    def _add_run(
        self,
        index: int,
        selection: Selection,
        chunk: Chunk,
        weights: Tensor,
        dense: Tensor,
        span: tuple[int, int],
        before: dict[tuple[int, int], _Run],
    ) -> None:
        """Queries of `span`, which keep the same keys.

        Sums over kept keys add up, and sweeps mostly grow. So where the selection before kept a part of these keys,
        only the others are added to its sums.
        """
        first, last = span
        rows = slice(first - chunk.first, last - chunk.first)
        width = last - chunk.low  # later keys are hidden from all of them
        keep = selection.columns(first, chunk.low, last)
        base = before.get(span)
        new = keep if base is None else keep & ~base.keep
        if base is not None and bool((base.keep & ~keep).any()):
            base, new = None, keep
        keys = new.nonzero().squeeze(1)
        pairs = self._pairs(keys + chunk.low, first, last)
        whole = bool(keep.all())
        if whole:  # exactly: sums of parts would be rounded otherwise
            total = dense[rows]
        elif 2 * len(keys) < width:
            total = weights[rows, :width].index_select(1, keys) @ self.extended[keys + chunk.low]
        else:
            # Most keys are new: zeroing the others is faster than gathering.
            total = (weights[rows, :width] * new) @ self.extended[chunk.low : last]
        if base is not None:
            total, pairs = total if whole else total + base.total, pairs + base.pairs
        before[span] = _Run(keep, total, pairs)
        self.pairs[index] += pairs
        self.rows[index, first:last] = total[:, -1] / dense[rows, -1]
        if self.values is None:
            return

        double = None
        if selection.twice is not None:
            double = selection.twice.columns(first, chunk.low, last)
            total = total + (weights[rows, :width] * double) @ self.extended[chunk.low : last]
        out = total[:, :-1] / total[:, -1:]
        lost = (total[:, -1] < _TINY).nonzero().squeeze(1)
        if lost.numel():
            scores = chunk.scores[rows, :width][lost].masked_fill(~keep, -math.inf)
            if double is not None:
                scores = scores + math.log(2) * double
            out[lost] = _renormalized(scores, self.extended[chunk.low : last, :-1])
        self.error[index] += (out - dense[rows, :-1]).double().square().sum()

    def _add_mask(self, index: int, selection: Selection, chunk: Chunk, weights: Tensor, dense: Tensor) -> None:
        """All queries of the chunk, each with its own keys."""
        first, last, low = chunk.first, chunk.last, chunk.low
        keep = selection.mask(first, last, low, last, weights) & (chunk.scores > -math.inf)
        pairs = torch.count_nonzero(keep)
        self.pairs[index] += pairs
        everything = self._pairs(torch.arange(low, last, device=keep.device), first, last)
        if selection.twice is None and pairs == everything:
            self.rows[index, first:last] = 1.0
            return
        kept = weights.masked_fill(~keep, 0.0)
        total = kept @ self.extended[low:last]
        self.rows[index, first:last] = total[:, -1] / dense[:, -1]
        if self.values is None:
            return
        double = None
        if selection.twice is not None:
            double = Selection((selection.twice,)).mask(first, last, low, last, weights)
            total = total + (kept * double) @ self.extended[low:last]
        out = total[:, :-1] / total[:, -1:]
        lost = (total[:, -1] < _TINY).nonzero().squeeze(1)
        if lost.numel():
            scores = chunk.scores[lost].masked_fill(~keep[lost], -math.inf)
            if double is not None:
                scores = scores + math.log(2) * double[lost]
            out[lost] = _renormalized(scores, self.extended[low:last, :-1])
        self.error[index] += (out - dense[:, :-1]).double().square().sum()

    def _pairs(self, keys: Tensor, first: int, last: int) -> Tensor:
        """Visible pairs of queries first..last-1 with the keys given: queries that see each key, summed."""
        end = last if self.head.window is None else (keys + self.head.window).clamp_max(last)
        return (end - keys.clamp_min(first)).clamp_min(0).sum()

    def result(self) -> list[Score]:
        head = self.head
        rows = self.rows.double().clamp(0.0, 1.0).cpu().numpy()
        if not len(rows):
            return []
        pairs = self.pairs.cpu().tolist()
        if self.values is None:
            error = np.full(len(rows), np.nan)
        else:
            error = (self.error / self.norm.clamp_min(1e-300)).sqrt().cpu().numpy()
        p05 = np.percentile(rows, 5, axis=1)
        return [
            Score(
                recall=float(rows[i].mean()),
                recall_p05=float(p05[i]),
                recall_last=float(rows[i, -LAST_ROWS:].mean()),
                pairs=pairs[i],
                density=pairs[i] / head.pairs,
                output_error=float(error[i]),
                # A dot product is half of a pair's 4 * d FLOPs.
                identify_cost=float(selection.identify) / (2 * head.pairs),
            )
            for i, selection in enumerate(self.selections)
        ]


def _gathers(device: torch.device) -> bool:
    """Whether to touch kept keys only. A GPU multiplies a whole masked run faster than it launches many small ones."""
    return device.type == "cpu"


def _renormalized(scores: Tensor, values: Tensor) -> Tensor:
    """Outputs of queries whose kept share underflows: softmax around their own maximum; zero where nothing is kept."""
    return torch.softmax(scores, 1).nan_to_num(0.0) @ values


__all__ = ["LAST_ROWS", "Score", "score"]


def score_lineup(
    head: Head,
    v: Tensor | None,
    lineup: Sequence[Contender],
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[tuple[Contender, float, Score]]:
    """Score every setting of every contender on one head.

    Args:
        head: queries and keys.
        v: (N, d_v) values of its kv head, or None.
        lineup: methods and the values of their swept parameters.
        cancelled: asked often; once true, work stops.

    Returns:
        (contender, value, score), in the order of the line-up and its sweeps.

    Raises:
        Cancelled: `cancelled` returned true.
    """
    results: list[tuple[Contender, float, Score]] = []
    waiting: list[tuple[Contender, float, Selection]] = []

    def flush() -> None:
        scores = score(head, v, [x for *_, x in waiting], cancelled=cancelled)
        results.extend((c, value, s) for (c, value, _), s in zip(waiting, scores, strict=True))
        waiting.clear()

    with torch.inference_mode(), full_precision():
        for contender in lineup:
            for value in contender.sweep:
                if cancelled():
                    raise Cancelled
                waiting.append((contender, value, contender.method.at(value).select(head)))
                if sum(x.nbytes for *_, x in waiting) > BATCH_BYTES:
                    flush()
        flush()
    return results
