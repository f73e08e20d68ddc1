"""`compare`: a dump and a line-up of methods in, one table and its figures out; resumable, one head at a time.

Every head is scored with all methods and saved under scores/; tables and figures are made from those files alone. So
an interrupted run continues where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from anchorscope import views
from anchorscope.compare.request import ComparePlan, CompareRequest
from anchorscope.compare.score import score_lineup
from anchorscope.compare.tables import COLUMNS, RECALLS, Point, methods_rows, needed_table, winners
from anchorscope.errors import DumpError
from anchorscope.files import csv_text, human_bytes, member, read_part
from anchorscope.methods import Contender, Head, known_methods
from anchorscope.notebook import InNotebook
from anchorscope.pictures import picture_patterns, pictures_in
from anchorscope.ranges import working_dtype
from anchorscope.runs.environment import hardware_name, versions
from anchorscope.runs.executors import Context
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import Command, Parts, Summary, run
from anchorscope.runs.recipe import Kinds
from anchorscope.runs.request import planned, split, takes
from anchorscope.runs.sources import Source
from anchorscope.runs.units import HeadUnit, prompt_facts
from anchorscope.runs.values import jsonable
from anchorscope.shapes import NUMBER, fits
from anchorscope.shown import counted

REPORT = "compare.json"
TABLE = "methods.csv"
SCORES = "scores"
FIGURES = "figures"
VERSION = 1
FOLDER = RunFolder(
    what="a comparison",
    command="compare",
    format="anchorscope-compare-run",
    version=VERSION,
    state="run.json",
    report=REPORT,
    tables=(TABLE,),
    parts=((SCORES, "*.json"), *picture_patterns(FIGURES)),
    kept=("head", f"{SCORES}/*.json"),
)

_POINT = (str, int, int, str, str, *[NUMBER] * (len(COLUMNS) - 5))  # a row of a part
_REPORT_SHAPE = {"format": "anchorscope-compare", "dump": {"identity": str}}


@dataclass(frozen=True, repr=False)
class Comparison(InNotebook):
    """A finished comparison.

    Attributes:
        path: the output folder.
        report: what compare.json holds.
        points: every measured point, in the order of methods.csv.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any]
    points: tuple[Point, ...] = field(repr=False)
    figures: tuple[Path, ...] = ()
    look = views.comparison


@takes(CompareRequest, None)
def plan_compare(dump: Source | Path | str, **request: Any) -> ComparePlan:
    """Check a request and say what it will take: `CompareRequest(dump, ...).plan()`."""
    return CompareRequest(dump, **request).plan()


