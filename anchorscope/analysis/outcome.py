"""What report.json of an analysis holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anchorscope.analysis.request import AnalysisPlan
from anchorscope.analysis.tables import HeadLine, short_of_target, summarize
from anchorscope.figure_theta import choose_figure_theta
from anchorscope.runs.environment import versions
from anchorscope.runs.units import prompt_facts

REPORT_VERSION = 1


def report_json(
    plan: AnalysisPlan, lines: Sequence[HeadLine], started: str, figure_theta: float | None
) -> dict[str, Any]:
    """What report.json holds.

    Args:
        plan: of the analysis.
        lines: every head.
        started: when the (first) run began, ISO 8601.
        figure_theta: the theta that the user named for the figures, if any.
    """
    overall = summarize(lines, plan.thetas)
    recalls = [item["recall_mean"] for item in overall]
    shown = choose_figure_theta(plan.thetas, recalls, plan.target_recall, figure_theta)

    def only(**fixed: object) -> list[dict[str, Any]]:
        chosen = [x for x in lines if all(getattr(x, k) == v for k, v in fixed.items())]
        return summarize(chosen, plan.thetas)

    return {
        "format": "anchorscope-report",
        "version": REPORT_VERSION,
        "started": started,
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": prompt_facts(plan.dump, plan.settings["prompts"]),
        "settings": plan.settings,
        "versions": versions(),
        "hardware": plan.backend.hardware,
        "warnings": list(plan.warnings),
        "figure_theta": shown.as_json(),
        "overall": overall,
        "by_prompt": [{"prompt": p, "thetas": only(prompt=p)} for p in plan.settings["prompts"]],
        "by_layer": [{"layer": i, "thetas": only(layer=i)} for i in plan.settings["layers"]],
        "target": {
            "recall": plan.target_recall,
            "heads": len(lines),
            "reached": sum(bool(x.recall[shown.index] >= plan.target_recall) for x in lines),
            "density_needed_mean": _mean_or_none([x.density_needed for x in lines]),
            "oracle_density_needed_mean": _mean_or_none([x.oracle_density_needed for x in lines]),
            "short": short_of_target(lines, shown.index, plan.target_recall),
        },
    }


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    return float(np.mean([v for v in values if v is not None])) if values and None not in values else None
