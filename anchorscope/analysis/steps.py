"""The heat map of one head at every theta asked for, as steps: what each theta adds to the cells it adds to.

What a theta keeps of a cell is the sum of the steps up to it. Few thetas add to a cell, so there are few steps; where
there are many, the cells get coarser until `MAX_STEPS` suffice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anchorscope.profiles import MAX_STEPS

LEAST_ROWS, LEAST_COLUMNS = 64, 64  # cells are not made coarser than that, but for very many thetas


class _Steps(NamedTuple):
    """Steps sorted by row, column and level: (E,) each; `mass` summed over queries, `stripes` (group, column) pairs."""

    row: np.ndarray
    column: np.ndarray
    level: np.ndarray
    mass: np.ndarray
    stripes: np.ndarray


class HeatSteps:
    """Collects the candidates of a head's groups by cell and by the level that selects them.

    Args:
        levels: distinct thetas; level `levels` holds the candidates that none selects.
        cells: rows and columns of the heat map.
        width: keys per column.
        device: of the tensors added.
    """

    def __init__(self, levels: int, cells: tuple[int, int], width: int, device: torch.device) -> None:
        self.levels, self.cells, self.width, self.device = levels, cells, width, device
        self._row = 0
        self._mass = torch.zeros(cells[1] * (levels + 1), dtype=torch.float64, device=device)
        self._count = torch.zeros_like(self._mass)
        self._done: list[_Steps] = []

    def add(self, row: int, start: int, level: Tensor, mass: Tensor, seen: Tensor) -> None:
        """Add the candidates start..start+c-1 of a group; rows come in ascending order.

        Args:
            row: the row of the heat map that the group is part of.
            start: the first candidate's position.
            level: (c,) int64, the first level that selects each.
            mass: (c,) float64, attention mass summed over the group's queries.
            seen: (c,) bool, false for columns that no query sees.
        """
        if row != self._row:
            self._flush(row)
        columns = torch.arange(start, start + level.numel(), device=self.device).div_(self.width, rounding_mode="floor")
        at = columns.mul_(self.levels + 1).add_(level)
        self._mass.scatter_add_(0, at, mass * seen)
        self._count.scatter_add_(0, at, seen.double())

    def _flush(self, row: int) -> None:
        """Keep the steps of the row before, and begin another."""
        mass, count = self._mass.cpu().numpy(), self._count.cpu().numpy()
        at = np.flatnonzero(count)
        column, level = np.divmod(at, self.levels + 1)
        places = (np.full(at.size, self._row), column, level)
        sums = (mass[at], count[at])  # halves of their size: of long prompts there are millions before they are merged
        self._done.append(_Steps(*(x.astype(np.int32) for x in places), *(x.astype(np.float32) for x in sums)))
        self._mass.zero_()
        self._count.zero_()
        self._row = row

    def result(self, rows: np.ndarray, columns: np.ndarray, candidates: np.ndarray) -> dict[str, Any]:
        """The steps as a profile holds them (`anchorscope.profiles.Measured`).

        Args:
            rows, columns: (R+1,), (C+1,) edges of the heat map's cells.
            candidates: (R, C) candidate (group, column) pairs of each cell.
        """
        self._flush(0)
        steps = _Steps(*(np.concatenate(parts) for parts in zip(*self._done, strict=True)))
        while steps.level.size > MAX_STEPS and candidates.size > 1:
            axis = _coarser_axis(candidates.shape)
            steps, candidates = _merge(steps, axis), _pairs(candidates, axis)
            rows, columns = (_every_other(rows), columns) if axis == 0 else (rows, _every_other(columns))
        down, across = candidates.shape
        count = np.bincount(steps.row * across + steps.column, minlength=down * across)
        return {
            "step_rows": rows,
            "step_columns": columns,
            "step_count": count.reshape(down, across),
            "step_theta": steps.level,
            "step_mass": steps.mass / np.diff(rows)[steps.row],
            "step_stripes": steps.stripes / candidates[steps.row, steps.column],
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
    keys = np.stack([row, column, steps.level])
    order = np.lexsort(keys[::-1])
    keys = keys[:, order]
    first = np.flatnonzero(np.append(True, (np.diff(keys, axis=1) != 0).any(0)))
    mass, stripes = (np.add.reduceat(x[order], first) for x in (steps.mass, steps.stripes))
    row, column, level = keys[:, first]
    return _Steps(row, column, level, mass, stripes)


def _pairs(x: np.ndarray, axis: int) -> np.ndarray:
    """Sums of neighbors along an axis; an odd one stays alone."""
    return np.add.reduceat(x, np.arange(0, x.shape[axis], 2), axis=axis)


def _every_other(edges: np.ndarray) -> np.ndarray:
    """Edges of cells twice as large; the last may be smaller."""
    return np.append(edges[:-1][::2], edges[-1])