@takes(CompareRequest)
def compare(
    dump: Source | Path | str, out: Path | str, *, plan: ComparePlan | None = None, **options: Any
) -> Comparison:
    """Score every method of a line-up on every chosen head of a dump.

    Args:
        dump: a dump folder, an open dump, or a `anchorscope.ModelSource`, whose layers are measured as it runs.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        plan: a plan made beforehand; what it decides must then not be given again.
        **options: the fields of `CompareRequest` and of `RunOptions`.

    Returns:
        The finished comparison. `out` then holds methods.csv, compare.json, scores/ and figures/.

    Raises:
        InputError, DumpError, MissingBackendError: see `CompareRequest.plan`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    how, asked = split(options)
    if plan is None:
        FOLDER.refuse_early(Path(out), how.asked, **how.replacing)
    done = run(CompareCommand(planned(CompareRequest, plan, dump, asked), how), out)
    return Comparison(done.path, done.report, done.summary.value, done.figures)


class CompareCommand(Command[HeadUnit, list[Point]]):
    """See `anchorscope.runs.life.Command`."""

    folder: ClassVar[RunFolder] = FOLDER
    plan: ComparePlan

    @classmethod
    def kinds(cls) -> Kinds:
        return {"contender": Contender, **known_methods()}

    def measure(self, unit: HeadUnit, context: Context) -> dict[str, Any]:
        entry = unit.entry
        q, k, v = context.head(unit.head)
        dtype = working_dtype(q, k, v, entry.scale, entry.softcap)
        head = Head(q, k, scale=entry.scale, window=entry.window, softcap=entry.softcap, dtype=dtype)
        points = []
        for contender, value, result in score_lineup(head, v, self.plan.lineup, cancelled=context.stop.is_set):
            numbers = [
                float(value),
                result.recall,
                result.recall_p05,
                result.recall_last,
                result.density,
                result.output_error,
                result.identify_cost,
            ]
            labels = [entry.prompt, entry.layer, unit.head, contender.label, contender.method.parameter]
            points.append([*labels, *(jsonable(x) if isinstance(x, float) else x for x in numbers)])
        return {"format": "anchorscope-scores", "version": VERSION, "dump": self.plan.dump.identity, "points": points}

    def read(self, unit: HeadUnit, saved: dict[str, Any]) -> list[Point] | None:
        points = _points(saved, self.plan.dump.identity)
        whole = points is not None and len(points) == sum(len(c.sweep) for c in self.plan.lineup)
        return points if whole else None

    def summarize(self, parts: Parts[HeadUnit, list[Point]], run: Run) -> Summary:
        points = tuple(point for part in parts for point in part)
        table = csv_text(COLUMNS, methods_rows(points))
        return Summary(_report(self.plan, run.state["started"], points), {TABLE: table}, points)

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        from anchorscope.compare.figures import draw_all

        return draw_all(summary.value, run.path / FIGURES, summary.report, formats=run.pictures)

    def out_of_memory(self) -> str:
        longest = max(u.entry.tokens for u in self.plan.units)
        each = human_bytes(self.plan.memory / self.plan.workers)
        return (
            f"out of memory on {self.plan.device}: one head of {counted(longest, 'token')} needs about"
            f" {each}; use --device cpu, fewer methods or a shorter capture"
        )


def load_comparison(out: Path | str) -> Comparison:
    """A finished comparison, read again from its folder.

    Raises:
        DumpError: the folder holds none, or one that is damaged.
    """
    path = Path(out)
    report, state = FOLDER.load(path, _REPORT_SHAPE, {"scores": [str]})
    points: list[Point] = []
    for name in state["scores"]:
        file = member(path / SCORES, name, ".json")
        found = None if file is None else _points(read_part(file), report["dump"]["identity"])
        if found is None:
            raise DumpError(f"{path / SCORES / name} is missing or damaged: run the comparison again")
        points.extend(found)
    return Comparison(path, report, tuple(points), pictures_in(path / FIGURES))


def _points(saved: dict[str, Any] | None, identity: str) -> list[Point] | None:
    """The points of a part, or None if it is of another dump or not of the right shape."""
    if saved is None or not fits(saved, {"format": "anchorscope-scores", "dump": identity, "points": [list]}):
        return None
    if not all(len(row) == len(_POINT) and all(map(fits, row, _POINT)) for row in saved["points"]):
        return None
    return [Point(*row[:5], *(math.nan if x is None else float(x) for x in row[5:])) for row in saved["points"]]


def _report(plan: ComparePlan, started: str, points: Sequence[Point]) -> dict[str, Any]:
    """What compare.json holds."""
    labels = [c.label for c in plan.lineup]
    runnable = [c.label for c in plan.lineup if not c.method.oracle]
    recalls = sorted({*RECALLS, plan.target_recall})
    best = winners(points, runnable, plan.target_recall)
    return {
        "format": "anchorscope-compare",
        "version": VERSION,
        "started": started,
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": prompt_facts(plan.dump, plan.settings["prompts"]),
        "settings": plan.settings,
        "versions": versions(),
        "hardware": hardware_name(plan.device),
        "warnings": list(plan.warnings),
        "heads": len(plan.units),
        "needed": needed_table(points, labels, recalls),
        "best": [
            {"prompt": prompt, "layer": layer, "head": head, "method": method}
            for (prompt, layer, head), method in best.items()
        ],
    }
