"""What kind of head each one is, as a part of an analysis: OUT/heads, by the selection that its figures show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.heads.run import Diagnosis, clear_diagnosis, diagnose, plan_heads
from anchorscope.heads.run import Plan as DiagnosisPlan
from anchorscope.runs.jobs import Progress, ProgressCallback

if TYPE_CHECKING:
    from anchorscope.analysis.run import Plan

HEADS = "heads"  # folder inside OUT


def plan_diagnosis(plan: Plan) -> DiagnosisPlan:
    """The diagnosis of the heads that an analysis measures.

    Raises:
        InputError, DumpError, MissingBackendError: see `plan_heads`.
    """
    return plan_heads(
        plan.dump,
        params=plan.params,
        theta=plan.thetas[0],
        device=str(plan.backend.device),
        **{key: plan.settings[key] for key in ("layers", "heads", "prompts")},
    )


def diagnose_analysis(
    out: Path,
    plan: Plan,
    asked: Mapping[str, Any],
    progress: ProgressCallback,
    notify: Callable[[str], None] | None = None,
) -> Diagnosis | None:
    """Diagnose into a folder of the analysis; None, and nothing of an earlier run left there, if that was not asked.

    A diagnosis that is there already is not measured again.
    """
    if not asked["diagnose"]:
        clear_diagnosis(out / HEADS)
        return None

    def report(event: Progress) -> None:
        progress(replace(event, stage="kinds") if event.stage == "heads" else event)

    return diagnose(
        plan.dump,
        out / HEADS,
        plan=plan_diagnosis(plan),
        figures=bool(asked["figures"]),
        overwrite=True,
        resume=True,
        progress=report,
        notify=notify,
    )


__all__ = ["HEADS", "Diagnosis", "diagnose_analysis", "plan_diagnosis"]
