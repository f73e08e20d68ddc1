"""Exact per-head quantities of anchor attention in one pass over the scores, in plain torch.

How one group of queries is processed (nothing of size N x N is ever held):

1. Scores over the anchor region give every query's anchor; pooled over blocks they give the margin of each candidate
   column.
2. The candidates are *reordered by the theta that first selects them*. The stripes of all thetas asked for are then
   nested prefixes of one key order, so one pass over contiguous slices yields, for every theta at once, the kept mass
   of each row and its output. The dense result is the last prefix.
3. The same exponentials, divided by the row sums, are summed over the rows: the attention mass of each column. Margins
   and masses are all that the recall-density curve of *every* theta and the stripe oracle need.

Definitions: docs/method.md. Accuracy: scores and sums in float32 from upcast inputs (float64 if asked), totals in
float64, pair counts in int64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anchorscope.analysis.accumulate import Accumulator, HeadShape
from anchorscope.kernels.geometry import Geometry
from anchorscope.kernels.torch_backend import anchor_scores, block_means, capped, margins
from anchorscope.moved import moved
from anchorscope.params import AnchorParams
from anchorscope.profiles import Measured
from anchorscope.ranges import working_dtype
from anchorscope.runs.environment import full_precision
from anchorscope.runs.progress import Cancelled

_CHUNK_ELEMENTS = 1 << 21  # scores held at a time: 8 MiB in float32, which stays in cache
_MAX_ROWS = 256
_GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU launches, not caches, are what chunks must pay for
_GPU_MAX_ROWS = 4096
_OVERHEAD = 10_000_000  # bytes of allocator and library buffers per head at work, as measured
_TINY = 1e-30  # below this share of a row's mass, float32 prefixes of the row are recomputed around their own maximum

__getattr__ = moved(
    __name__, {"HeadResult": "anchorscope.profiles:Measured", "CURVE_THETAS": "anchorscope.analysis.accumulate"}
)


def workspace_bytes(tokens: int, head_dim: int, thetas: int, params: AnchorParams, device: str = "cpu") -> int:
    """Working memory of one head in the torch engine, bytes: inputs and reordered keys and values, scores of a chunk,
    rows and outputs of all thetas.
    """
    limit, elements = (_MAX_ROWS, _CHUNK_ELEMENTS) if device == "cpu" else (_GPU_MAX_ROWS, _GPU_CHUNK_ELEMENTS)
    rows = max(16, min(limit, params.group, elements // tokens))
    tensors = 7 * tokens * head_dim  # q twice, k twice, v, and the reordered keys and values of the last groups
    # Scores of the anchor region and of the candidates; the chunk before is still there while the next is computed.
    chunk = (1.2 + (params.group > rows)) * max(min(elements, min(limit, params.group) * tokens), 16 * tokens)
    outputs = 3 * (thetas + 1) * rows * head_dim
    sums = 5 * thetas * tokens + 40 * tokens
    return int(4 * (tensors + chunk + outputs + sums)) + _OVERHEAD


def profile_head(
    q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape, *, dtype: torch.dtype | None = None
) -> Measured:
    """Measure one query head with plain torch operations, on the device of its tensors.

    Args:
        q: (N, d) queries as attention consumes them (after rotary and norm), any float dtype.
        k: (N, d) keys of the head's kv head.
        v: (N, d) values, or None: output error and closeness are then NaN.
        shape: sizes, parameters and thetas.
        dtype: arithmetic; None means float32, and float64 where scores or values are too large or small for it.

    Returns:
        Exact quantities for every theta asked for, and the curves for all thetas (docs/method.md).

    Raises:
        InputError: NaN or infinity in a tensor, or scores that overflow float32.
    """
    needed = working_dtype(q, k, v, shape.scale, shape.softcap)
    dtype = needed if dtype is None else dtype
    with torch.inference_mode(), full_precision():
        return _profile_head(q.to(dtype), k.to(dtype), None if v is None else v.to(dtype), shape)


class _Head(NamedTuple):
    """One head at work: scaled queries (N, d), keys (d, N) and values (N, d) or None, and where sums are collected."""

    q: Tensor
    keys: Tensor
    values: Tensor | None
    sums: Accumulator

    @property
    def geo(self) -> Geometry:
        return self.sums.shape.geometry


class _Stripes(NamedTuple):
    """Candidates of a group in the order of the level that first selects them: what a level keeps is a prefix.

    Attributes:
        columns: (c,) int64, their positions.
        keys, values: (d, c) and (c, d), in the same order.
        slices: (level, start, stop) of every level that adds columns, ascending; the others repeat the one before.
        prefix: (levels,) int64, how many slices each level keeps.
    """

    columns: Tensor
    keys: Tensor
    values: Tensor | None
    slices: list[tuple[int, int, int]]
    prefix: Tensor

    @classmethod
    def ordered(cls, head: _Head, start: int, level: Tensor) -> _Stripes:
        """The candidates from key `start` on, whose levels (c,) are given."""
        order = level.argsort(stable=True)
        counts = torch.bincount(level, minlength=len(head.sums.levels) + 1).cpu().numpy()
        edges = np.concatenate([[0], counts.cumsum()])
        slices = [(t, int(edges[t]), int(edges[t + 1])) for t in range(len(counts)) if counts[t]]
        columns = order + start
        values = None if head.values is None else head.values.index_select(0, columns)
        prefix = torch.as_tensor((counts[:-1] > 0).cumsum(), device=columns.device)
        return cls(columns, head.keys.index_select(1, columns), values, slices, prefix)

    def scores(self, q: Tensor, at: Tensor, geo: Geometry) -> Tensor:
        """Scores (R, c) of scaled queries (R, d) at positions (R,), -inf where the window hides a candidate."""
        s = capped(q @ self.keys, geo.softcap)
        if geo.window is not None:
            s.masked_fill_(self.columns <= at[:, None] - geo.window, -math.inf)
        return s


def _profile_head(q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape) -> Measured:
    # Products and gathers of keys run faster on the transposed layout.
    head = _Head(q * shape.scale, k.T.contiguous(), v, Accumulator(shape, v is not None, q.device))
    for group in range(shape.geometry.groups):
        if shape.cancelled():
            raise Cancelled
        _profile_group(head, group)
    return head.sums.results()[0]


def _profile_group(head: _Head, group: int) -> None:
    q, keys, geo, device = head.q, head.keys, head.geo, head.q.device
    (first, last), (start, stop) = geo.rows(group), geo.candidates(group)
    chunks = _chunks(geo, group, device)
    # A group of one chunk is scored once; in others the anchors take a pass of their own.
    scored = anchor_scores(q[first:last], keys, geo, group, first) if len(chunks) == 1 else None
    margin = q.new_empty(0)
    if stop > start:
        if scored is not None:
            anchors = scored[0].amax(1)
        else:
            anchors = torch.cat([anchor_scores(q[a:b], keys, geo, group, a)[0].amax(1) for a, b in chunks])
        q_bar, a_bar = block_means(q[first:last], geo.block, -2), block_means(anchors, geo.block, -1)
        margin = margins(q_bar, a_bar, keys, geo, group, (start, stop))
    level = head.sums.level_of(margin)
    stripes = _Stripes.ordered(head, start, level)
    mass = torch.zeros(last, dtype=torch.float64, device=device)
    stripe_mass = torch.zeros(len(stripes.columns), dtype=torch.float64, device=device)
    for a, b in chunks:
        near, at = scored if scored is not None else anchor_scores(q[a:b], keys, geo, group, a)
        near_mass, far_mass = _add_chunk(head, group, stripes, near, at, a)
        mass.index_add_(0, at, near_mass)
        stripe_mass += far_mass
    mass.index_add_(0, stripes.columns, stripe_mass)
    spread = margin.new_full((last,), math.inf)
    spread[start:stop] = margin
    head.sums.add_groups(group, mass[None, None], spread[None, None])


def _chunks(geo: Geometry, group: int, device: torch.device) -> list[tuple[int, int]]:
    """Runs of a group's queries, first and past the last, whose scores are held at a time."""
    (first, last), (start, stop) = geo.rows(group), geo.candidates(group)
    init, local = geo.anchor_keys(group, last)
    width = local.stop - local.start + init.stop - init.start + stop - start
    limit, elements = (_MAX_ROWS, _CHUNK_ELEMENTS) if device.type == "cpu" else (_GPU_MAX_ROWS, _GPU_CHUNK_ELEMENTS)
    rows = max(16, min(limit, elements // width))
    return [(a, min(a + rows, last)) for a in range(first, last, rows)]


def _add_chunk(
    head: _Head, group: int, stripes: _Stripes, near: Tensor, at: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Add the kept mass and the outputs of a run of queries that begins with query `first`.

    Args:
        near: (R, A) scores over the anchor region, changed in place; `at` (A,) the keys' positions.

    Returns:
        The attention mass of the keys of the anchor region (A,) and of the stripes (c,), summed over the queries.
    """
    sums, rows = head.sums, slice(first, first + len(near))
    far = stripes.scores(head.q[rows], torch.arange(rows.start, rows.stop, device=near.device), head.geo)
    row_max = near.amax(1, keepdim=True)  # a query always sees itself: finite
    if far.numel():
        row_max = torch.maximum(row_max, far.amax(1, keepdim=True))
    near.sub_(row_max).exp_()
    far.sub_(row_max).exp_()

    anchor_sum = near.sum(1)
    parts = [far[:, x:y].sum(1) for _, x, y in stripes.slices]
    row_sum = anchor_sum + sum(parts)
    inverse = row_sum.reciprocal()
    kept = anchor_sum.new_empty(len(sums.levels), len(near))
    kept_sum, done = anchor_sum, 0
    for (t, _, _), part in zip(stripes.slices, parts, strict=True):
        kept[done:t] = kept_sum * inverse
        done, kept_sum = t, kept_sum + part
    kept[done:] = kept_sum * inverse
    sums.add_rows(first, kept)
    if head.values is not None:
        outputs = _outputs(near, far, head.values[at], stripes, [anchor_sum, *parts])
        lost = (anchor_sum < _TINY).nonzero().squeeze(1)
        if lost.numel():
            outputs[:, lost] = _lost_outputs(head, group, stripes, rows, lost)
        dense = outputs[-1].clone()
        sums.add_outputs(dense, outputs.sub_(dense), stripes.prefix)
    return (inverse @ near).double(), (inverse @ far).double()


def _outputs(near: Tensor, far: Tensor, near_v: Tensor, stripes: _Stripes, parts: list[Tensor]) -> Tensor:
    """Outputs of a run of queries at every prefix of the stripes, (P, R, d); the last is dense.

    Args:
        near, far: (R, A) and (R, c) exponentials of scores over the anchor region and over the stripes.
        near_v: (A, d) values of the anchor region.
        parts: (R,) row sums of the anchor region and of every slice of the stripes.
    """
    assert stripes.values is not None
    acc, total = near @ near_v, parts[0][:, None]
    accs, totals = [acc], [total]
    for (_, x, y), part in zip(stripes.slices, parts[1:], strict=True):
        acc = torch.addmm(acc, far[:, x:y], stripes.values[x:y])
        total = total + part[:, None]
        accs.append(acc)
        totals.append(total)
    return torch.stack(accs).div_(torch.stack(totals))


def _lost_outputs(head: _Head, group: int, stripes: _Stripes, rows: slice, lost: Tensor) -> Tensor:
    """Outputs of the queries `lost` of a run at every prefix, each around the prefix's own maximum: (P, lost, d).

    Relative to the row's largest score their anchor region underflows; their sparse softmax is well defined all the
    same.
    """
    assert head.values is not None
    assert stripes.values is not None
    near, at = anchor_scores(head.q[rows], head.keys, head.geo, group, rows.start)
    near = near[lost]
    far = stripes.scores(head.q[rows][lost], rows.start + lost, head.geo)
    outputs = []
    for stop in [0] + [y for _, _, y in stripes.slices]:
        weights = torch.softmax(torch.cat([near, far[:, :stop]], 1), 1)
        outputs.append(weights @ torch.cat([head.values[at], stripes.values[:stop]]))
    return torch.stack(outputs)
