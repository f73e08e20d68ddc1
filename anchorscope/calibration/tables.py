"""calibration.csv and the per-head part of calibration.json. Column names are API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anchorscope.calibration.choose import Choice
from anchorscope.calibration.curves import Statistic
from anchorscope.calibration.outcome import Outcome
from anchorscope.runs.values import jsonable, number

MEASURES = ("recall", "density", "p05", "last")
COLUMNS = (
    "layer",
    "head",
    "block",
    "step",
    "init",
    "lookback",
    "theta",
    *(f"fitted_{name}" for name in MEASURES),
    "fitted_worst_prompt_recall",
    *(f"held_out_{name}" for name in MEASURES),
    "held_out_worst_prompt_recall",
    "shortfall",
    "kept",
)


def aim(settings: dict[str, Any]) -> str:
    """What was asked for, in words: `mean recall 0.95 in every head`."""
    if settings["target"] is None:
        return f"density {settings['budget_density']:g} on average, thetas by {settings['by']}"
    where = {"head": "every head", "layer": "every layer's mean", "model": "the mean over all heads"}[settings["by"]]
    return f"{settings['statistic']} recall {settings['target']:g} in {where}"


def head_rows(
    choice: Choice, fitted: Outcome, held_out: Outcome | None, statistic: Statistic, target: float | None
) -> list[dict[str, Any]]:
    """One object per head with the columns of calibration.csv; None where nothing was held out or promised.

    `theta` is a number, "inf", "-inf" or "dense"; `shortfall` and `kept` judge the held-out statistic of the head.
    """
    promised = held_out.statistic(statistic) if held_out is not None else None
    rows = []
    for i, ((layer, head), (params, theta)) in enumerate(choice.items()):
        row: dict[str, Any] = {
            "layer": layer,
            "head": head,
            "block": params.block,
            "step": params.step,
            "init": params.init_tokens,
            "lookback": params.lookback_tokens,
            "theta": "dense" if theta is None else jsonable(theta),
        }
        for part, outcome in (("fitted", fitted), ("held_out", held_out)):
            for name in MEASURES:
                row[f"{part}_{name}"] = None if outcome is None else float(getattr(outcome, name)[i].mean())
            row[f"{part}_worst_prompt_recall"] = None if outcome is None else float(outcome.recall[i].min())
        short = None if promised is None or target is None else max(target - float(promised[i]), 0.0)
        short = 0.0 if short is not None and short < 1e-9 else short
        rows.append({**row, "shortfall": short, "kept": None if short is None else short == 0})
    return rows


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of calibration.csv."""
    return tuple(_cell(row[name]) for name in COLUMNS)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return number(value) if isinstance(value, float) and not math.isnan(value) else str(value)


def layer_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per layer: its groups, range of thetas, dense heads, and means over heads."""
    out = []
    for layer in sorted({r["layer"] for r in rows}):
        mine = [r for r in rows if r["layer"] == layer]
        thetas = [float(r["theta"]) for r in mine if r["theta"] != "dense"]
        held = mine[0]["held_out_recall"] is not None
        judged = mine[0]["kept"] is not None
        out.append(
            {
                "layer": layer,
                "block": mine[0]["block"],
                "step": mine[0]["step"],
                "theta_min": jsonable(min(thetas)) if thetas else None,
                "theta_max": jsonable(max(thetas)) if thetas else None,
                "heads": len(mine),
                "dense_heads": len(mine) - len(thetas),
                "fitted_recall": _mean(mine, "fitted_recall"),
                "fitted_density": _mean(mine, "fitted_density"),
                "held_out_recall": _mean(mine, "held_out_recall") if held else None,
                "held_out_density": _mean(mine, "held_out_density") if held else None,
                "heads_missed": sum(not r["kept"] for r in mine) if judged else None,
            }
        )
    return out


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sum(float(r[name]) for r in rows) / len(rows)
