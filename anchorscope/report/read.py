"""Result folders as found on disk: finished analyses, and the tables that other commands wrote beside them.

A kind of folder (`compare`, `heads`, ...) is one file that makes a `Kind`: which table it holds, and what the page gets
from it. `anchorscope.report.kinds` lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorscope.errors import DumpError, InputError
from anchorscope.files import MAX_JSON_BYTES, member, read_csv, read_json
from anchorscope.shapes import check
from anchorscope.shown import counted

_RUN = {
    "started": (str, None, ...),
    "dump": {"identity": str, "model": ({"name": (str, None, ...)}, None, ...)},
    "settings": {"target_recall": float},
    "figure_theta": ({"theta": (float, "inf", "-inf")}, ...),  # earlier versions wrote none
    "versions": ({str: (str, None)}, None, ...),
    "hardware": (str, dict, None, ...),
    "warnings": ([str], None, ...),
}


@dataclass(frozen=True)
class Run:
    """A finished analysis as found on disk.

    Attributes:
        path: the folder.
        label: how the page calls it.
        report: the content of report.json.
        profiles: the profile files, in the order of heads.csv.
        remarks: what of it is missing or unfinished.
    """

    path: Path
    label: str
    report: dict[str, Any] = field(repr=False)
    profiles: tuple[Path, ...] = field(repr=False)
    remarks: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash that names the dump it came from."""
        return str(self.report["dump"]["identity"])


@dataclass(frozen=True)
class Table:
    """A per-head CSV beside the analyses: methods.csv of `compare` or diagnostics.csv of `heads`.

    Attributes:
        path: the file.
        identity: dump it was measured on, or None where its folder does not say.
        about: the JSON report of its folder ({} if there is none).
        columns: header.
        rows: one list of fields per line.
    """

    path: Path
    identity: str | None
    about: dict[str, Any] = field(repr=False)
    columns: tuple[str, ...]
    rows: list[list[str]] = field(repr=False)

    def of_prompt(self, prompt: str) -> Iterable[dict[str, str]]:
        """The lines of one prompt, by column."""
        for row in self.rows:
            named = dict(zip(self.columns, row, strict=True))
            if named["prompt"] == prompt:
                yield named

    def head_key(self, row: Mapping[str, str]) -> str:
        """`layer:head` of a line.

        Raises:
            DumpError: they are no numbers.
        """
        if not all(re.fullmatch(r"[0-9]{1,9}", row[name]) for name in ("layer", "head")):
            raise DumpError(f"{self.path}: layer {row['layer'][:40]!r}, head {row['head'][:40]!r} are not numbers")
        return f"{int(row['layer'])}:{int(row['head'])}"

    def share(self, row: Mapping[str, str], name: str) -> float:
        """A recall or density of a line.

        Raises:
            DumpError: it is no number from 0 to 1.
        """
        try:
            value = float(row[name])
        except ValueError:
            value = math.inf
        if not 0 <= value <= 2:  # rounding may put it a little above 1
            raise DumpError(f"{self.path}: {name} {row[name][:40]!r} is not a number from 0 to 1")
        return value


@dataclass(frozen=True)
class Kind:
    """A kind of folder whose table adds to every head of the analyses.

    Attributes:
        name: what the page calls its part of a prompt.
        command: who writes the folder.
        what: what such a run is, in words.
        table: the CSV, with one or more lines per head.
        report: the JSON file that is written last.
        state: the format that run.json of such a folder names.
        needed: columns of the table beside prompt, layer and head.
        about: the shape of its report as far as it is read (see `anchorscope.shapes`).
        within: the folder of an analysis that holds one of these too, if any.
        pack: makes what the page holds of it for one prompt, from the tables of one dump; None where there is none.
    """

    name: str
    command: str
    what: str
    table: str
    report: str
    state: str
    pack: Callable[[Sequence[Table], str], dict[str, Any] | None]
    needed: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    within: str | None = None

    def find(self, folder: Path) -> list[Table]:
        """The table of a folder, if it is one of these.

        Raises:
            DumpError: it is damaged.
        """
        return [_table(folder, self)] if (folder / self.table).exists() else []

    def find_within(self, analysis: Path) -> list[Table]:
        """The table within the folder of an analysis, if that is finished."""
        if self.within is None or not (analysis / self.within / self.report).exists():
            return []
        return [_table(analysis / self.within, self)]

    def refuse_unfinished(self, folder: Path, state: object) -> None:
        """Refuse a folder of this kind whose report, which is written last, is not there."""
        if state == self.state and not (folder / self.report).exists():
            raise DumpError(
                f"{folder} holds an unfinished {self.what}: give the same `anchorscope {self.command}` command again"
                " to finish it"
            )


