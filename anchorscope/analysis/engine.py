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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anchorscope.kernels.geometry import Geometry
from anchorscope.kernels.torch_backend import anchor_scores, block_means, capped, margins
from anchorscope.params import AnchorParams
from anchorscope.ranges import working_dtype
from anchorscope.runs.environment import full_precision
from anchorscope.runs.progress import Cancelled

# Curves are kept at these thetas (nats): every 0.05 where models live, geometric beyond, so that any logit scale fits.
# All have at most two decimals, so that a theta is shown in full and means, typed again, the selection measured.
_FINE = np.arange(-1600, 4800, 5) / 100
_TAIL = np.ceil(np.geomspace(48.0, 2.0**17, 96))
CURVE_THETAS = np.concatenate(
    [[-np.inf], -_TAIL[::-1][:-1], -np.arange(16.25, 48.25, 0.25)[::-1], _FINE, _TAIL, [np.inf]]
)

# Oracle breakpoints are kept at these steps of ln(mass per visible pair): every prefix they cut is an exact oracle
# choice.
ORACLE_STEP = 0.02
ORACLE_BINS = 2048

HEAT_ROWS = 128
HEAT_COLUMNS = 1024
POSITION_BINS = 256
TOP_COLUMNS = 64
CLOSE = (0.01, 0.005)

_CHUNK_ELEMENTS = 1 << 21  # scores held at a time: 8 MiB in float32, which stays in cache
_MAX_ROWS = 256
_GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU launches, not caches, are what chunks must pay for
_GPU_MAX_ROWS = 4096
_OVERHEAD = 10_000_000  # bytes of allocator and library buffers per head at work, as measured
_TINY = 1e-30  # below this share of a row's mass, float32 prefixes of the row are recomputed around their own maximum


@dataclass(frozen=True)
class HeadShape:
    """What the engine must know about a head besides its tensors: sizes, parameters, thetas.

    `thetas` are in nats, in the order asked; they may repeat and may hold +-inf, never NaN. `cancelled` is asked
    before every group; once true, the engine stops by raising `Cancelled`.
    """

    tokens: int
    head_dim: int
    params: AnchorParams
    thetas: tuple[float, ...]
    scale: float
    window: int | None = None
    softcap: float | None = None
    cancelled: Callable[[], bool] = field(default=lambda: False, compare=False)

    @cached_property
    def geometry(self) -> Geometry:
        """Groups, key ranges and pairs, for scaled queries."""
        return self.params.at(self.tokens, self.window, softcap=self.softcap)

    @cached_property
    def sorted_thetas(self) -> np.ndarray:
        """Distinct thetas, ascending, float64."""
        return np.unique(np.asarray(self.thetas, dtype=np.float64))

    @cached_property
    def theta_rank(self) -> np.ndarray:
        """Position of each theta asked for in `sorted_thetas`."""
        return np.searchsorted(self.sorted_thetas, np.asarray(self.thetas, dtype=np.float64))


@dataclass
class HeadResult:
    """Everything measured on one head; numpy, independent of the back end. Shapes as in
    `anchorscope.profiles.HeadProfile`.
    """

    visible_pairs: int
    anchor_pairs: int
    candidate_pairs: int
    recall: np.ndarray
    recall_p05: np.ndarray
    recall_min: np.ndarray
    recall_last: np.ndarray
    kept_pairs: np.ndarray
    stripe_pairs: np.ndarray
    output_error: np.ndarray
    output_close_01: np.ndarray
    output_close_005: np.ndarray
    curve_theta: np.ndarray
    curve_recall: np.ndarray
    curve_pairs: np.ndarray
    oracle_pairs: np.ndarray
    oracle_recall: np.ndarray
    heat_rows: np.ndarray
    heat_columns: np.ndarray
    heat_mass: np.ndarray
    heat_kept: np.ndarray
    heat_margin: np.ndarray
    heat_stripes: np.ndarray
    position_edges: np.ndarray
    position_recall: np.ndarray
    top_columns: np.ndarray
    top_mass: np.ndarray


