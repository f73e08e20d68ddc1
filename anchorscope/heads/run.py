"""`heads`: a dump in, one table of diagnostics and its figures out; resumable, one layer of one prompt at a time.

A layer is saved under parts/ once all its heads are measured; table, report and figures are made from those files
alone, so an interrupted run continues where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from anchorscope import views
from anchorscope.dumps import Entry
from anchorscope.errors import DumpError
from anchorscope.files import csv_text, human_bytes, member, read_part
from anchorscope.heads import diagnostics
from anchorscope.heads.diagnostics import HeadDiagnostics, diagnose_head
from anchorscope.heads.layer import Rule, diagnose_layer, suits
from anchorscope.heads.request import HeadsPlan, HeadsRequest, LayerUnit
from anchorscope.heads.rows import layer_rows
from anchorscope.heads.stripes import HeadStripes, head_stripes
from anchorscope.heads.tables import (
    COLUMNS,
    ROW_SHAPE,
    HeadRow,
    TokenText,
    report_row,
    row_from_json,
    summarize,
    table_row,
)
from anchorscope.locks import folder_lock
from anchorscope.methods import Head
from anchorscope.notebook import InNotebook
from anchorscope.pictures import picture_patterns, pictures_in
from anchorscope.runs.environment import hardware_name, versions
from anchorscope.runs.executors import Context, Executor, InTurn, Threads, Tick, Work, no_tick
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import Command, Parts, RunOptions, Summary, run
from anchorscope.runs.recipe import GROUPS, Kinds
from anchorscope.runs.request import planned, split, takes
from anchorscope.runs.sources import Source
from anchorscope.runs.units import HeadUnit, prompt_facts
from anchorscope.shapes import fits
from anchorscope.shown import counted
from anchorscope.vocabulary import Vocabulary, as_vocabulary

REPORT = "heads.json"
TABLE = "diagnostics.csv"
PARTS = "parts"
FIGURES = "figures"
VERSION = 1
FOLDER = RunFolder(
    what="a diagnosis of heads",
    command="heads",
    format="anchorscope-heads-run",
    version=VERSION,
    state="run.json",
    report=REPORT,
    tables=(TABLE,),
    parts=((PARTS, "prompt*-layer*.json"), *picture_patterns(FIGURES)),
    kept=("layer", f"{PARTS}/prompt*-layer*.json"),
)

# Everything a reader needs to know about the definitions, as heads.json states it.
DEFINITIONS: dict[str, Any] = {
    "streaming_window": {"sinks": diagnostics.STREAM_SINKS, "recent": diagnostics.STREAM_RECENT},
    "classes": {"streaming_from": diagnostics.STREAMING, "retrieval_below": diagnostics.RETRIEVAL},
    "hidden_sink": {
        "from_position": diagnostics.HIDDEN_FROM,
        "mass": diagnostics.HIDDEN_MASS,
        "queries": f"N/{diagnostics.HIDDEN_QUERIES}, at least {diagnostics.STREAM_RECENT}",
    },
    "influence": {"distances": list(diagnostics.HORIZON), "tokens": diagnostics.INFLUENTIAL},
    "heaviest": f"1/{diagnostics.TOP_SHARE} of columns, diagonals, blocks of {diagnostics.TILE}",
}


@dataclass(frozen=True, repr=False)
class Diagnosis(InNotebook):
    """A finished run.

    Attributes:
        path: the output folder.
        report: what heads.json holds.
        rows: every head, in the order of diagnostics.csv.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any]
    rows: tuple[HeadRow, ...] = field(repr=False)
    figures: tuple[Path, ...] = ()
    look = views.diagnosis


@takes(HeadsRequest, None)
def plan_heads(dump: Source | Path | str, **request: Any) -> HeadsPlan:
    """Check a request and say what it will take: `HeadsRequest(dump, ...).plan()`."""
    return HeadsRequest(dump, **request).plan()


@takes(HeadsRequest)
def diagnose(dump: Source | Path | str, out: Path | str, *, plan: HeadsPlan | None = None, **options: Any) -> Diagnosis:
    """Diagnose every chosen head of a dump.

    Args:
        dump: a dump folder, an open dump, or a `anchorscope.ModelSource`, whose layers are measured as it runs.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        plan: a plan made beforehand; what it decides must then not be given again.
        **options: the fields of `HeadsRequest` and of `RunOptions`.

    Returns:
        The finished run. `out` then holds diagnostics.csv, heads.json, parts/ and figures/.

    Raises:
        InputError, DumpError, MissingBackendError: see `HeadsRequest.plan`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    how, asked = split(options)
    if plan is None:
        FOLDER.refuse_early(Path(out), asked_of(how.asked, asked.get("pieces")), **how.replacing)
    return diagnose_plan(planned(HeadsRequest, plan, dump, asked, late=("pieces",)), out, how)


def asked_of(pictures: Mapping[str, Any], pieces: Vocabulary | Sequence[str] | None = None) -> dict[str, Any]:
    """What is to be made of the measurements, as the folder's state holds it; `pictures` of `asked_pictures`."""
    return {**pictures, "tokens": None if pieces is None else _digest(pieces)}


