"""The kinds of folder a page is made of, and how they are recognized.

A folder with a section of its own is a file that makes a `Section`, and its line in `SECTIONS`. One that adds to the
heads of an analysis is a file that makes a `Kind`, its line in `KINDS`, and what `assets/head.js` shows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from anchorscope.errors import DumpError, InputError
from anchorscope.names import PAGE_COMMANDS, listed
from anchorscope.report import benches, calibrations, diagnostics, evaluations, methods
from anchorscope.report.read import Kind, Run, Table, labels, open_run, read_result
from anchorscope.report.sections import Result, Section, refuse_different_models

AnyT = TypeVar("AnyT", Run, Result)
KINDS: tuple[Kind, ...] = (methods.KIND, diagnostics.KIND)  # add to every head of the analyses
SECTIONS: tuple[Section, ...] = (
    calibrations.SECTION,
    evaluations.SECTION,
    benches.SECTION,
)  # make a section of their own


@dataclass(frozen=True)
class Sources:
    """What a page is made from; see `open_sources`.

    Attributes:
        runs: the analyses.
        tables: what was measured beside them, by the name of its kind.
        remarks: what is missing or unfinished.
        results: by the name of their section, runs that make one.
        home: the folder a page is put into if nobody says where: the first analysis, or the first folder of all.
    """

    runs: tuple[Run, ...]
    tables: Mapping[str, tuple[Table, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    results: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    home: Path = Path()

    @property
    def methods(self) -> tuple[Table, ...]:
        """Tables of `compare`."""
        return self.tables.get("methods", ())

    @property
    def diagnostics(self) -> tuple[Table, ...]:
        """Tables of `heads`."""
        return self.tables.get("diagnostics", ())

    @property
    def added(self) -> dict[str, tuple[Table, ...]]:
        """Tables that add to the analyses, by what such a run is in words."""
        return {kind.what: self.tables.get(kind.name, ()) for kind in KINDS}

    def tables_of(self, kind: Kind, run: Run) -> list[Table]:
        """Tables of one kind that were measured on the dump of a run, or do not say on which."""
        return [t for t in self.tables.get(kind.name, ()) if t.identity in (None, run.identity)]


def open_sources(folders: Sequence[Path | str]) -> Sources:
    """Recognize result folders; one may hold several. Those of `compare` and `heads` need the analysis of their dump.

    Raises:
        DumpError: a folder that is missing, unfinished, damaged or holds no result.
        InputError: no folder that makes a page, results of different models, or a comparison or diagnostics of a dump
            that none of the analyses used.
    """
    runs: list[Run] = []
    beside: dict[str, list[Table]] = {kind.name: [] for kind in KINDS}
    within: dict[str, list[Table]] = {kind.name: [] for kind in KINDS}
    results: dict[str, list[Result]] = {section.name: [] for section in SECTIONS}
    paths = list(dict.fromkeys(Path(f) for f in folders))
    for folder in paths:
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise DumpError(f"{folder} {what}: name folders written by {_COMMANDS}")
        is_analysis = (folder / "analysis.json").exists()
        if is_analysis:
            runs.append(open_run(folder))
            for kind in KINDS:
                within[kind.name] += kind.find_within(folder)
        found = {kind.name: kind.find(folder) for kind in KINDS}
        made = {section.name: result for section in SECTIONS if (result := section.find(folder)) is not None}
        _refuse_unfinished(folder)
        if not is_analysis and not made and not any(found.values()):
            raise DumpError(f"{folder} holds no result: name folders written by {_COMMANDS}")
        for name, tables in found.items():
            beside[name] += tables
        for name, result in made.items():
            results[name].append(result)
    everything = {name: (*beside[name], *within[name]) for name in beside}
    _refuse_lonely(runs, [t for tables in everything.values() for t in tables])
    refuse_different_models(runs, [r for mine in results.values() for r in mine])
    remarks = tuple(remark for run in runs for remark in run.remarks)
    named = {name: _labeled(mine) for name, mine in results.items()}
    return Sources(_labeled(runs), everything, remarks, named, runs[0].path if runs else paths[0])


def _labeled(found: Sequence[AnyT]) -> tuple[AnyT, ...]:
    """With different labels."""
    return tuple(replace(x, label=label) for x, label in zip(found, labels([x.path for x in found]), strict=True))


_COMMANDS = listed(PAGE_COMMANDS)


def _refuse_unfinished(folder: Path) -> None:
    """Refuse a run of any kind that was begun here and has not written its report."""
    state = read_result(folder / "run.json").get("format") if (folder / "run.json").exists() else None
    for kind in KINDS:
        kind.refuse_unfinished(folder, state)
    for section in SECTIONS:
        section.refuse_unfinished(folder, state)


def _refuse_lonely(runs: Sequence[Run], tables: Sequence[Table]) -> None:
    """Refuse tables that add to an analysis which is not there."""
    for table in tables:
        if not runs:
            raise InputError(
                f"{table.path} adds to an analysis, so the report needs an analysis of the same dump: add a folder"
                " written by `anchorscope analyze`"
            )
        if table.identity is not None and table.identity not in {r.identity for r in runs}:
            raise InputError(
                f"{table.path} was measured on a dump that none of the analyses used; name it with an analysis of"
                " the same dump"
            )