@dataclass
class HeadAccumulator:
    """Collects groups of one head from any back end and turns them into a `HeadResult`.

    A back end calls `add_group` once per group (column margins and masses) and `add_rows` for every run of queries.
    """

    shape: HeadShape
    has_values: bool
    device: torch.device
    kept_rows: Tensor = field(init=False)
    curve_mass: Tensor = field(init=False)
    curve_pairs: Tensor = field(init=False)
    error_sq: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s, dev = self.shape, self.device
        n, levels = s.tokens, len(s.sorted_thetas)

        def f64(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=dev)

        def i64(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=dev)

        self.levels = torch.as_tensor(s.sorted_thetas, dtype=torch.float64, device=dev)
        self.grid = torch.as_tensor(CURVE_THETAS, dtype=torch.float64, device=dev)
        self.kept_rows = torch.zeros(levels, n, dtype=torch.float32, device=dev)
        self.level_pairs = i64(levels + 1)
        self.level_mass = f64(levels)
        self.curve_mass = f64(len(CURVE_THETAS) + 1)
        self.curve_pairs = i64(len(CURVE_THETAS) + 1)
        self.oracle_mass = f64(ORACLE_BINS)
        self.oracle_pairs = i64(ORACLE_BINS)
        self.anchor_mass = f64()
        self.column_mass = f64(n)
        self.error_sq = f64(levels)
        self.norm_sq = f64()
        self.close = i64(len(CLOSE), levels)

        groups = s.params.groups(n)
        self.groups_per_row = math.ceil(groups / HEAT_ROWS)
        self.width = math.ceil(n / HEAT_COLUMNS)
        cells = math.ceil(groups / self.groups_per_row), math.ceil(n / self.width)
        self.heat_mass = f64(*cells)
        self.heat_kept = f64(*cells)
        self.heat_margin = torch.full(cells, math.inf, dtype=torch.float32, device=dev)
        self.heat_stripes = f64(*cells)
        self.heat_candidates = f64(*cells)

    def level_of(self, margin: Tensor) -> Tensor:
        """Index of the smallest asked theta that selects each column; `len(sorted_thetas)` where none does."""
        return torch.searchsorted(self.levels, margin.double())

    def add_group(self, group: int, mass: Tensor, start: int, margin: Tensor, level: Tensor) -> None:
        """Add the columns of one group.

        Args:
            group: index of the group.
            mass: (E,) attention mass of keys 0..E-1 summed over the group's queries; E is the group's last query + 1.
            start: first candidate column that is listed (columns hidden by the window may be left out).
            margin: (c,) float32 margins of the candidates start..start+c-1.
            level: (c,) their `level_of`.
        """
        s, c = self.shape, margin.numel()
        mass = mass.double()
        self.column_mass[: mass.numel()] += mass
        stripes = mass[start : start + c]
        kept = mass.clone()
        if c:
            columns = torch.arange(start, start + c, device=self.device)
            pairs = s.geometry.column_pairs(columns, *s.geometry.rows(group))
            self.level_pairs.scatter_add_(0, level, pairs)
            # As a product, whose order of summation is fixed; it is the curve's own sum, cut at the thetas asked for.
            ranks = torch.arange(len(self.level_mass), device=self.device)[:, None]
            self.level_mass += (level == ranks).double() @ stripes
            at = torch.searchsorted(self.grid, margin.double())
            self.curve_pairs.scatter_add_(0, at, pairs)
            self.curve_mass.scatter_add_(0, at, stripes)
            # A column no query sees has neither mass nor pairs; clamping keeps its bin harmless.
            per_pair = (stripes / pairs.clamp(min=1)).clamp(1e-300, 1.0)
            at = (-per_pair.log() / ORACLE_STEP).long().clamp_(max=ORACLE_BINS - 1)
            self.oracle_mass.scatter_add_(0, at, stripes)
            self.oracle_pairs.scatter_add_(0, at, pairs)
            first = int(s.theta_rank[0])
            kept[start : start + c] *= level <= first
        self.anchor_mass += mass.sum() - stripes.sum()
        row = group // self.groups_per_row
        self.heat_mass[row] += self._bin(mass)
        self.heat_kept[row] += self._bin(kept)
        if c:
            spread = torch.full((mass.numel(),), math.inf, dtype=torch.float32, device=self.device)
            spread[start : start + c] = margin
            cells = self._pad(spread, math.inf).amin(1)
            self.heat_margin[row] = torch.minimum(self.heat_margin[row], cells)
            self.heat_candidates[row] += self._bin(torch.isfinite(spread).double())
            self.heat_stripes[row] += self._bin(
                (spread.double() <= s.thetas[0]).logical_and_(spread < math.inf).double()
            )

    def _pad(self, x: Tensor, value: float) -> Tensor:
        """Columns in cells: (E,) -> (C, width), padded with `value`."""
        cells = self.heat_mass.shape[1]
        return torch.nn.functional.pad(x, (0, cells * self.width - x.numel()), value=value).view(cells, self.width)

    def _bin(self, x: Tensor) -> Tensor:
        return self._pad(x, 0.0).sum(1)

    def add_rows(self, first: int, kept: Tensor) -> None:
        """Kept share of the mass of queries first..first+R-1 at every sorted theta, (levels, R)."""
        self.kept_rows[:, first : first + kept.shape[1]] = kept

    def add_outputs(self, dense: Tensor, difference: Tensor, prefix: Tensor) -> None:
        """Add outputs of R queries: dense (R, d), differences O_sparse - O_dense (P, R, d) of P distinct selections,
        and which of them is in force at each sorted theta (levels,).
        """
        self.norm_sq += dense.square().sum(dtype=torch.float64)
        difference = difference.abs_()
        for t, tol in enumerate(CLOSE):
            # Counting through floats is several times faster than summing booleans; R * d stays below 2**24.
            near = torch.lt(difference, tol, out=torch.empty_like(difference)).sum((1, 2))
            self.close[t] += near.long()[prefix]
        self.error_sq += difference.square_().sum((1, 2), dtype=torch.float64)[prefix]

    def result(self) -> HeadResult:
        """Close the books."""
        s = self.shape
        n, rank = s.tokens, s.theta_rank
        total, anchors = s.geometry.visible_pairs, s.geometry.anchor_pairs

        def host(x: Tensor) -> np.ndarray:
            return x.cpu().numpy()

        rows = host(self.kept_rows).astype(np.float64).clip(0.0, 1.0)
        elements = n * s.head_dim
        if self.has_values:
            norm = max(float(self.norm_sq), 1e-300)
            error = np.sqrt(host(self.error_sq) / norm)[rank]
            close = (host(self.close) / elements)[:, rank]
        else:
            error = np.full(len(rank), np.nan)
            close = np.full((len(CLOSE), len(rank)), np.nan)

        anchor_mass = float(self.anchor_mass)
        curve_mass = host(self.curve_mass)[:-1].cumsum() + anchor_mass
        curve_pairs = host(self.curve_pairs)[:-1].cumsum() + anchors
        kept_pairs = host(self.level_pairs)[:-1].cumsum() + anchors
        recall = _shares(host(self.level_mass).cumsum() + anchor_mass, n, kept_pairs == total)
        rows[kept_pairs == total] = 1.0
        used = host(self.oracle_pairs) > 0
        oracle_mass = np.concatenate([[0.0], host(self.oracle_mass)[used].cumsum()]) + anchor_mass
        oracle_pairs = np.concatenate([[0], host(self.oracle_pairs)[used].cumsum()]) + anchors

        groups, span = s.params.groups(n), s.params.group * self.groups_per_row
        heat_rows = np.minimum(np.arange(math.ceil(groups / self.groups_per_row) + 1) * span, n)
        queries = np.diff(heat_rows)[:, None]
        heat_columns = np.minimum(np.arange(self.heat_mass.shape[1] + 1) * self.width, n)
        candidates = host(self.heat_candidates)
        size = math.ceil(n / POSITION_BINS)
        edges = np.minimum(np.arange(math.ceil(n / size) + 1) * size, n)
        position = np.add.reduceat(rows, edges[:-1], axis=1) / np.diff(edges)
        column_mass = host(self.column_mass)
        top = np.argsort(-column_mass, kind="stable")[: min(TOP_COLUMNS, n)]
        return HeadResult(
            visible_pairs=total,
            anchor_pairs=anchors,
            candidate_pairs=total - anchors,
            recall=recall[rank],
            recall_p05=np.percentile(rows, 5, axis=1)[rank],
            recall_min=rows.min(1)[rank],
            recall_last=rows[:, -min(s.params.block, n) :].mean(1)[rank],
            kept_pairs=kept_pairs[rank],
            stripe_pairs=kept_pairs[rank] - anchors,
            output_error=error,
            output_close_01=close[0],
            output_close_005=close[1],
            curve_theta=CURVE_THETAS.copy(),
            curve_recall=_shares(curve_mass, n, curve_pairs == total),
            curve_pairs=curve_pairs,
            oracle_pairs=oracle_pairs,
            oracle_recall=_shares(oracle_mass, n, oracle_pairs == total),
            heat_rows=heat_rows,
            heat_columns=heat_columns,
            heat_mass=host(self.heat_mass) / queries,
            heat_kept=host(self.heat_kept) / queries,
            heat_margin=host(self.heat_margin),
            heat_stripes=host(self.heat_stripes) / np.maximum(candidates, 1),
            position_edges=edges,
            position_recall=position[rank].astype(np.float32),
            top_columns=top.astype(np.int64),
            top_mass=(column_mass[top] / n).astype(np.float32),
        )


