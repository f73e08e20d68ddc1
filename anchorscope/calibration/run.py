"""`calibrate`: dumps of a few prompts in, anchors.json out, with its promise checked on prompts it never saw.

Dumps are analyzed first, once per kind of group, into OUT/analysis/; these folders are ordinary analyses, resumable and
kept, so another target needs no new measurement. Everything after that is numpy on saved curves and takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from anchorscope import views
from anchorscope.analysis.run import FOLDER as ANALYSES
from anchorscope.analysis.run import PROFILES, AnalyzeCommand, analyze_plan, is_whole
from anchorscope.anchors import AnchorConfig
from anchorscope.calibration.judge import choose_and_judge, gather
from anchorscope.calibration.request import CalibrateRequest, CalibrationPlan
from anchorscope.calibration.sources import AnalysisUnit, Measured, read_curves
from anchorscope.calibration.tables import COLUMNS, table_row
from anchorscope.errors import DumpError
from anchorscope.files import csv_text
from anchorscope.notebook import InNotebook
from anchorscope.pictures import picture_patterns
from anchorscope.runs.executors import Context, Executor, InTurn
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import BaseCommand, Parts, RunOptions, Summary, run
from anchorscope.runs.progress import Progress, ProgressCallback
from anchorscope.runs.recipe import GROUPS, Kinds
from anchorscope.runs.request import planned, split, takes
from anchorscope.runs.sources import InFlight, Source

ANCHORS = "anchors.json"
REPORT = "calibration.json"
TABLE = "calibration.csv"
ANALYSIS = "analysis"
FIGURES = "figures"
VERSION = 1

FOLDER = RunFolder(
    what="a calibration",
    command="calibrate",
    format="anchorscope-calibration-run",
    version=VERSION,
    state="run.json",
    report=REPORT,
    tables=(ANCHORS, TABLE),
    # analyses stay: another target uses them again
    parts=picture_patterns(FIGURES),
    kept=("head", f"{ANALYSIS}/*/profile/*.safetensors"),
)


@dataclass(frozen=True, repr=False)
class Calibration(InNotebook):
    """A finished calibration.

    Attributes:
        path: the output folder.
        config: what anchors.json holds.
        report: what calibration.json holds.
        figures: the pictures written.
    """

    path: Path
    config: AnchorConfig
    report: dict[str, Any] = field(repr=False)
    figures: tuple[Path, ...] = ()
    look = views.calibration


@takes(CalibrateRequest, None)
def plan_calibration(sources: Sequence[Source | Path | str] | Source | Path | str, **request: Any) -> CalibrationPlan:
    """Check a request and say what it will take: `CalibrateRequest(sources, ...).plan()`."""
    return CalibrateRequest(sources, **request).plan()


@takes(CalibrateRequest)
def calibrate(
    sources: Sequence[Source | Path | str] | Source | Path | str,
    out: Path | str,
    *,
    plan: CalibrationPlan | None = None,
    **options: Any,
) -> Calibration:
    """Choose the kind of group and the theta of every head, and check them on prompts that were held out.

    Args:
        sources: dump folders and finished analyses of one model, or a `anchorscope.ModelSource`, which then runs once
            for all kinds of groups.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
            With `overwrite`, analyses in it are used again where they fit.
        plan: a plan made beforehand; what it decides must then not be given again.
        **options: the fields of `CalibrateRequest` and of `RunOptions`.

    Returns:
        The calibration. `out` then holds anchors.json, calibration.json, calibration.csv, figures/ and analysis/.

    Raises:
        InputError, DumpError, MissingBackendError: see `CalibrateRequest.plan`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    how, asked = split(options)
    if plan is None:
        FOLDER.refuse_early(Path(out), how.asked, **how.replacing)
    done = run(CalibrateCommand(planned(CalibrateRequest, plan, sources, asked), how), out)
    return Calibration(done.path, done.summary.value, done.report, done.figures)


