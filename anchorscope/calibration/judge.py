"""From curves to a choice, and what became of its promise on the prompts that were held out."""

from __future__ import annotations

from typing import Any

import numpy as np

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.calibration.choose import By, Choice, Problem, reach, spend
from anchorscope.calibration.costs import by_density
from anchorscope.calibration.curves import HeadCurves, HeadIndex, PromptCurve, Statistic, common_grid
from anchorscope.calibration.outcome import Outcome, against_one_theta, gain, lengths, promise, relative_time
from anchorscope.calibration.prompts import labels
from anchorscope.calibration.request import CalibrationPlan
from anchorscope.calibration.sources import Measured, Sources
from anchorscope.calibration.tables import head_rows, layer_rows
from anchorscope.params import AnchorParams
from anchorscope.runs.environment import versions
from anchorscope.shown import counted

VERSION = 1
FEW = 8  # finite thetas below which p05 and last are chosen coarsely


def gather(sources: Sources, measured: Measured) -> dict[AnchorParams, dict[HeadIndex, HeadCurves]]:
    """Curves per kind of group and head, on the thetas common to all."""
    wanted: dict[tuple[AnchorParams, HeadIndex], list[PromptCurve]] = {
        (params, head): [measured[p, params, head] for p in sources.prompts]
        for params in sources.groups
        for head in sources.heads
    }
    grid = common_grid(c for curves in wanted.values() for c in curves)
    return {
        params: {head: HeadCurves.of(*head, params, wanted[params, head], grid) for head in sources.heads}
        for params in sources.groups
    }


def choose_and_judge(
    plan: CalibrationPlan, curves: dict[AnchorParams, dict[HeadIndex, HeadCurves]], started: str
) -> tuple[AnchorConfig, dict[str, Any], list[dict[str, Any]]]:
    """Choose groups and thetas, judge them, and write it all down: the configuration, the report, a row per head."""
    s, sources = plan.settings, plan.sources
    statistic: Statistic = s["statistic"]
    by: By = s["by"]
    target: float | None = s["target"]
    names, tokens = labels(sources.prompts), [p.tokens for p in sources.prompts]
    fit = [i for i, held in enumerate(plan.held) if not held]
    held = [i for i, held in enumerate(plan.held) if held]
    timed = plan.costs.price(sources.groups, float(np.mean(tokens))) if plan.costs else None
    price = timed if timed and s["minimise"] == "time" else by_density
    problem = Problem(curves, fit, statistic, price, s["dense_above"])

    def decide(p: Problem) -> Choice:
        return spend(p, s["budget_density"], by) if target is None else reach(p, target, by)

    choice = decide(problem)
    fitted = Outcome.of(choice, curves, fit)
    held_out = Outcome.of(choice, curves, held) if held else None

    def summary(outcome: Outcome, rows: list[int]) -> dict[str, Any]:
        spent = timed and relative_time(choice, outcome, timed)
        return {**outcome.summary([names[i] for i in rows]), "time": spent}

    rows = head_rows(choice, fitted, held_out, statistic, target)
    comparison = against_one_theta(problem, choice, held, by, target)
    report = {
        "format": "anchorscope-calibration",
        "version": VERSION,
        "started": started,
        "versions": versions(),
        "settings": s,
        "model": None if sources.model is None else dict(sources.model),
        "prompts": [
            {"name": name, "tokens": p.tokens, "sha256": p.sha256, "dump": p.dump, "held_out": out}
            for name, p, out in zip(names, sources.prompts, plan.held, strict=True)
        ],
        "warnings": [*plan.warnings, *_grid_warnings(statistic, curves)],
        "fitted": summary(fitted, fit),
        "held_out": held_out and summary(held_out, held),
        "promise": promise(held_out, statistic, target, by) if held_out is not None and target is not None else None,
        "dense_heads": sum(setting.theta is None for setting in choice.values()),
        "layers": layer_rows(rows),
        "heads": rows,
        "lengths": lengths(problem, decide, tokens, plan.held, target),
        "against_one_theta": {
            **comparison,
            "gain": {part: gain(comparison, part) for part in ("fitted", "held_out")},
        },
    }
    return _config(sources, choice, report), report, rows


def _grid_warnings(statistic: Statistic, curves: dict[AnchorParams, dict[HeadIndex, HeadCurves]]) -> list[str]:
    finest = max(int(np.isfinite(c.theta).sum()) for heads in curves.values() for c in heads.values())
    if statistic == "mean" or finest >= FEW:
        return []
    return [
        f"{statistic} is known at {counted(finest, 'finite theta')} only, so thetas are coarse: analyze with"
        f" --theta 0:16:0.25"
    ]


def _config(sources: Sources, choice: Choice, report: dict[str, Any]) -> AnchorConfig:
    """The runnable part; heads of the model that no source holds run dense."""
    width = (sources.model or {}).get("query_heads")
    layers = []
    for layer in sources.layers:
        mine = {head: setting for (i, head), setting in choice.items() if i == layer}
        count = max([*mine, -1]) + 1
        if isinstance(width, int):
            count = max(count, width)
        thetas = tuple(mine[h].theta if h in mine else None for h in range(count))
        layers.append(LayerAnchors(layer, next(iter(mine.values())).params, thetas))
    found = {key: report[key] for key in ("settings", "prompts", "fitted", "held_out", "versions")}
    judged = report["promise"] and {k: v for k, v in report["promise"].items() if k != "shortfalls"}
    return AnchorConfig(tuple(layers), sources.model, {"made_by": "calibrate", **found, "promise": judged})