def _shares(mass: np.ndarray, n: int, dense: np.ndarray) -> np.ndarray:
    """Mean recall over n queries from summed attention mass; 1 where every pair is kept, whatever sums were rounded."""
    return np.where(dense, 1.0, (mass / n).clip(0.0, 1.0))


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
    books = 5 * thetas * tokens + 40 * tokens
    return int(4 * (tensors + chunk + outputs + books)) + _OVERHEAD


class Group:
    """Index arithmetic of one group: its queries and the visible parts of its three key ranges."""

    def __init__(self, index: int, shape: HeadShape) -> None:
        geo = shape.geometry
        self.index = index
        self.first, self.last = geo.rows(index)
        self.start, self.stop = geo.candidates(index)
        low, local = max(self.first - geo.reach + 1, 0), geo.local_start(index)
        self.init_start, self.init_stop = low, max(min(geo.init, local), low)
        self.local_start = max(local, low)


def profile_head(
    q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape, *, dtype: torch.dtype | None = None
) -> HeadResult:
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


def _profile_head(q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape) -> HeadResult:
    q = q * shape.scale
    kt = k.T.contiguous()  # (d, N): products and gathers of keys run faster on this layout
    books = HeadAccumulator(shape, v is not None, q.device)
    for index in range(shape.params.groups(shape.tokens)):
        if shape.cancelled():
            raise Cancelled
        _profile_group(q, kt, v, shape, Group(index, shape), books)
    return books.result()