class CalibrateCommand(BaseCommand[AnalysisUnit, Measured]):
    """See `anchorscope.runs.life.BaseCommand`. A unit is an analysis, and its part the folder of that."""

    folder: ClassVar[RunFolder] = FOLDER
    known: ClassVar[Kinds | None] = GROUPS
    plan: CalibrationPlan

    def __init__(self, plan: CalibrationPlan, options: RunOptions | None = None) -> None:
        super().__init__(plan, options)
        self._curves: dict[str, Measured] = {}  # reading thousands of profiles once is enough

    def workforce(self) -> Executor:
        return InTurn(self.plan.device)  # the heads of each analysis are shared out, see `make`

    def files(self, root: Path, unit: AnalysisUnit) -> tuple[Path, ...]:
        return ()  # the analysis itself says what it measures again

    def pieces(self) -> int:
        return sum(len(self._analysis(unit).share()) for unit in self.plan.units)

    def make(self, root: Path, unit: AnalysisUnit, context: Context) -> None:
        done = 0

        def forward(event: Progress) -> None:
            nonlocal done
            if event.stage == "heads":
                context.tick(event.work - done, f"{unit.label} {event.detail}".strip())
                done = event.work

        analyze_plan(unit.analysis, root / ANALYSIS / unit.folder, self._how(forward))

    def companions(self, run: Run) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        return [
            (AnalyzeCommand(unit.analysis, self._how()), run.path / ANALYSIS / unit.folder)
            for unit in self.plan.units
            if isinstance(unit.dump, InFlight) and not self.holds(run.path, unit)
        ]

    def _how(self, progress: ProgressCallback | None = None) -> RunOptions:
        """How analyses are carried out."""
        own = self.options
        how = RunOptions(figures=False, overwrite=own.overwrite, resume=True, progress=progress)
        return replace(how, notify=own.notify, executor=own.executor, shard=own.shard)

    def share(self) -> tuple[AnalysisUnit, ...]:
        for unit in self.plan.units if self.options.shard is not None else ():
            self._analysis(unit).share()  # each analysis is shared out
        return self.plan.units

    def nested(self, root: Path) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        return [(self._analysis(unit), root / ANALYSIS / unit.folder) for unit in self.plan.units]

    def _analysis(self, unit: AnalysisUnit) -> AnalyzeCommand:
        return AnalyzeCommand(unit.analysis, self.options)

    def holds(self, root: Path, unit: AnalysisUnit) -> bool:
        folder = root / ANALYSIS / unit.folder
        return self.load(root, unit) is not None and all(map(is_whole, sorted((folder / PROFILES).iterdir())))

    def load(self, root: Path, unit: AnalysisUnit) -> Measured | None:
        """The curves of a finished analysis."""
        folder = root / ANALYSIS / unit.folder
        if unit.stem in self._curves:
            return self._curves[unit.stem]
        if not ANALYSES.holds(folder, unit.analysis.identity):
            return None
        prompts = {(p.dump, p.name): p for p in self.plan.sources.prompts}
        try:
            found = {key: curve for key, curve, _ in read_curves(folder, prompts, self.plan.settings["statistic"])}
        except DumpError:
            return None
        self._curves[unit.stem] = found
        return found

    def summarize(self, parts: Parts[AnalysisUnit, Measured], run: Run) -> Summary:
        measured = dict(self.plan.sources.measured)
        for part in parts:
            measured.update(part)
        self.options.report(Progress("choosing", 0, 1))
        config, report, rows = choose_and_judge(self.plan, gather(self.plan.sources, measured), run.state["started"])
        self.options.report(Progress("choosing", 1, 1))
        tables = {ANCHORS: config.to_text(), TABLE: csv_text(COLUMNS, map(table_row, rows))}
        return Summary(report, tables, config)

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        from anchorscope.calibration.figures import draw_all

        return draw_all(summary.report, run.path / FIGURES, formats=run.pictures)
