"""Which group and which theta each head gets: least cost for a target, or best recall for a budget.

Per head and kind of group, the fitting prompts give points (theta, value, cost): the statistic and the density (or the
time), each the mean over prompts. From the first point on whose density or time no longer pays, a head runs dense:
value 1, cost 1. Costs never fall as theta grows, so the cheapest point that reaches a target is the first one.

Sharing a budget out over heads whose curves are concave is solved by equal slope: take the steps with most value per
cost first, whoever's they are. Real curves are made concave by their upper hull; then the result is within one step of
the optimum (the bound is the hull itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from anchorscope.calibration.costs import Price
from anchorscope.calibration.curves import HeadCurves, HeadIndex, Statistic
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams

By = Literal["head", "layer", "model"]
BY: tuple[str, ...] = get_args(By)
_TIE = 1e-12  # relative slack of sums of costs


class Setting(NamedTuple):
    """How one head runs: its kind of group, and theta in nats, None for dense."""

    params: AnchorParams
    theta: float | None


Choice = dict[HeadIndex, Setting]


@dataclass(frozen=True, eq=False)
class Points:
    """What one head can be set to with one kind of group, cheapest first; the last is dense.

    Attributes:
        theta: (T,) float64 nats, ascending; the last is where dense begins.
        value, cost: (T,) float64; 1 and 1 for dense.
    """

    theta: np.ndarray
    value: np.ndarray
    cost: np.ndarray

    def setting(self, index: int) -> float | None:
        """Theta of a point, None for the dense one."""
        return None if index == len(self.theta) - 1 else float(self.theta[index])

    @cached_property
    def corners(self) -> np.ndarray:
        """Indices of the points on the upper concave hull."""
        return hull(self.cost, self.value)


@dataclass(frozen=True, eq=False)
class Menu:
    """What several heads together can be set to, with one kind of group: sums of their values and costs.

    Attributes:
        params: the kind of group.
        heads: the heads.
        value, cost: (K,) float64.
        picks: index into `value` -> (len(heads),) index of each head's point.
        theta: (K,) float64, the theta that all heads share, nats; NaN where each has its own.
    """

    params: AnchorParams
    heads: tuple[HeadIndex, ...]
    value: np.ndarray
    cost: np.ndarray
    picks: Callable[[int], np.ndarray]
    theta: np.ndarray


class Ladder(NamedTuple):
    """What one unit can be set to on the concave hull of all its menus, cheapest first.

    Attributes:
        menus: the alternatives.
        menu, entry: (K,) int: which entry of which menu.
        cost, value: (K,) float64, both ascending, with falling slopes.
    """

    menus: Sequence[Menu]
    menu: np.ndarray
    entry: np.ndarray
    cost: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, menus: Sequence[Menu]) -> Ladder:
        """The hull of several menus together."""
        menu = np.concatenate([np.full(len(m.cost), i) for i, m in enumerate(menus)])
        entry = np.concatenate([np.arange(len(m.cost)) for m in menus])
        cost, value = np.concatenate([m.cost for m in menus]), np.concatenate([m.value for m in menus])
        corners = hull(cost, value)
        return cls(menus, menu[corners], entry[corners], cost[corners], value[corners])


@dataclass(frozen=True, eq=False)
class Problem:
    """The fitting prompts' curves, and what counts.

    Attributes:
        curves: per kind of group and head.
        rows: indices of the fitting prompts.
        statistic: what the target or the budget is about.
        price: cost of a density with a kind of group.
        dense_above: density from which on a head runs dense.
    """

    curves: Mapping[AnchorParams, Mapping[HeadIndex, HeadCurves]]
    rows: Sequence[int]
    statistic: Statistic
    price: Price
    dense_above: float
    _ladders: dict[By, list[Ladder]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def heads(self) -> tuple[HeadIndex, ...]:
        """All heads, by layer."""
        return tuple(sorted(next(iter(self.curves.values()))))

    @cached_property
    def layers(self) -> dict[int, tuple[HeadIndex, ...]]:
        """The heads of each layer."""
        return {layer: tuple(h for h in self.heads if h[0] == layer) for layer in sorted({h[0] for h in self.heads})}

    @cached_property
    def points(self) -> dict[AnchorParams, dict[HeadIndex, Points]]:
        """The points of every head with every kind of group."""
        return {params: {head: self._points(c) for head, c in heads.items()} for params, heads in self.curves.items()}

    def _points(self, curves: HeadCurves) -> Points:
        rows = list(self.rows)
        value, density = curves.statistic(self.statistic)[rows].mean(0), curves.density[rows].mean(0)
        cost = np.maximum.accumulate(self.price(curves.params, density))
        dense = (density >= self.dense_above) | (cost >= 1)
        dense[-1] = True  # theta = +inf is dense attention by definition
        stop = int(np.argmax(dense))
        return Points(curves.theta[: stop + 1], np.append(value[:stop], 1.0), np.append(cost[:stop], 1.0))

    def ladders(self, by: By) -> list[Ladder]:
        """One ladder per unit, made once."""
        if by not in self._ladders:
            make = equal_slope_menu if by == "head" else shared_menu
            self._ladders[by] = [
                Ladder.of([make(params, {h: own[h] for h in heads}) for params, own in self.points.items()])
                for heads in _units(self, by)
            ]
        return self._ladders[by]

    @property
    def least(self) -> float:
        """Mean cost over heads of the cheapest settings: of the anchor regions alone."""
        return sum(float(ladder.cost[0]) for ladder in self.ladders("head")) / len(self.heads)

    def choice(self, menu: Menu, index: int) -> Choice:
        """The settings behind one entry of a menu."""
        return self.settings(dict.fromkeys(menu.heads, menu.params), menu, index)

    def settings(self, groups: Mapping[HeadIndex, AnchorParams], menu: Menu, index: int) -> Choice:
        """The settings behind one entry of a menu whose heads have the kinds of groups given."""
        found: Choice = {}
        for (head, params), pick in zip(groups.items(), menu.picks(index).tolist(), strict=True):
            theta = self.points[params][head].setting(pick)
            # A head that changes nothing between its own theta and the shared one still gets the shared one.
            if theta is not None and not math.isnan(menu.theta[index]):
                theta = float(menu.theta[index])
            found[head] = Setting(params, theta)
        return found


def reach(problem: Problem, target: float, by: By) -> Choice:
    """The cheapest settings that reach the target.

    Args:
        problem: curves and prices.
        target: of the statistic, in (0, 1]. It binds every head ("head"), or the mean over a layer's heads ("layer") or
            all heads ("model") that then share one theta.
        by: who shares a theta. Heads of a layer always share the kind of group, and with "model" all heads do.
    """
    found: Choice = {}
    for heads in _units(problem, by):
        least = [_least(problem, params, heads, target, by) for params in problem.curves]
        menu, index = min(least, key=lambda option: float(option[0].cost[option[1]]))
        found |= problem.choice(menu, index)
    return found


def spend(problem: Problem, budget: float, by: By) -> Choice:
    """The settings with the best value that a mean cost per head affords.

    Args:
        problem: curves and prices.
        budget: mean cost over all heads, dense ones included.
        by: who shares a theta, as in `reach`.

    Raises:
        InputError: the anchor regions alone cost more; the message says how much.
    """
    ladders = problem.ladders(by)
    total = budget * len(problem.heads) * (1 + _TIE)
    least = sum(float(ladder.cost[0]) for ladder in ladders)
    if least > total:
        minimum = math.ceil(1e4 * least / len(problem.heads)) / 1e4
        raise InputError(
            f"a budget of {budget:g} is below what the anchor regions alone need: give at least {minimum:g}, or add"
            " smaller groups to --groups"
        )
    if by == "model":  # one unit: the best entry it can afford, hull or not
        affordable = [(m, int(np.flatnonzero(m.cost <= total)[-1])) for m in ladders[0].menus if m.cost[0] <= total]
        return problem.choice(*max(affordable, key=lambda option: float(option[0].value[option[1]])))
    first = _settle(problem, ladders, total)
    if by == "layer":
        return first
    # The layers' groups are settled; heads by themselves use up what a layer's next step was too large for.
    second = _settle(problem, [_ladder_of_one(problem, first[h].params, h) for h in problem.heads], total)
    return max(first, second, key=lambda choice: _value(problem, choice))


def share_out(ladders: Sequence[Ladder], budget: float) -> list[int]:
    """Equal slope: a rung for every ladder, with a sum of values within one step of the best.

    Args:
        ladders: of the units.
        budget: most that the sum of costs may be; at least the sum of the lowest rungs.
    """
    unit = np.concatenate([np.full(len(x.cost) - 1, u) for u, x in enumerate(ladders)])
    extra = np.concatenate([np.diff(x.cost) for x in ladders])
    slope = np.concatenate([np.diff(x.value) / np.diff(x.cost) for x in ladders])
    at, closed = [0] * len(ladders), [False] * len(ladders)
    left = budget - sum(float(x.cost[0]) for x in ladders)
    # Slopes fall along every ladder, so a stable sort keeps each unit's steps in their order.
    order = np.argsort(-slope, kind="stable")
    for u, cost in zip(unit[order].tolist(), extra[order].tolist(), strict=True):
        if closed[u]:
            continue
        if cost <= left:
            left -= cost
            at[u] += 1
        else:
            closed[u] = True  # a cheaper step of another unit may still fit
    return at


def hull(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Indices of the corners of the upper concave hull of points, from the cheapest to the best; costs ascend."""
    corners: list[int] = []
    for i in np.lexsort((-value, cost)).tolist():
        if corners and value[i] <= value[corners[-1]]:
            continue
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            # b goes where it lies on or below the line from a to i
            if (value[b] - value[a]) * (cost[i] - cost[b]) > (value[i] - value[b]) * (cost[b] - cost[a]):
                break
            corners.pop()
        corners.append(i)
    return np.array(corners)


