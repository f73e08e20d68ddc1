"""What both engines add up over the groups of some heads, and what follows from the sums.

The thetas asked for are sorted and distinct here (*levels*). A column belongs to the first theta that selects it, so
what a theta keeps is a running sum over bins between thetas: those asked for and a fine grid together. The oracle
of stripes is a running sum over bins of mass per pair. Definitions: docs/method.md.

Shares of attention mass are added up as whole numbers of 2**-40: a sum of integers does not depend on its order, so the
same head has the same bytes whatever it is measured together with, on one GPU or several, in whatever threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchorscope.analysis.steps import HeatSteps
from anchorscope.kernels.geometry import Geometry
from anchorscope.params import AnchorParams
from anchorscope.profiles import MAX_COLUMNS, MAX_ROWS, MAX_TOP, Measured, bin_edges

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

POSITION_BINS = 256
CLOSE = (0.01, 0.005)
PERCENT = 5  # of the queries, in recall_p05

_SLICE = 1 << 23  # (head, group, key) triples that are looked at together: about 80 bytes each


@dataclass(frozen=True)
class HeadShape:
    """What the engine must know about a head besides its tensors: sizes, parameters, thetas.

    `thetas` are in nats, in the order asked; they may repeat and may hold +-inf, never NaN. `steps` is whether the heat
    map is wanted at each of them, or at the first alone. `cancelled` is asked before every group; once true, the engine
    stops by raising `Cancelled`.
    """

    tokens: int
    head_dim: int
    params: AnchorParams
    thetas: tuple[float, ...]
    scale: float
    window: int | None = None
    softcap: float | None = None
    steps: bool = True
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


class Accumulator:
    """Adds up the groups of some heads of one shape, from any back end, and turns the sums into what was measured.

    A back end calls `add_groups` until all groups are in (column margins and masses) and `add_rows` for every run of
    queries; `add_outputs`, or the sums `norm_sq`, `error_sq` and `close` themselves, where there are values.

    Attributes:
        norm_sq: (H,) float64, sum of the squares of the dense outputs.
        error_sq: (H, levels) float64, of the differences from it at each sorted theta.
        close: (H, 2, levels) int64, output elements closer than each of `CLOSE`.
    """

    def __init__(self, shape: HeadShape, has_values: bool, device: torch.device, heads: int = 1) -> None:
        self.shape, self.has_values, self.device, self.heads = shape, has_values, device, heads
        n, levels, geo = shape.tokens, len(shape.sorted_thetas), shape.geometry

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(heads, *size, dtype=dtype, device=device)

        self._unit = 2.0 ** min(40, 62 - n.bit_length())
        self._edges = np.union1d(shape.sorted_thetas, CURVE_THETAS)
        own = {torch.float32: float32_floor(self._edges), torch.float64: torch.from_numpy(self._edges)}
        first = int(np.searchsorted(self._edges, shape.thetas[0]))
        self._threshold = {dtype: float(edges[first]) for dtype, edges in own.items()}
        self._edges_of = {dtype: edges.to(device) for dtype, edges in own.items()}
        self.levels = torch.as_tensor(shape.sorted_thetas, dtype=torch.float64, device=device)
        self._bin_mass, self._bin_pairs = zeros(len(self._edges) + 1), zeros(len(self._edges) + 1)
        self._oracle_mass, self._oracle_pairs = zeros(ORACLE_BINS), zeros(ORACLE_BINS)
        self._anchor_mass, self._column_mass = zeros(), zeros(n)
        self._kept_rows = zeros(levels, n, dtype=torch.float32)
        self.norm_sq, self.error_sq = zeros(dtype=torch.float64), zeros(levels, dtype=torch.float64)
        self.close = zeros(len(CLOSE), levels)

        self._rows = [geo.rows(g) for g in range(geo.groups)]
        self._candidates = [geo.candidates(g) for g in range(geo.groups)]
        # On the device once: a GPU would be waited for at every small transfer.
        self._limits = torch.tensor([*zip(self._rows, self._candidates, strict=True)], device=device)  # (groups, 2, 2)
        self._groups_per_row = math.ceil(geo.groups / MAX_ROWS)
        self._width = math.ceil(n / MAX_COLUMNS)
        cells = math.ceil(geo.groups / self._groups_per_row), math.ceil(n / self._width)
        self._heat_mass, self._heat_kept = zeros(*cells), zeros(*cells)
        self._heat_stripes, self._heat_candidates = zeros(*cells), zeros(*cells)
        # One theta needs no more than its heat map.
        several = shape.steps and levels > 1
        self._steps = HeatSteps(levels, cells, self._groups_per_row, self._width, device, heads) if several else None
        above = np.searchsorted(shape.sorted_thetas, np.append(self._edges, np.inf))
        above[-1] = levels
        self._level_of_bin = torch.from_numpy(above).to(device)
        self._heat_margin = torch.full((heads, *cells), math.inf, dtype=torch.float32, device=device)

    def level_of(self, margin: Tensor) -> Tensor:
        """Index of the smallest asked theta that selects each column; `len(sorted_thetas)` where none does."""
        return torch.searchsorted(self.levels, margin.double())

    def add_groups(self, first: int, mass: Tensor, margin: Tensor) -> None:
        """Add the columns of a run of groups.

        Args:
            first: index of the first of G groups.
            mass: (H, G, E) attention mass of keys 0..E-1 summed over each group's queries, zero where they see none;
                E is at least the last group's last query + 1.
            margin: (H, G, E) float32 or float64 margins, +inf where a column is no candidate.
        """
        groups = mass.shape[1]
        at = 0
        while at < groups:
            # Of a run of groups only the keys up to its last query are looked at.
            most = max(1, _SLICE // (self.heads * self._rows[min(first + groups, len(self._rows)) - 1][1]))
            stop = min(at + most, groups)
            keys = slice(0, self._rows[first + stop - 1][1])
            self._add(first + at, mass[:, at:stop, keys], margin[:, at:stop, keys])
            at = stop

    def _add(self, first: int, mass: Tensor, margin: Tensor) -> None:
        """`add_groups` of so few that numbers for each (head, group, key) fit into memory."""
        groups, keys = mass.shape[1:]
        rows, (low, high) = (
            x.T[..., None] for x in (self._limits[first : first + groups, 0], self._limits[first : first + groups, 1])
        )
        start = min(a for a, _ in self._candidates[first : first + groups])
        stop = min(max(b for _, b in self._candidates[first : first + groups]), keys)
        columns = torch.arange(keys, device=self.device)
        candidate = (columns >= low) & (columns < high)  # (G, E)
        # A theta selects a float32 margin exactly where the largest float32 below the theta does.
        chosen = margin <= self._threshold[margin.dtype]
        units = (mass.double() * self._unit).round_().long()
        self._column_mass[:, :keys] += units.sum(1)
        self._add_cells(first, units, margin, chosen, chosen.logical_or(~candidate))
        self._anchor_mass += (units * ~candidate).sum((1, 2))
        if stop > start:
            inside = slice(start, stop)
            pairs = self.shape.geometry.column_pairs(columns[inside], *rows)
            pairs = pairs * candidate[:, inside]
            units = units[..., inside] * candidate[:, inside]
            bins = self._add_bins(units, mass[..., inside], margin[..., inside], pairs)
            if self._steps is not None:
                seen = torch.isfinite(margin[..., inside]).logical_and_(candidate[:, inside])
                self._steps.add(first, start, self._level_of_bin[bins], units, seen)

    def _add_bins(self, units: Tensor, mass: Tensor, margin: Tensor, pairs: Tensor) -> Tensor:
        """Add candidate columns to the bins between thetas and to those of the oracle; returns the former (H, G, c).

        Args:
            units, mass: (H, G, c) their masses, in whole units and as measured; `margin` alike.
            pairs: (G, c) how many queries see them; zero where a column is no candidate, and units then are zero too.
        """
        mine = torch.arange(self.heads, device=self.device)[:, None, None]
        every = pairs.expand(units.shape).reshape(-1)
        units = units.reshape(-1)

        def add(at: Tensor, to_mass: Tensor, to_pairs: Tensor) -> None:
            at = (at + mine * to_mass.shape[1]).reshape(-1)
            to_mass.view(-1).scatter_add_(0, at, units)
            to_pairs.view(-1).scatter_add_(0, at, every)

        bins = torch.searchsorted(self._edges_of[margin.dtype], margin.contiguous())
        add(bins, self._bin_mass, self._bin_pairs)
        # A column no query sees has neither mass nor pairs; clamping keeps its bin harmless.
        per_pair = (mass.double() / pairs.clamp(min=1)).clamp_(1e-300, 1.0)
        at = per_pair.log_().div_(-ORACLE_STEP).long().clamp_(max=ORACLE_BINS - 1)
        add(at, self._oracle_mass, self._oracle_pairs)
        return bins

    def _add_cells(self, first: int, units: Tensor, margin: Tensor, chosen: Tensor, kept: Tensor) -> None:
        """Add a run of groups to the heat map; `chosen` and `kept` (H, G, E): whether the first theta does."""
        groups = units.shape[1]
        row = (torch.arange(first, first + groups, device=self.device) // self._groups_per_row)[:, None]
        shown = margin < math.inf

        def cells(x: Tensor, value: float = 0.0) -> Tensor:
            """Columns in cells: (H, G, E) -> (H, G, C, width), padded with `value`."""
            return torch.nn.functional.pad(x, (0, -x.shape[-1] % self._width), value=value).unflatten(
                -1, (-1, self._width)
            )

        def add(to: Tensor, x: Tensor) -> None:
            found = cells(x).sum(-1)
            to[..., : found.shape[-1]].index_add_(1, row[:, 0], found)

        add(self._heat_mass, units)
        add(self._heat_kept, units * kept)
        add(self._heat_candidates, shown)
        add(self._heat_stripes, chosen.logical_and(shown))
        least = cells(margin.float(), math.inf).amin(-1)
        to = self._heat_margin[..., : least.shape[-1]]
        to.scatter_reduce_(1, row.expand(self.heads, groups, least.shape[-1]), least, "amin")

    def add_rows(self, first: int, kept: Tensor) -> None:
        """Kept share of the mass of queries first..first+R-1 at every sorted theta, (levels, R) or (H, levels, R)."""
        self._kept_rows[..., first : first + kept.shape[-1]] = kept

    def add_outputs(self, dense: Tensor, difference: Tensor, prefix: Tensor) -> None:
        """Add outputs of R queries of a single head: dense (R, d), differences O_sparse - O_dense (P, R, d) of P
        distinct selections, and which of them is in force at each sorted theta (levels,).
        """
        self.norm_sq += dense.square().sum(dtype=torch.float64)
        difference = difference.abs_()
        for t, tol in enumerate(CLOSE):
            # Counting through floats is several times faster than summing booleans; R * d stays below 2**24.
            near = torch.lt(difference, tol, out=torch.empty_like(difference)).sum((1, 2))
            self.close[0, t] += near.long()[prefix]
        self.error_sq += difference.square_().sum((1, 2), dtype=torch.float64)[prefix]

    def results(self) -> list[Measured]:
        """Everything measured of each head, once all groups, rows and outputs are in."""
        geo = self.shape.geometry
        counts = {
            "visible_pairs": geo.visible_pairs,
            "anchor_pairs": geo.anchor_pairs,
            "candidate_pairs": geo.candidate_pairs,
        }
        pairs = _host(self._bin_pairs)[:, :-1].cumsum(1) + geo.anchor_pairs
        mass = self._shares(self._bin_mass[:, :-1].cumsum(1) + self._anchor_mass[:, None])
        parts = [
            self._thetas(mass, pairs),
            self._curves(mass, pairs),
            self._closeness(),
            self._columns(),
            self._heat_map(),
        ]
        return [
            Measured(**counts, **{name: values[h] for part in parts for name, values in part.items()})
            for h in range(self.heads)
        ]

    def _shares(self, units: Tensor) -> np.ndarray:
        """Float64 attention mass from whole units."""
        return _host(units.double() / self._unit)

    def _thetas(self, mass: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
        """Pairs and recall of every theta asked for."""
        geo, n, rank = self.shape.geometry, self.shape.tokens, self.shape.theta_rank
        at = np.searchsorted(self._edges, self.shape.sorted_thetas)
        kept_pairs = pairs[:, at]
        full = kept_pairs == geo.visible_pairs
        rows = self._kept_rows.clamp_(0.0, 1.0)
        edges = bin_edges(n, POSITION_BINS)
        units = (rows.double() * self._unit).round_().long()
        last = self._shares(units[..., -min(self.shape.params.block, n) :].sum(-1)) / min(self.shape.params.block, n)
        width = int(edges[1])
        binned = torch.nn.functional.pad(units, (0, -n % width)).unflatten(-1, (-1, width)).sum(-1)
        position = self._shares(binned) / np.diff(edges)
        position[full] = 1.0
        per_row = {"recall_p05": _percentile(rows, PERCENT), "recall_min": _host(rows.amin(-1)), "recall_last": last}
        return {
            "kept_pairs": kept_pairs[:, rank],
            "stripe_pairs": kept_pairs[:, rank] - geo.anchor_pairs,
            "recall": _recall(mass[:, at], n, full)[:, rank],
            **{name: np.where(full, 1.0, x.astype(np.float64))[:, rank] for name, x in per_row.items()},
            "position_edges": [edges] * self.heads,
            "position_recall": position[:, rank].astype(np.float32),
        }

    def _curves(self, mass: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
        """Recall and pairs at every theta of the grid, and of the stripe oracle."""
        n, total, anchors = self.shape.tokens, self.shape.geometry.visible_pairs, self.shape.geometry.anchor_pairs
        at = np.searchsorted(self._edges, CURVE_THETAS)
        anchor_mass = self._shares(self._anchor_mass)
        used = _host(self._oracle_pairs)
        units = _host(self._oracle_mass)
        oracle_pairs, oracle_recall = [], []
        for h in range(self.heads):
            some = used[h] > 0
            found = np.concatenate([[0.0], units[h][some].cumsum() / self._unit]) + anchor_mass[h]
            count = np.concatenate([[0], used[h][some].cumsum()]) + anchors
            oracle_pairs.append(count)
            oracle_recall.append(_recall(found, n, count == total))
        return {
            "curve_theta": [CURVE_THETAS.copy() for _ in range(self.heads)],
            "curve_recall": _recall(mass[:, at], n, pairs[:, at] == total),
            "curve_pairs": pairs[:, at],
            "oracle_pairs": oracle_pairs,
            "oracle_recall": oracle_recall,
        }

    def _closeness(self) -> dict[str, Any]:
        """Output error and closeness of every theta asked for; NaN without values."""
        rank = self.shape.theta_rank
        if self.has_values:
            norm = np.maximum(_host(self.norm_sq), 1e-300)[:, None]
            error = np.sqrt(_host(self.error_sq) / norm)[:, rank]
            close = (_host(self.close) / (self.shape.tokens * self.shape.head_dim))[:, :, rank]
        else:
            error = np.full((self.heads, len(rank)), np.nan)
            close = np.full((self.heads, len(CLOSE), len(rank)), np.nan)
        return {"output_error": error, "output_close_01": close[:, 0], "output_close_005": close[:, 1]}

    def _columns(self) -> dict[str, Any]:
        """The columns with most mass."""
        mass, top = self._column_mass.sort(dim=1, descending=True, stable=True)
        count = min(MAX_TOP, self.shape.tokens)
        return {
            "top_columns": _host(top[:, :count].contiguous()),
            "top_mass": (self._shares(mass[:, :count]) / self.shape.tokens).astype(np.float32),
        }

    def _heat_map(self) -> dict[str, Any]:
        rows = bin_edges(self.shape.tokens, MAX_ROWS, self.shape.params.group)
        queries, columns = np.diff(rows)[:, None], bin_edges(self.shape.tokens, MAX_COLUMNS)
        candidates = _host(self._heat_candidates)
        steps = [] if self._steps is None else self._steps.results(self._unit, rows, columns, candidates)
        return {
            **{name: [found[name] for found in steps] for name in (steps[0] if steps else ())},
            "heat_rows": [rows] * self.heads,
            "heat_columns": [columns] * self.heads,
            "heat_mass": self._shares(self._heat_mass) / queries,
            "heat_kept": self._shares(self._heat_kept) / queries,
            "heat_margin": _host(self._heat_margin),
            "heat_stripes": _host(self._heat_stripes) / np.maximum(candidates, 1),
        }


def float32_floor(thetas: np.ndarray) -> Tensor:
    """Largest float32 not above each theta: a float32 margin compares with it exactly as with the theta itself."""
    floor = thetas.astype(np.float32)
    floor = np.where(floor > thetas, np.nextafter(floor, np.float32(-np.inf)), floor)
    return torch.from_numpy(floor)


def _percentile(rows: Tensor, percent: float) -> np.ndarray:
    """`np.percentile(rows, percent, axis=-1)` of rows (..., n), float64; interpolated between neighbors in order."""
    n = rows.shape[-1]
    place = percent / 100 * (n - 1)
    below = math.floor(place)
    least = _host(rows.topk(min(below + 2, n), dim=-1, largest=False).values[..., -2:]).astype(np.float64)
    return least[..., 0] + (least[..., -1] - least[..., 0]) * (place - below)


def _host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _recall(mass: np.ndarray, n: int, dense: np.ndarray) -> np.ndarray:
    """Mean recall over n queries from summed attention mass; 1 where every pair is kept, whatever sums were rounded."""
    return np.where(dense, 1.0, (mass / n).clip(0.0, 1.0))
