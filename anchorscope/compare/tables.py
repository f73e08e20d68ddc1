"""Tables of a comparison, made from scored points alone: methods.csv and the density that each method needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from anchorscope.runs.values import number

RECALLS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Point:
    """One method at one setting on one head; a row of methods.csv.

    `method` is the label in tables. The measures are defined in `anchorscope.compare.score.Score`; `output_error` is
    NaN without values.
    """

    prompt: str
    layer: int
    head: int
    method: str
    parameter: str
    value: float
    recall: float
    recall_p05: float
    recall_last: float
    density: float
    output_error: float
    identify_cost: float


COLUMNS = tuple(f.name for f in fields(Point))


@dataclass(frozen=True)
class Need:
    """What a recall costs: the density needed, and the identification spent there; both None where not reached."""

    density: float | None
    identify_cost: float | None

    @property
    def reached(self) -> bool:
        """Whether the recall was reached at all."""
        return self.density is not None


def methods_rows(points: Iterable[Point]) -> list[tuple[str, ...]]:
    """Rows of methods.csv."""
    return [
        (p.prompt, str(p.layer), str(p.head), p.method, p.parameter, *(number(getattr(p, x)) for x in COLUMNS[5:]))
        for p in points
    ]


def density_at_recall(curve: Sequence[tuple[float, float, float]], target: float) -> Need:
    """Least density at which a curve reaches a recall, by linear interpolation between neighboring points.

    Args:
        curve: (density, recall, identify_cost) of each measured point, in any order.
        target: recall asked for.

    Returns:
        The first crossing from the sparse side. A curve whose sparsest point is there already needs that point's
        density: nothing is extrapolated.
    """
    points = sorted(curve, key=lambda p: (p[0], -p[1]))
    for i, (density, recall, cost) in enumerate(points):
        if recall < target:
            continue
        if i == 0:
            return Need(density, cost)
        d0, r0, c0 = points[i - 1]
        share = (target - r0) / (recall - r0)
        return Need(d0 + share * (density - d0), c0 + share * (cost - c0))
    return Need(None, None)


def by_head(points: Iterable[Point], method: str) -> dict[tuple[str, int, int], list[Point]]:
    """The points of one method by (prompt, layer, head), in order of appearance."""
    heads: dict[tuple[str, int, int], list[Point]] = {}
    for p in points:
        if p.method == method:
            heads.setdefault((p.prompt, p.layer, p.head), []).append(p)
    return heads


def shared_curve(points: Iterable[Point], method: str) -> list[tuple[float, float, float]]:
    """Means over heads of (density, recall, identify_cost) at every value of the parameter."""
    at: dict[float, list[Point]] = {}
    for p in points:
        if p.method == method:
            at.setdefault(p.value, []).append(p)
    return [
        (
            float(np.mean([p.density for p in ps])),
            float(np.mean([p.recall for p in ps])),
            float(np.mean([p.identify_cost for p in ps])),
        )
        for ps in at.values()
    ]


def shared_need(points: Sequence[Point], method: str, target: float) -> Need:
    """Density at which the mean recall over heads reaches the target, one parameter value for all heads."""
    return density_at_recall(shared_curve(points, method), target)


def head_needs(points: Sequence[Point], method: str, target: float) -> dict[tuple[str, int, int], Need]:
    """Density that each head needs for the target, each at its own value of the parameter."""
    return {
        key: density_at_recall([(p.density, p.recall, p.identify_cost) for p in ps], target)
        for key, ps in by_head(points, method).items()
    }


def per_head_need(points: Sequence[Point], method: str, target: float) -> Need:
    """Mean over heads of the density each needs for the target; not reached unless every head reaches it."""
    needs = list(head_needs(points, method, target).values())
    if not all(x.reached for x in needs):
        return Need(None, None)
    return Need(
        float(np.mean([x.density for x in needs if x.density is not None])),
        float(np.mean([x.identify_cost for x in needs if x.identify_cost is not None])),
    )


def _most(curve: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The largest recall of a curve, and the least density that has it."""
    recall, density = max((r, -d) for d, r, _ in curve)
    return recall, -density


def largest(points: Sequence[Point], method: str) -> dict[str, dict[str, float]]:
    """The largest recall that a method's settings reach and its density: of the mean over heads, and of the head that
    reaches least.
    """
    mean = _most(shared_curve(points, method))
    heads = by_head(points, method).values()
    least = min(_most([(p.density, p.recall, 0.0) for p in ps]) for ps in heads)
    return {
        name: {"recall": recall, "density": density}
        for name, (recall, density) in (("mean", mean), ("hardest_head", least))
    }


def needed_table(points: Sequence[Point], methods: Sequence[str], recalls: Sequence[float]) -> dict[str, Any]:
    """The tables `shared` and `per-head`: per method and recall the density needed, null where not reached; and the
    largest recall of each method.
    """
    shared, own = [], []
    for method in methods:
        rows = [(r, shared_need(points, method, r)) for r in recalls]
        shared.append(
            {
                "method": method,
                "needed": [{"recall": r, "density": x.density, "identify_cost": x.identify_cost} for r, x in rows],
            }
        )
        cells = []
        for r in recalls:
            x, heads = per_head_need(points, method, r), head_needs(points, method, r)
            cells.append(
                {
                    "recall": r,
                    "density": x.density,
                    "identify_cost": x.identify_cost,
                    "heads": len(heads),
                    "heads_reached": sum(n.reached for n in heads.values()),
                }
            )
        own.append({"method": method, "needed": cells})
    most = [{"method": method, **largest(points, method)} for method in methods]
    return {"shared": shared, "per-head": own, "largest": most}


def winners(points: Sequence[Point], methods: Sequence[str], target: float) -> dict[tuple[str, int, int], str | None]:
    """Per (prompt, layer, head) the method that reaches the target with the least density; None where none does.

    Identification is not counted. Ties go to the method named first.
    """
    best: dict[tuple[str, int, int], tuple[float, str | None]] = {}
    for method in methods:
        for key, need in head_needs(points, method, target).items():
            density = math.inf if need.density is None else need.density
            if key not in best or density < best[key][0]:
                best[key] = (density, method if need.reached else None)
    return {key: method for key, (_, method) in best.items()}