def open_run(folder: Path) -> Run:
    """A finished analysis.

    Raises:
        DumpError: it is unfinished or damaged.
    """
    state = read_result(folder / "analysis.json")
    if not (folder / "report.json").exists():
        raise DumpError(f"{folder} holds an unfinished analysis: give the same analyze command again to finish it")
    report = read_result(folder / "report.json")
    names = state.get("profiles")
    if report.get("format") != "anchorscope-report" or not isinstance(names, list) or not names:
        raise DumpError(f"{folder} holds no finished analysis: run `anchorscope analyze DUMP --out {folder}` first")
    if any(member(folder / "profile", n, ".safetensors") is None for n in names):
        raise DumpError(f"{folder / 'analysis.json'} names a file outside its folder: it was edited; run analyze again")
    check(report, _RUN, str(folder / "report.json"), hint="it is damaged; run analyze again", error=DumpError)
    remarks = _missing_diagnosis(folder, state)
    if remarks:
        report = {**report, "warnings": [*(report.get("warnings") or ()), *remarks]}
    return Run(folder, folder.resolve().name, report, tuple(folder / "profile" / n for n in names), remarks)


def _missing_diagnosis(folder: Path, state: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say of head diagnostics that were begun or asked for and are not there: the page leaves them out."""
    heads = folder / "heads"
    asked = state.get("asked")
    if (heads / "heads.json").exists():
        return ()
    if (heads / "run.json").exists():
        return (f"the head diagnostics of {folder.name} are unfinished, left out here: give the same command again",)
    if isinstance(asked, dict) and asked.get("diagnose"):
        return (f"the head diagnostics of {folder.name} are gone: `anchorscope analyze --resume` makes them again",)
    return ()


def read_result(path: Path) -> dict[str, Any]:
    """A JSON object that a command wrote.

    Raises:
        DumpError: it is missing, damaged or no object.
    """
    try:
        value = read_json(path, MAX_JSON_BYTES, "result")
    except InputError as error:
        raise DumpError(f"{error}: run the command that wrote it again") from None
    if not isinstance(value, dict):
        raise DumpError(f"{path} is no result of anchorscope: run the command that wrote it again")
    return value


def _table(folder: Path, kind: Kind) -> Table:
    """A CSV with one or more lines per head, and the report of its folder."""
    path, report = folder / kind.table, folder / kind.report
    about = read_result(report) if report.exists() else {}
    hint = "it is damaged; run the command that wrote it again"
    check(about, dict(kind.about), str(report), hint=hint, error=DumpError)
    dump = about.get("dump")
    identity = dump.get("identity") if isinstance(dump, dict) else dump
    lines = read_csv(path, MAX_JSON_BYTES, "table", error=DumpError)
    columns = tuple(lines[0]) if lines else ()
    for name in ("prompt", "layer", "head", *kind.needed):
        if name not in columns:
            raise DumpError(f"{path} has no column {name!r}: run the command that wrote it again")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise DumpError(f"{path}, line {number}: {counted(len(line), 'field')} instead of {len(columns)}")
    return Table(path, identity if isinstance(identity, str) else None, about, columns, lines[1:])


def labels(folders: Sequence[Path]) -> list[str]:
    """What to call folders: their names, with the parent's in front where two are equal; all different."""
    names = [folder.resolve().name for folder in folders]
    out: list[str] = []
    for i, (folder, label) in enumerate(zip(folders, names, strict=True)):
        if names.count(label) > 1:
            label = f"{folder.resolve().parent.name}/{label}"
        out.append(f"{label} ({i + 1})" if label in out else label)
    return out
