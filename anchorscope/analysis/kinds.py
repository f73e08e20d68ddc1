"""The diagnosis that an analysis makes of its heads, in a folder of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from anchorscope.analysis.request import AnalysisPlan
from anchorscope.heads.request import HeadsPlan
from anchorscope.heads.run import FOLDER as DIAGNOSES
from anchorscope.runs.folder import Run
from anchorscope.runs.options import RunOptions
from anchorscope.runs.progress import Progress
from anchorscope.runs.values import jsonable
from anchorscope.shapes import fits

HEADS = "heads"


def diagnosis_of(
    plan: AnalysisPlan, run: Run, options: RunOptions, theta: float | None
) -> tuple[HeadsPlan, Path, RunOptions]:
    """The diagnosis of an analysis' heads: its plan, its folder, and how it is carried out.

    Args:
        plan: of the analysis.
        run: the analysis under way.
        options: of the analysis.
        theta: of the figures, nats; None in a shard, where only one that is named is known.
    """

    def kinds(event: Progress) -> None:
        options.report(replace(event, stage="kinds") if event.stage == "heads" else event)

    request = plan.request if plan.kinds else replace(plan.request, diagnose=True)
    found = plan.known_kinds() if options.shard is not None else plan.kinds or request.plan().kinds
    assert found is not None
    drawn: dict[str, Any] = {"figures": bool(run.asked["figures"]), "formats": run.pictures}
    how = replace(options, **drawn, overwrite=True, resume=True, progress=kinds)
    DIAGNOSES.reopen(run.path / HEADS, how.asked)  # the last word on an analysis counts for the diagnosis in it too
    return found if theta is None else _by_theta(plan, run, found, theta), run.path / HEADS, how


def _by_theta(plan: AnalysisPlan, run: Run, kinds: HeadsPlan, shown: float) -> HeadsPlan:
    """The diagnosis by the theta of the figures; one by another that is there and whole is not made again."""
    before = DIAGNOSES.read(run.path / HEADS) or {}
    for theta in plan.thetas:
        if fits(before, {"settings": {"theta": jsonable(theta)}}):
            there = replace(kinds.request, theta=theta).plan()
            if DIAGNOSES.holds(run.path / HEADS, there.identity):
                return there
    return replace(kinds.request, theta=shown).plan()
