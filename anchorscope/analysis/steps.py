"""The heat maps of some heads at every theta asked for, as steps: what each theta adds to the cells it adds to.

What a theta keeps of a cell is the sum of the steps up to it. Few thetas add to a cell, so there are few steps; where
there are many, the cells get coarser until `MAX_STEPS` suffice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anchorscope.profiles import MAX_STEPS

LEAST_ROWS, LEAST_COLUMNS = 64, 64  # cells are not made coarser than that, but for very many thetas


_BUFFER, _CPU_BUFFER = 1 << 24, 1 << 17  # sums that are held at a time, 16 bytes each


class _Steps(NamedTuple):
    """Steps by row, column and level: (E,) int64; mass in whole units, stripes as (group, column) pairs."""

    row: Tensor
    column: Tensor
    level: Tensor
    mass: Tensor
    stripes: Tensor


class HeatSteps:
    """Collects the candidates of the groups of some heads by cell and by the level that selects them.

    Args:
        levels: distinct thetas; level `levels` holds the candidates that none selects.
        cells: rows and columns of the heat map.
        groups_per_row, width: groups of a row, keys of a column.
        device: of the tensors added.
        heads: how many.
    """

    def __init__(
        self, levels: int, cells: tuple[int, int], groups_per_row: int, width: int, device: torch.device, heads: int
    ) -> None:
        self.levels, self.cells, self.groups_per_row, self.width = levels, cells, groups_per_row, width
        self.device, self.heads = device, heads
        limit = _CPU_BUFFER if device.type == "cpu" else _BUFFER
        self._rows = max(1, min(cells[0], limit // (heads * cells[1] * (levels + 1))))  # held at a time
        self._row = 0  # the first of them
        self._mass, self._count = torch.zeros(
            2, heads, self._rows, cells[1], levels + 1, dtype=torch.int64, device=device
        )
        self._done: list[tuple[Tensor, Tensor, Tensor]] = []  # head, row, column and level as one number; sums

    def add(self, first: int, start: int, level: Tensor, units: Tensor, seen: Tensor) -> None:
        """Add the candidates start..start+c-1 of a run of G groups; runs come in ascending order.

        Args:
            first: index of the first of the groups.
            start: the first candidate's position.
            level: (H, G, c) int64, the first level that selects each.
            units: (H, G, c) int64, attention mass summed over the group's queries.
            seen: (H, G, c) bool, false for columns that are no candidate of the group, or that no query sees.
        """
        groups, at = level.shape[1], 0
        columns = torch.arange(start, start + level.shape[2], device=self.device).div_(
            self.width, rounding_mode="floor"
        )
        head = torch.arange(self.heads, device=self.device)[:, None, None] * self._rows
        while at < groups:
            row = (first + at) // self.groups_per_row
            if row >= self._row + self._rows:
                self._flush(row)
            stop = min(groups, (self._row + self._rows) * self.groups_per_row - first)
            rows = torch.arange(first + at, first + stop, device=self.device) // self.groups_per_row - self._row
            to = ((head + rows[:, None]) * self.cells[1] + columns) * (self.levels + 1) + level[:, at:stop]
            there = seen[:, at:stop]
            self._mass.view(-1).scatter_add_(0, to.flatten(), (units[:, at:stop] * there).flatten())
            self._count.view(-1).scatter_add_(0, to.flatten(), there.long().flatten())
            at = stop

    def _flush(self, row: int) -> None:
        """Keep the steps of the rows held, and begin others."""
        place = self._count.nonzero(as_tuple=True)
        head, down, column, level = place
        key = ((head * self.cells[0] + down + self._row) * self.cells[1] + column) * (self.levels + 1) + level
        self._done.append((key, self._mass[place], self._count[place]))
        self._mass.zero_()
        self._count.zero_()
        self._row = row

    def results(
        self, unit: float, rows: np.ndarray, columns: np.ndarray, candidates: np.ndarray
    ) -> list[dict[str, Any]]:
        """The steps of each head as a profile holds them (`anchorscope.profiles.Measured`).

        Args:
            unit: how many whole units of attention mass make 1.
            rows, columns: (R+1,), (C+1,) edges of the heat map's cells.
            candidates: (H, R, C) candidate (group, column) pairs of each cell.
        """
        self._flush(0)
        key, mass, stripes = (torch.cat(parts) for parts in zip(*self._done, strict=True))
        key, order = key.sort()
        each = self.cells[0] * self.cells[1] * (self.levels + 1)
        edges = torch.searchsorted(key, torch.arange(self.heads + 1, device=self.device) * each).tolist()
        found = []
        for head, (a, b) in enumerate(pairwise(edges)):
            cell, level = (
                (key[a:b] - head * each).div(self.levels + 1, rounding_mode="floor"),
                key[a:b] % (self.levels + 1),
            )
            row, column = cell.div(self.cells[1], rounding_mode="floor"), cell % self.cells[1]
            steps = _Steps(row, column, level, mass[order[a:b]], stripes[order[a:b]])
            found.append(_stored(steps, unit, rows, columns, candidates[head]))
        return found


def _stored(
    steps: _Steps, unit: float, rows: np.ndarray, columns: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """The steps of one head as a profile holds them, with coarser cells if there are too many."""
    while steps.level.numel() > MAX_STEPS and candidates.size > 1:
        axis = _coarser_axis(candidates.shape)
        steps, candidates = _merge(steps, axis), _pairs(candidates, axis)
        rows, columns = (_every_other(rows), columns) if axis == 0 else (rows, _every_other(columns))
    row, column, level, mass, stripes = (x.cpu().numpy() for x in steps)
    down, across = candidates.shape
    count = np.bincount(row * across + column, minlength=down * across)
    return {
        "step_rows": rows,
        "step_columns": columns,
        "step_count": count.reshape(down, across),
        "step_theta": level,
        "step_mass": mass / unit / np.diff(rows)[row],
        "step_stripes": stripes / candidates[row, column],
    }


def _coarser_axis(shape: tuple[int, ...]) -> int:
    """Which axis to halve: rows down to `LEAST_ROWS`, then columns down to `LEAST_COLUMNS`, then the longer."""
    if shape[0] > LEAST_ROWS:
        return 0
    if shape[1] > LEAST_COLUMNS:
        return 1
    return int(shape[1] > shape[0])


def _merge(steps: _Steps, axis: int) -> _Steps:
    """The steps of cells twice as large along an axis."""
    row, column = (steps.row // 2, steps.column) if axis == 0 else (steps.row, steps.column // 2)
    across, levels = int(column.max()) + 1, int(steps.level.max()) + 1
    key, place = torch.unique((row * across + column) * levels + steps.level, return_inverse=True)
    mass, stripes = (torch.zeros_like(key).scatter_add_(0, place, x) for x in (steps.mass, steps.stripes))
    cell = key.div(levels, rounding_mode="floor")
    return _Steps(cell.div(across, rounding_mode="floor"), cell % across, key % levels, mass, stripes)


def _pairs(x: np.ndarray, axis: int) -> np.ndarray:
    """Sums of neighbors along an axis; an odd one stays alone."""
    return np.add.reduceat(x, np.arange(0, x.shape[axis], 2), axis=axis)


def _every_other(edges: np.ndarray) -> np.ndarray:
    """Edges of cells twice as large; the last may be smaller."""
    return np.append(edges[:-1][::2], edges[-1])
