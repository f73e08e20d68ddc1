"""What a choice keeps: on fitting and on held-out prompts, at other lengths, and against one theta for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorscope.calibration.choose import By, Choice, Problem, one_theta, reach, spend
from anchorscope.calibration.costs import Price, by_density
from anchorscope.calibration.curves import HeadCurves, HeadIndex, Statistic
from anchorscope.calibration.sources import group_name
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams
from anchorscope.runs.values import jsonable

CLEAR = 0.01  # a shortfall that is more than the grain of the curves and the draw of the prompts
BUDGETS = 24  # points of the curves over total density
TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)
_EXACT = 1e-9  # rounding of a mean over prompts

Curves = Mapping[AnchorParams, Mapping[HeadIndex, HeadCurves]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a choice keeps, head by head.

    Attributes:
        heads: in the order of the arrays.
        recall, density, p05, last: (H, P) float64 on each prompt.
    """

    heads: tuple[HeadIndex, ...]
    recall: np.ndarray
    density: np.ndarray
    p05: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, choice: Choice, curves: Curves, rows: Sequence[int]) -> Outcome:
        """Read the curves of the prompts `rows` at the settings chosen."""
        heads = tuple(choice)
        values = np.ones((4, len(heads), len(rows)))  # dense keeps all
        for h, (head, (params, theta)) in enumerate(choice.items()):
            if theta is not None:
                c = curves[params][head]
                at = c.at(theta)
                for k, x in enumerate((c.recall, c.density, c.p05, c.last)):
                    values[k, h] = x[list(rows), at]
        return cls(heads, *values)

    def statistic(self, name: Statistic) -> np.ndarray:
        """(H,) float64: mean over prompts of the statistic by name."""
        return (self.recall if name == "mean" else self.p05 if name == "p05" else self.last).mean(1)

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """Pooled numbers: means over prompts and heads, the worst head, the worst prompt."""
        per_head, per_prompt = self.recall.mean(1), self.recall.mean(0)
        worst, prompt = int(np.argmin(per_head)), int(np.argmin(per_prompt))
        return {
            "prompts": len(names),
            **spread(per_head, "recall"),
            "recall_p05": float(self.p05.mean()),
            "recall_last": float(self.last.mean()),
            "density": float(self.density.mean()),
            "worst_head": {
                "layer": self.heads[worst][0],
                "head": self.heads[worst][1],
                "recall": float(per_head[worst]),
            },
            "worst_prompt": {"prompt": names[prompt], "recall": float(per_prompt[prompt])},
        }


def spread(values: np.ndarray, name: str) -> dict[str, float]:
    """A statistic over heads (H,): the mean, the 5th percentile of heads, the worst head."""
    return {
        name: float(values.mean()),
        f"{name}_heads_p05": float(np.percentile(values, 5)),
        f"{name}_worst_head": float(values.min()),
    }


def relative_time(choice: Choice, outcome: Outcome, price: Price) -> float:
    """Mean over heads of the time relative to dense attention."""
    density = outcome.density.mean(1)
    times = [
        1.0 if theta is None else float(price(params, np.array([d]))[0])
        for (params, theta), d in zip(choice.values(), density, strict=True)
    ]
    return float(np.mean(times))


def promise(outcome: Outcome, statistic: Statistic, target: float, by: By) -> dict[str, Any]:
    """Who reaches the target on these prompts: the units it was promised to, and single heads."""
    value = outcome.statistic(statistic)
    heads = _shortfalls(
        [((layer, head), float(v)) for (layer, head), v in zip(outcome.heads, value, strict=True)], target
    )
    layers = sorted({layer for layer, _ in outcome.heads})
    of_layer = [np.array([h[0] == layer for h in outcome.heads]) for layer in layers]
    by_layer = [((layer, None), float(value[mask].mean())) for layer, mask in zip(layers, of_layer, strict=True)]
    units = {"head": heads, "layer": _shortfalls(by_layer, target)}.get(
        by, _shortfalls([((None, None), float(value.mean()))], target)
    )
    count = {"head": len(value), "layer": len(layers), "model": 1}[by]
    return {
        "statistic": statistic,
        "target": target,
        "pooled": float(value.mean()),
        "to": by,
        "units": count,
        "broken": len(units),
        "broken_share": len(units) / count,
        "broken_clearly": sum(x["shortfall"] > CLEAR for x in units),
        "shortfalls": units,
        "heads_missed": len(heads),
        "heads_missed_share": len(heads) / len(value),
    }


def _shortfalls(units: Sequence[tuple[tuple[int | None, int | None], float]], target: float) -> list[dict[str, Any]]:
    """Units below the target, worst first."""
    short = sorted((u for u in units if u[1] < target - _EXACT), key=lambda u: u[1])
    return [{"layer": at[0], "head": at[1], "value": v, "shortfall": target - v} for at, v in short]


# ----------------------------------------------------------------------------------------------------------------
# lengths


