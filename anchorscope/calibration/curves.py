"""Curves of a head as step functions of theta, pooled over prompts.

A selection changes only where a margin is passed, so recall and density are right-continuous step functions of theta,
measured exactly at the thetas of a grid. Curves are therefore only ever read at thetas that *every* profile was
measured at, never between them: what is read is exact, and no theta is chosen whose recall was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import numpy as np

from anchorscope.errors import InputError
from anchorscope.moved import moved
from anchorscope.params import AnchorParams
from anchorscope.profiles import HeadProfile

Statistic = Literal["mean", "p05", "last"]
STATISTICS: tuple[str, ...] = get_args(Statistic)
HeadIndex = tuple[int, int]  # layer, query head
__getattr__ = moved(__name__, {"Head": "anchorscope.calibration.curves:HeadIndex"})


@dataclass(frozen=True, eq=False)
class PromptCurve:
    """One head on one prompt.

    Attributes:
        grid: (G,) float64 ascending, every theta (nats) it was measured at; +inf last. Shared between curves.
        theta: (T,) float64 ascending, those of `grid` where something changes, the first one included.
        recall, density: (T,) float64, exact at `theta` and, unchanged, up to the next.
        p05, last: (T,) float64, 5th percentile of the queries' recall and mean of the last block; exact at the thetas
            that were asked for, between them the value of the asked theta below (0 if there is none): a lower bound.
    """

    grid: np.ndarray
    theta: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    p05: np.ndarray
    last: np.ndarray

    @classmethod
    def of(
        cls, profile: HeadProfile, statistic: Statistic, grids: dict[bytes, np.ndarray] | None = None
    ) -> PromptCurve:
        """Read a profile: on its fine curve for the mean, on the thetas asked for where rows matter.

        Args:
            profile: of the head; its heat map is not needed.
            statistic: what thetas will be chosen by.
            grids: grids met so far, so that equal ones are held once.
        """
        asked, first = np.unique(profile.thetas, return_index=True)
        rows = {"p05": profile.recall_p05[first], "last": profile.recall_last[first]}
        if statistic == "mean":
            theta, recall, pairs = profile.curve_theta, profile.curve_recall, profile.curve_pairs
        else:
            theta, recall, pairs = asked, profile.recall[first], profile.kept_pairs[first]
            if theta[-1] != math.inf:  # dense by definition, whether it was asked for or not
                theta, recall, pairs = (
                    np.append(x, end) for x, end in ((theta, math.inf), (recall, 1.0), (pairs, profile.visible_pairs))
                )
        below = np.searchsorted(asked, theta, side="right") - 1
        values = [recall, pairs / profile.visible_pairs]
        values += [np.where(below >= 0, rows[name][below], 0.0) for name in ("p05", "last")]
        values = [np.minimum(x, 1.0) for x in values]
        for x in values:
            x[-1] = 1.0
        grid = theta if grids is None else grids.setdefault(theta.tobytes(), theta)
        new = changes(values)
        return cls(grid, theta[new], *(x[new] for x in values))


@dataclass(frozen=True, eq=False)
class HeadCurves:
    """One head with one kind of group on all prompts, at thetas measured on every one of them.

    Attributes:
        layer, head: indices in the model.
        params: the kind of group.
        theta: (T,) float64 ascending, nats; +inf last.
        recall, density, p05, last: (P, T) float64, see `PromptCurve`.
    """

    layer: int
    head: int
    params: AnchorParams
    theta: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    p05: np.ndarray
    last: np.ndarray

    @classmethod
    def of(
        cls, layer: int, head: int, params: AnchorParams, curves: Sequence[PromptCurve], grid: np.ndarray
    ) -> HeadCurves:
        """Bring the prompts' curves to a common grid (see `common_grid`)."""
        at = [np.searchsorted(c.theta, grid, side="right") - 1 for c in curves]
        values = [
            np.stack([getattr(c, name)[i] for c, i in zip(curves, at, strict=True)])
            for name in ("recall", "density", "p05", "last")
        ]
        new = changes(values)
        return cls(layer, head, params, grid[new], *(x[:, new] for x in values))

    def statistic(self, name: Statistic) -> np.ndarray:
        """(P, T) float64: the statistic by name."""
        return self.recall if name == "mean" else self.p05 if name == "p05" else self.last

    def at(self, theta: float) -> int:
        """Index of the last theta that is not above `theta`, which must not lie below the grid."""
        return int(np.searchsorted(self.theta, theta, side="right")) - 1


def changes(values: Sequence[np.ndarray]) -> np.ndarray:
    """(T,) bool: where any of the arrays (..., T) differs from its predecessor; the first and the last always."""
    new = np.zeros(values[0].shape[-1], dtype=bool)
    new[[0, -1]] = True
    for x in values:
        differs = x[..., 1:] != x[..., :-1]
        new[1:] |= differs.reshape(-1, differs.shape[-1]).any(0)
    return new


def common_grid(curves: Iterable[PromptCurve]) -> np.ndarray:
    """(G,) float64 ascending: the thetas that every curve was measured at.

    Raises:
        InputError: no finite theta is common to all.
    """
    grids = list({id(c.grid): c.grid for c in curves}.values())
    grid = reduce(np.intersect1d, grids)
    if not np.isfinite(grid).any():
        raise InputError(
            "the analyses have no theta in common to choose from: run them with the same --theta list, like 0:16:0.25"
        )
    return grid