def _profile_group(q: Tensor, kt: Tensor, v: Tensor | None, shape: HeadShape, g: Group, books: HeadAccumulator) -> None:
    dev, window, geo = q.device, shape.window, shape.geometry
    width = g.last - g.local_start + g.init_stop - g.init_start + g.stop - g.start
    limit, elements = (_MAX_ROWS, _CHUNK_ELEMENTS) if dev.type == "cpu" else (_GPU_MAX_ROWS, _GPU_CHUNK_ELEMENTS)
    rows = max(16, min(limit, elements // width))
    chunks = [(a, min(a + rows, g.last)) for a in range(g.first, g.last, rows)]
    candidates = torch.arange(g.start, g.stop, device=dev)
    single = len(chunks) == 1
    scored = anchor_scores(q[g.first : g.last], kt, geo, g.index, g.first) if single else None

    if g.stop > g.start:
        if scored is not None:
            anchors = scored[0].amax(1)
        else:
            anchors = torch.cat([anchor_scores(q[a:b], kt, geo, g.index, a)[0].amax(1) for a, b in chunks])
        q_bar, a_bar = block_means(q[g.first : g.last], geo.block, -2), block_means(anchors, geo.block, -1)
        margin = margins(q_bar, a_bar, kt, geo, g.index, (g.start, g.stop))
    else:
        margin = q.new_empty(0)
    level = books.level_of(margin)
    order = level.argsort(stable=True)
    counts = torch.bincount(level, minlength=len(shape.sorted_thetas) + 1).cpu().numpy()
    edges = np.concatenate([[0], counts.cumsum()])
    # Empty slices cost nothing: a theta that adds no column repeats the one before it.
    slices = [(t, int(edges[t]), int(edges[t + 1])) for t in range(len(counts)) if counts[t]]
    columns = candidates[order]
    keys = kt.index_select(1, columns)
    values = None if v is None else v.index_select(0, columns)

    mass = torch.zeros(g.last, dtype=torch.float64, device=dev)
    stripe_mass = torch.zeros(len(columns), dtype=torch.float64, device=dev)
    for a, b in chunks:
        near, at = scored if scored is not None else anchor_scores(q[a:b], kt, geo, g.index, a)
        far = capped(q[a:b] @ keys, shape.softcap)
        if window is not None:
            i = torch.arange(a, b, device=dev)[:, None]
            far.masked_fill_(columns <= i - window, -math.inf)
        top = near.amax(1, keepdim=True)  # a query always sees itself: finite
        if far.numel():
            top = torch.maximum(top, far.amax(1, keepdim=True))
        near.sub_(top).exp_()
        far.sub_(top).exp_()

        anchor_sum = near.sum(1)
        sums = [far[:, x:y].sum(1) for _, x, y in slices]
        total = anchor_sum + sum(sums)
        inverse = total.reciprocal()
        mass.index_add_(0, at, (inverse @ near).double())
        stripe_mass += (inverse @ far).double()

        kept = anchor_sum.new_empty(len(shape.sorted_thetas), b - a)
        running, done = anchor_sum, 0
        for (t, _, _), part in zip(slices, sums, strict=True):
            kept[done:t] = running * inverse
            done, running = t, running + part
        kept[done:] = running * inverse
        books.add_rows(a, kept)
        if v is not None and values is not None:
            lost = (anchor_sum < _TINY).nonzero().squeeze(1)
            exact = (
                _far_outputs(q, kt, v, values, keys, columns, shape, g, (a, b), lost, slices) if lost.numel() else None
            )
            _outputs(near, far, v[at], values, anchor_sum, sums, slices, books, lost, exact)

    mass.index_add_(0, columns, stripe_mass)
    books.add_group(g.index, mass, g.start, margin.float(), level)


def _far_outputs(
    q: Tensor,
    kt: Tensor,
    v: Tensor,
    values: Tensor,
    keys: Tensor,
    columns: Tensor,
    shape: HeadShape,
    g: Group,
    chunk: tuple[int, int],
    lost: Tensor,
    slices: list[tuple[int, int, int]],
) -> list[Tensor]:
    """Outputs of the queries `lost` at every prefix, each around the prefix's own maximum.

    Relative to the row's largest score their anchor region underflows; their sparse softmax is well defined all the
    same.
    """
    near, at = anchor_scores(q[chunk[0] : chunk[1]], kt, shape.geometry, g.index, chunk[0])
    near = near[lost]
    far = capped(q[chunk[0] : chunk[1]][lost] @ keys, shape.softcap)
    if shape.window is not None:
        far.masked_fill_(columns <= (chunk[0] + lost)[:, None] - shape.window, -math.inf)
    outputs = []
    for stop in [0] + [y for _, _, y in slices]:
        weights = torch.softmax(torch.cat([near, far[:, :stop]], 1), 1)
        outputs.append(weights @ torch.cat([v[at], values[:stop]]))
    return outputs


def _outputs(
    near: Tensor,
    far: Tensor,
    near_v: Tensor,
    far_v: Tensor,
    anchor_sum: Tensor,
    sums: list[Tensor],
    slices: list[tuple[int, int, int]],
    books: HeadAccumulator,
    lost: Tensor,
    exact: list[Tensor] | None,
) -> None:
    """Outputs of a chunk of queries at every theta, compared with the dense output (the last prefix)."""
    acc = near @ near_v
    den = anchor_sum[:, None]
    starts, accs, dens = [0], [acc], [den]
    for (t, x, y), part in zip(slices, sums, strict=True):
        acc = torch.addmm(acc, far[:, x:y], far_v[x:y])
        den = den + part[:, None]
        starts.append(t)
        accs.append(acc)
        dens.append(den)
    dense = acc / den
    outputs = torch.stack(accs).div_(torch.stack(dens))
    if exact is not None:
        outputs[:, lost] = torch.stack(exact)
        dense = outputs[-1].clone()
    # The prefix in force at a level is the last one that starts at or below it.
    prefix = np.searchsorted(starts, np.arange(books.error_sq.numel()), side="right") - 1
    books.add_outputs(dense, outputs.sub_(dense), torch.as_tensor(prefix, device=dense.device))