def shared_menu(params: AnchorParams, points: Mapping[HeadIndex, Points]) -> Menu:
    """One theta for all heads: an entry per theta at which any of them changes. Heads may differ in kind of group."""
    heads = tuple(points)
    # Curves of one grid start at the same theta, so every head has a point at or below each of these.
    thetas = np.unique(np.concatenate([p.theta for p in points.values()]))
    at = np.stack([np.searchsorted(p.theta, thetas, side="right") - 1 for p in points.values()])
    value = sum((p.value[i] for p, i in zip(points.values(), at, strict=True)), np.zeros(len(thetas)))
    cost = sum((p.cost[i] for p, i in zip(points.values(), at, strict=True)), np.zeros(len(thetas)))
    return Menu(params, heads, value, cost, lambda k: at[:, k], thetas)


def equal_slope_menu(params: AnchorParams, points: Mapping[HeadIndex, Points]) -> Menu:
    """Each head its own theta: the best value for each cost, where all heads stand at the same slope."""
    heads = tuple(points)
    corners = [p.corners for p in points.values()]
    start = np.array([c[0] for c in corners])
    head = np.concatenate([np.full(len(c) - 1, h) for h, c in enumerate(corners)])
    point = np.concatenate([c[1:] for c in corners])
    gain = np.concatenate([np.diff(p.value[c]) for p, c in zip(points.values(), corners, strict=True)])
    extra = np.concatenate([np.diff(p.cost[c]) for p, c in zip(points.values(), corners, strict=True)])
    order = np.argsort(-gain / extra, kind="stable")
    head, point = head[order], point[order]

    def total(begin: str, steps: np.ndarray) -> np.ndarray:
        first = sum(float(getattr(p, begin)[i]) for p, i in zip(points.values(), start, strict=True))
        return first + np.concatenate([[0.0], np.cumsum(steps[order])])

    def picks(k: int) -> np.ndarray:
        now = start.copy()
        for h, p in zip(head[:k].tolist(), point[:k].tolist(), strict=True):
            now[h] = p
        return now

    own = np.full(len(order) + 1, math.nan)
    return Menu(params, heads, total("value", gain), total("cost", extra), picks, own)


