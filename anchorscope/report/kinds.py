"""The kinds of folder that add to a page of analyses, and how folders are recognized. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anchorscope.errors import DumpError, InputError
from anchorscope.report import diagnostics, methods
from anchorscope.report.read import Kind, Run, Table, labeled, open_run, read_result

KINDS: tuple[Kind, ...] = (methods.KIND, diagnostics.KIND)


@dataclass(frozen=True)
class Sources:
    """What a page is made from; see `open_sources`.

    Attributes:
        runs: the analyses.
        tables: what was measured beside them, by the name of its kind.
        remarks: what is missing or unfinished.
    """

    runs: tuple[Run, ...]
    tables: Mapping[str, tuple[Table, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[Table, ...]:
        """Tables of `compare`."""
        return self.tables.get("methods", ())

    @property
    def diagnostics(self) -> tuple[Table, ...]:
        """Tables of `heads`."""
        return self.tables.get("diagnostics", ())

    def tables_of(self, kind: Kind, run: Run) -> list[Table]:
        """Tables of one kind that were measured on the dump of a run, or do not say on which."""
        return [t for t in self.tables.get(kind.name, ()) if t.identity in (None, run.identity)]


def open_sources(folders: Sequence[Path | str]) -> Sources:
    """Recognize result folders: `analyze` (at least one), `compare` and `heads`; one folder may hold several.

    Raises:
        DumpError: a folder that is missing, unfinished, damaged or holds no result.
        InputError: no analysis among them, or a comparison or diagnostics of a dump that none of the analyses used.
    """
    runs: list[Run] = []
    beside: dict[str, list[Table]] = {kind.name: [] for kind in KINDS}
    within: dict[str, list[Table]] = {kind.name: [] for kind in KINDS}
    for folder in dict.fromkeys(Path(f) for f in folders):
        if not folder.is_dir():
            raise DumpError(f"no folder {folder}: name folders written by `anchorscope analyze`")
        is_analysis = (folder / "analysis.json").exists()
        if is_analysis:
            runs.append(open_run(folder))
            for kind in KINDS:
                within[kind.name] += kind.find_within(folder)
        state = read_result(folder / "run.json").get("format") if (folder / "run.json").exists() else None
        for kind in KINDS:
            kind.refuse_unfinished(folder, state)
        found = {kind.name: kind.find(folder) for kind in KINDS}
        if not is_analysis and not any(found.values()):
            raise DumpError(f"{folder} holds no result: name folders written by analyze, compare or heads")
        for name, tables in found.items():
            beside[name] += tables
    if not runs:
        raise InputError("the report needs an analysis: add a folder written by `anchorscope analyze`")
    everything = {name: (*beside[name], *within[name]) for name in beside}
    for table in (t for tables in everything.values() for t in tables):
        if table.identity is not None and table.identity not in {r.identity for r in runs}:
            raise InputError(
                f"{table.path} was measured on a dump that none of the analyses used; name it with an analysis of"
                " the same dump"
            )
    return Sources(labeled(runs), everything, tuple(remark for run in runs for remark in run.remarks))