def diagnose_plan(
    plan: HeadsPlan,
    out: Path | str,
    options: RunOptions,
    given: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Diagnosis:
    """Carry out a plan; see `diagnose`. `given` are rows that need no measuring (`Beside.rows`)."""
    done = run(HeadsCommand(plan, options, given), out)
    return Diagnosis(done.path, done.report, done.summary.value, done.figures)


class HeadsCommand(Command[LayerUnit, list[HeadRow]]):
    """See `anchorscope.runs.life.Command`. The heads of a layer are measured in threads, one layer after another.

    An executor may measure several layers at a time: what the layer before selected is then selected again where it is
    not at hand.
    """

    folder: ClassVar[RunFolder] = FOLDER
    known: ClassVar[Kinds | None] = GROUPS
    plan: HeadsPlan

    def __init__(
        self,
        plan: HeadsPlan,
        options: RunOptions | None = None,
        given: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        """`given`: the rows of some units by name, from `Beside`: these are not measured again."""
        super().__init__(plan, options)
        self._given = given or {}
        self._last: tuple[Entry | None, dict[int, HeadStripes]] = (None, {})  # what the layer before selected

    def executor(self) -> Executor:
        return InTurn(self.plan.device)

    def measure(self, unit: LayerUnit, context: Context) -> dict[str, Any]:
        rows = self._given.get(unit.name)
        if rows is None:
            previous = self._previous(unit, context)
            found, selections = self._go_through(unit.jobs, unit.heads, context, context.tick)
            self._last = unit.entry, selections
            rows = layer_rows(unit, found, selections, previous)
        return {
            "format": "anchorscope-heads-part",
            "version": VERSION,
            "dump": self.plan.dump.identity,
            "heads": rows,
        }

    def look(self, unit: LayerUnit, context: Context) -> None:
        self._last = unit.previous, self._previous(unit, context)

    def _previous(self, unit: LayerUnit, context: Context) -> dict[int, HeadStripes]:
        """Stripes of the same heads one layer before, selected again unless they are at hand."""
        if unit.previous is None:
            return {}
        entry, selections = self._last
        if entry == unit.previous and set(unit.compared) <= set(selections):
            return selections
        jobs = [HeadUnit(unit.prompt_index, unit.previous, h) for h in unit.compared]
        return self._go_through(jobs, (), context)[1]

    def _go_through(
        self, jobs: Sequence[HeadUnit], heads: Sequence[int], context: Context, tick: Tick = no_tick
    ) -> tuple[dict[int, HeadDiagnostics], dict[int, HeadStripes]]:
        """Diagnostics of `heads` and stripes of all jobs, by head."""
        found: dict[int, HeadDiagnostics] = {}
        selections: dict[int, HeadStripes] = {}

        def measure(job: HeadUnit, within: Context) -> None:
            within.check()
            layer = within.tensors
            if layer is not None and suits(layer.q, within.device):
                if job.head not in selections:  # all of the layer with the first
                    self._together(job.entry, heads, within, found, selections)
                return
            q, k, _ = within.head(job.head)
            found_one, selections[job.head] = self._alone(job.entry, q, k, job.head in heads, within)
            if found_one is not None:
                found[job.head] = found_one

        work = Work(jobs, measure, lambda job: tick(job.work, job.label), self.plan.source)
        Threads(context.device, self.plan.workers).run(work)
        return found, selections

    def _alone(
        self, entry: Entry, q: Tensor, k: Tensor, diagnosed: bool, context: Context
    ) -> tuple[HeadDiagnostics | None, HeadStripes]:
        """One head, q and k (N, d), in plain torch."""
        head = Head(q, k, scale=entry.scale, window=entry.window, softcap=entry.softcap)
        found = diagnose_head(head, cancelled=context.stop.is_set) if diagnosed else None
        return found, head_stripes(head, self.plan.params, self.plan.theta)

    def _together(
        self,
        entry: Entry,
        heads: Sequence[int],
        context: Context,
        found: dict[int, HeadDiagnostics],
        selections: dict[int, HeadStripes],
    ) -> None:
        """The heads of a layer on a GPU, added to `found` and `selections`."""
        layer = context.tensors
        assert layer is not None
        each = diagnose_layer(
            layer,
            Rule(entry.scale, entry.window, entry.softcap, self.plan.params, self.plan.theta),
            wanted=[row for row, head in enumerate(layer.query_heads) if head in heads],
            device=context.device,
            alone=lambda q, k, diagnosed: self._alone(entry, q, k, diagnosed, context),
            cancelled=context.stop.is_set,
        )
        for row, diagnosis, stripes in each:
            head = layer.query_heads[row]
            selections[head] = stripes
            if diagnosis is not None:
                found[head] = diagnosis

    def read(self, unit: LayerUnit, saved: dict[str, Any]) -> list[HeadRow] | None:
        rows = _rows(saved, self.plan.dump.identity)
        return rows if rows is not None and [r.head for r in rows] == list(unit.heads) else None

    def summarize(self, parts: Parts[LayerUnit, list[HeadRow]], run: Run) -> Summary:
        rows = tuple(row for part in parts for row in part)
        texts = _texts(self.plan)
        table = csv_text(COLUMNS, (table_row(row, texts[row.prompt]) for row in rows))
        return Summary(_report(self.plan, run.state["started"], rows, texts), {TABLE: table}, rows)

    def asked(self) -> dict[str, Any]:
        return asked_of(self.options.asked, self.plan.request.pieces)

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        from anchorscope.heads.figures import draw_all

        return draw_all(summary.value, run.path / FIGURES, summary.report, formats=run.pictures)

    def out_of_memory(self) -> str:
        longest = max(x.entry.tokens for x in self.plan.units)
        each = human_bytes(self.plan.memory / self.plan.workers)
        return (
            f"out of memory on {self.plan.device}: a head of {counted(longest, 'token')} needs about"
            f" {each}; use --device cpu, a larger --step or a shorter capture"
        )


def load_diagnosis(out: Path | str) -> Diagnosis:
    """A finished run, read again from its folder.

    Raises:
        DumpError: the folder holds none, or one that is damaged.
    """
    path = Path(out)
    shape = {
        "format": "anchorscope-heads",
        "dump": {"identity": str},
        "settings": dict,
        "versions": {"anchorscope": str},
    }
    report, state = FOLDER.load(path, shape, {"parts": [str]})
    rows: list[HeadRow] = []
    for name in state["parts"]:
        file = member(path / PARTS, name, ".json")
        saved = None if file is None else read_part(file)
        found = None if saved is None else _rows(saved, report["dump"]["identity"])
        if found is None:
            raise DumpError(f"{path / PARTS / name} is missing or damaged: run `anchorscope heads` again")
        rows.extend(found)
    return Diagnosis(path, report, tuple(rows), pictures_in(path / FIGURES))


def clear_diagnosis(out: Path | str) -> None:
    """Remove a run of `diagnose` from its folder, and nothing else; a folder without one is left alone."""
    path = Path(out)
    if FOLDER.read(path) is None:
        return
    with folder_lock(path):
        FOLDER.clear(path)
    for folder in (path / PARTS, path / FIGURES, path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _rows(saved: dict[str, Any], identity: str) -> list[HeadRow] | None:
    """The rows of a part, or None if it is of another dump or not of the right shape."""
    if not fits(saved, {"format": "anchorscope-heads-part", "dump": identity, "heads": [ROW_SHAPE]}):
        return None
    return [row_from_json(x) for x in saved["heads"]]


def _digest(pieces: Vocabulary | Sequence[str]) -> str:
    """Names a vocabulary, so that a run with another one is not taken for the same."""
    known = pieces.to_json() if isinstance(pieces, Vocabulary) else list(pieces)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _texts(plan: HeadsPlan) -> dict[str, TokenText]:
    """What is known about the tokens, by prompt; a tokenizer that was named counts before the dump's own words."""
    pieces = plan.dump.vocabulary if plan.request.pieces is None else as_vocabulary(plan.request.pieces)
    return {p.name: TokenText(p.token_ids, pieces) for p in plan.dump.prompts}


def _report(plan: HeadsPlan, started: str, rows: Sequence[HeadRow], texts: Mapping[str, TokenText]) -> dict[str, Any]:
    """What heads.json holds."""
    prompts = [p for p in plan.dump.prompts if p.name in plan.settings["prompts"]]
    return {
        "format": "anchorscope-heads",
        "version": VERSION,
        "started": started,
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": prompt_facts(plan.dump, plan.settings["prompts"]),
        "settings": plan.settings,
        "definitions": DEFINITIONS,
        "versions": versions(),
        "hardware": hardware_name(plan.device),
        "warnings": list(plan.warnings),
        "summary": {
            "all": summarize(rows),
            "prompts": [{"prompt": p.name, **summarize([r for r in rows if r.prompt == p.name])} for p in prompts],
        },
        "heads": [report_row(r, texts[r.prompt]) for r in rows],
    }