def one_theta(problem: Problem, groups: Mapping[HeadIndex, AnchorParams], budget: float) -> tuple[float, Choice] | None:
    """One theta for all heads, the largest whose mean cost stays within the budget; None if none does.

    The same kinds of groups per head as given; no head falls back to dense unless its `Problem` says so.
    """
    points = {head: problem.points[params][head] for head, params in groups.items()}
    menu = shared_menu(next(iter(groups.values())), points)
    within = np.flatnonzero(menu.cost <= budget * len(points) * (1 + _TIE))
    if not within.size:
        return None
    index = int(within[-1])
    return float(menu.theta[index]), problem.settings(groups, menu, index)


# ----------------------------------------------------------------------------------------------------------------


def _units(problem: Problem, by: By) -> list[tuple[HeadIndex, ...]]:
    """Heads that share a kind of group, and with "layer" and "model" a theta."""
    return [problem.heads] if by == "model" else list(problem.layers.values())


def _least(
    problem: Problem, params: AnchorParams, heads: tuple[HeadIndex, ...], target: float, by: By
) -> tuple[Menu, int]:
    """The cheapest entry of one kind of group that reaches the target."""
    points = {h: problem.points[params][h] for h in heads}
    if by == "head":
        picks = np.array([int(np.argmax(p.value >= target)) for p in points.values()])
        cost = sum(float(p.cost[i]) for p, i in zip(points.values(), picks, strict=True))
        return Menu(params, heads, np.array([math.nan]), np.array([cost]), lambda _: picks, np.array([math.nan])), 0
    menu = shared_menu(params, points)
    # The last entry is dense throughout; a mean of ones may round to just below 1.
    reached = np.flatnonzero(menu.value / len(heads) >= target)
    return menu, int(reached[0]) if reached.size else len(menu.value) - 1


def _ladder_of_one(problem: Problem, params: AnchorParams, head: HeadIndex) -> Ladder:
    points = problem.points[params][head]
    at = points.corners
    menu = Menu(
        params, (head,), points.value, points.cost, lambda k: np.array([k]), np.full(len(points.theta), math.nan)
    )
    return Ladder([menu], np.zeros(len(at), dtype=int), at, points.cost[at], points.value[at])


def _settle(problem: Problem, ladders: Sequence[Ladder], total: float) -> Choice:
    found: Choice = {}
    for ladder, rung in zip(ladders, share_out(ladders, total), strict=True):
        found |= problem.choice(ladder.menus[int(ladder.menu[rung])], int(ladder.entry[rung]))
    return found


def _value(problem: Problem, choice: Choice) -> float:
    """Sum of the heads' values."""
    total = 0.0
    for head, (params, theta) in choice.items():
        points = problem.points[params][head]
        total += float(
            points.value[-1 if theta is None else int(np.searchsorted(points.theta, theta, side="right")) - 1]
        )
    return total
