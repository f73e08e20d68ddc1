"""What both engines add up over the groups of one head, and what follows from the sums.

The thetas asked for are sorted and distinct here (*levels*). A column belongs to the first level that selects it, so
what a level keeps is a running sum over levels; the curve over a fine grid of thetas and the stripe oracle are running
sums over bins in the same way. Definitions: docs/method.md. Totals are float64, pair counts int64.
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
class HeadAccumulator:
    """Adds up the groups of one head, from any back end, and turns the sums into what was measured.

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
        self.groups_per_row = math.ceil(groups / MAX_ROWS)
        self.width = math.ceil(n / MAX_COLUMNS)
        cells = math.ceil(groups / self.groups_per_row), math.ceil(n / self.width)
        self.heat_mass = f64(*cells)
        self.heat_kept = f64(*cells)
        self.heat_margin = torch.full(cells, math.inf, dtype=torch.float32, device=dev)
        self.heat_stripes = f64(*cells)
        self.heat_candidates = f64(*cells)
        # One theta needs no more than its heat map.
        self.steps = HeatSteps(levels, cells, self.width, dev) if levels > 1 else None

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
            if self.steps is not None:
                self.steps.add(row, start, level, stripes, torch.isfinite(margin))
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

    def result(self) -> Measured:
        """Everything measured, once all groups, rows and outputs are in."""
        return Measured(**self._shares_of_mass(), **self._curves(), **self._closeness(), **self._heat_map())

    def _shares_of_mass(self) -> dict[str, Any]:
        """Pairs and recall of every theta asked for, and the columns with most mass."""
        n, rank = self.shape.tokens, self.shape.theta_rank
        total, anchors = self.shape.geometry.visible_pairs, self.shape.geometry.anchor_pairs
        kept_pairs = _host(self.level_pairs)[:-1].cumsum() + anchors
        recall = _recall(_host(self.level_mass).cumsum() + float(self.anchor_mass), n, kept_pairs == total)
        rows = _host(self.kept_rows).astype(np.float64).clip(0.0, 1.0)
        rows[kept_pairs == total] = 1.0
        edges = bin_edges(n, POSITION_BINS)
        position = np.add.reduceat(rows, edges[:-1], axis=1) / np.diff(edges)
        column_mass = _host(self.column_mass)
        top = np.argsort(-column_mass, kind="stable")[: min(MAX_TOP, n)]
        return {
            "visible_pairs": total,
            "anchor_pairs": anchors,
            "candidate_pairs": total - anchors,
            "kept_pairs": kept_pairs[rank],
            "stripe_pairs": kept_pairs[rank] - anchors,
            "recall": recall[rank],
            "recall_p05": np.percentile(rows, 5, axis=1)[rank],
            "recall_min": rows.min(1)[rank],
            "recall_last": rows[:, -min(self.shape.params.block, n) :].mean(1)[rank],
            "position_edges": edges,
            "position_recall": position[rank].astype(np.float32),
            "top_columns": top.astype(np.int64),
            "top_mass": (column_mass[top] / n).astype(np.float32),
        }

    def _curves(self) -> dict[str, Any]:
        """Recall and pairs at every theta of the grid, and of the stripe oracle."""
        n, anchor_mass = self.shape.tokens, float(self.anchor_mass)
        total, anchors = self.shape.geometry.visible_pairs, self.shape.geometry.anchor_pairs
        curve_mass = _host(self.curve_mass)[:-1].cumsum() + anchor_mass
        curve_pairs = _host(self.curve_pairs)[:-1].cumsum() + anchors
        used = _host(self.oracle_pairs) > 0
        oracle_mass = np.concatenate([[0.0], _host(self.oracle_mass)[used].cumsum()]) + anchor_mass
        oracle_pairs = np.concatenate([[0], _host(self.oracle_pairs)[used].cumsum()]) + anchors
        return {
            "curve_theta": CURVE_THETAS.copy(),
            "curve_recall": _recall(curve_mass, n, curve_pairs == total),
            "curve_pairs": curve_pairs,
            "oracle_pairs": oracle_pairs,
            "oracle_recall": _recall(oracle_mass, n, oracle_pairs == total),
        }

    def _closeness(self) -> dict[str, Any]:
        """Output error and closeness of every theta asked for; NaN without values."""
        rank = self.shape.theta_rank
        if self.has_values:
            norm = max(float(self.norm_sq), 1e-300)
            error = np.sqrt(_host(self.error_sq) / norm)[rank]
            close = (_host(self.close) / (self.shape.tokens * self.shape.head_dim))[:, rank]
        else:
            error = np.full(len(rank), np.nan)
            close = np.full((len(CLOSE), len(rank)), np.nan)
        return {"output_error": error, "output_close_01": close[0], "output_close_005": close[1]}

    def _heat_map(self) -> dict[str, Any]:
        rows = bin_edges(self.shape.tokens, MAX_ROWS, self.shape.params.group)
        queries, columns = np.diff(rows)[:, None], bin_edges(self.shape.tokens, MAX_COLUMNS)
        candidates = _host(self.heat_candidates)
        steps = {} if self.steps is None else self.steps.result(rows, columns, candidates)
        return {
            **steps,
            "heat_rows": rows,
            "heat_columns": columns,
            "heat_mass": _host(self.heat_mass) / queries,
            "heat_kept": _host(self.heat_kept) / queries,
            "heat_margin": _host(self.heat_margin),
            "heat_stripes": _host(self.heat_stripes) / np.maximum(candidates, 1),
        }


def _host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _recall(mass: np.ndarray, n: int, dense: np.ndarray) -> np.ndarray:
    """Mean recall over n queries from summed attention mass; 1 where every pair is kept, whatever sums were rounded."""
    return np.where(dense, 1.0, (mass / n).clip(0.0, 1.0))