def lengths(
    problem: Problem,
    decide: Callable[[Problem], Choice],
    tokens: Sequence[int],
    held: Sequence[bool],
    target: float | None,
) -> list[dict[str, Any]] | None:
    """Settings fitted at one length, evaluated at every length; None if there is only one.

    Args:
        problem: of the whole calibration.
        decide: chooses for a problem.
        tokens, held: length of each prompt, and whether it is held out.
        target: the statistic's target, None with a budget.

    Returns:
        One object per pair of lengths with fitting prompts at the first: evaluated on held-out prompts where that
        length has any, else on fitting ones (`held_out` says which).
    """
    if len(set(tokens)) < 2:
        return None
    cells = []
    for fit in sorted(set(tokens)):
        rows = [i for i in problem.rows if tokens[i] == fit]
        if not rows:
            continue
        try:
            choice = decide(dataclasses.replace(problem, rows=rows))
        except InputError:  # a budget below this length's anchor regions
            continue
        for evaluate in sorted(set(tokens)):
            here = [i for i, n in enumerate(tokens) if n == evaluate]
            out = [i for i in here if held[i]]
            found = Outcome.of(choice, problem.curves, out or here)
            value = found.statistic(problem.statistic)
            cells.append(
                {
                    "fit_tokens": fit,
                    "tokens": evaluate,
                    "held_out": bool(out),
                    "value": float(value.mean()),
                    "density": float(found.density.mean()),
                    "heads_missed_share": None if target is None else float((value < target - _EXACT).mean()),
                }
            )
    return cells


# ----------------------------------------------------------------------------------------------------------------
# against one theta for the whole model


def against_one_theta(
    problem: Problem, choice: Choice, held: Sequence[int], by: By, target: float | None
) -> dict[str, Any]:
    """The choice against one theta for all heads at equal total density, there and over a range of budgets.

    Densities are equalised on the fitting prompts (one theta: the largest whose density does not exceed it); what it
    then gives on the held-out prompts is stated with the density there. One theta comes with the choice's own groups,
    and with each single kind of group, the best of which is named. No head of theirs falls back to dense.

    Returns:
        Values are of the problem's statistic. `at_choice`: rows of methods at the choice's density. `budgets`: rows per
        budget of per-head thetas by equal slope and of one theta. `targets`: rows per target, every head its own theta.
    """
    free = dataclasses.replace(problem, price=by_density)
    plain = dataclasses.replace(free, dense_above=1.0)

    def row(method: str, settings: Choice, theta: float | None = None) -> dict[str, Any]:
        return {"method": method, "theta": jsonable(theta), **_measured(problem, settings, held)}

    def uniform(settings: Choice, budget: float) -> Iterator[dict[str, Any]]:
        found = one_theta(plain, {h: s.params for h, s in settings.items()}, budget)
        if found is not None:
            yield row("one theta, same groups", found[1], found[0])
        singles = []
        for params in problem.curves:
            found = one_theta(plain, dict.fromkeys(settings, params), budget)
            if found is not None:
                singles.append({**row("one theta, one group", found[1], found[0]), "group": group_name(params)})
        best = max(singles, key=lambda x: float(x["fitted"]["value"]), default=None)
        yield from ({**x, "best": x is best} for x in singles)

    density = _measured(problem, choice, [])["fitted"]["density"]
    at_choice = [row("calibrated", choice)]
    if by == "head" and target is not None:  # a budget by heads is shared out by equal slope already
        at_choice.append(row("equal slope", spend(free, density, "head")))
    at_choice += uniform(choice, density)

    budgets = []
    for budget in _budgets(free):
        own = spend(free, budget, "head")
        budgets.append({"budget": budget, "rows": [row("equal slope", own), *uniform(own, budget)]})
    targets = [
        {"target": t, **row("per-head target", reach(free, t, "head"))}
        for t in sorted({*TARGETS, *([] if target is None else [target])})
    ]
    return {"density": density, "at_choice": at_choice, "budgets": budgets, "targets": targets}


def _measured(problem: Problem, choice: Choice, held: Sequence[int]) -> dict[str, Any]:
    """The statistic over heads and the density, on fitting and held-out prompts."""
    found: dict[str, Any] = {}
    for name, rows in (("fitted", problem.rows), ("held_out", held)):
        outcome = Outcome.of(choice, problem.curves, rows) if rows else None
        found[name] = outcome and {
            **spread(outcome.statistic(problem.statistic), "value"),
            "density": float(outcome.density.mean()),
        }
    return found


def _budgets(problem: Problem) -> list[float]:
    """Mean densities from the least possible to nearly dense, even in log."""
    least = problem.least
    if least >= 0.9:
        return []
    # Up by a grain: the least itself must be affordable whatever way its sum is rounded.
    return [float(b) for b in np.geomspace(least * (1 + 1e-9), 0.9, BUDGETS)]


def gain(comparison: Mapping[str, Any], part: str) -> dict[str, float] | None:
    """By how much the choice beats the better of the one-theta rows, in pooled mean, worst head and 5th percentile."""
    own = comparison["at_choice"][0][part]
    others = [r for r in comparison["at_choice"] if r["theta"] is not None and r[part] is not None]
    if own is None or not others:
        return None
    rival = max(others, key=lambda r: float(r["fitted"]["value"]))[part]
    return {key: own[key] - rival[key] for key in ("value", "value_worst_head", "value_heads_p05", "density")}
