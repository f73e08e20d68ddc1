"""Folders that make a section of their own on the page: a calibration, an evaluation, a bench.

One file per kind makes a `Section`: which JSON report it reads, what that must look like, and the blocks it becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorscope.anchors import different_in
from anchorscope.errors import DumpError, InputError
from anchorscope.report.blocks import Block
from anchorscope.report.read import Run, read_result
from anchorscope.shapes import check

_SHARES = ("recall", "density", "top1_agreement", "score_dense", "score_sparse")
_DIFFERENCES = ("gain",)  # objects that hold differences of shares, which may be negative
_ROUNDING = 1e-3
MODEL = ({"name": (str, None, ...)}, None)


@dataclass(frozen=True)
class Result:
    """A finished run that becomes a section.

    Attributes:
        path: its folder.
        label: how the page calls it.
        report: its JSON report, of the section's shape.
    """

    path: Path
    label: str
    report: dict[str, Any] = field(repr=False)

    @property
    def model(self) -> Mapping[str, Any] | None:
        """The model it is about, as it says."""
        found = self.report.get("model")
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Section:
    """A kind of folder that makes a section.

    Attributes:
        name: of the kind, in the page's data.
        title: heading of the section.
        command: who writes the folder.
        what: what such a run is, with its article.
        file: the JSON report, which is written last.
        format, version: what it says of itself; `version_key` names the key of the version.
        state: the format that run.json of such a folder names.
        shape: of the report as far as it is read (see `anchorscope.shapes`).
        blocks: what the page shows of a report.
    """

    name: str
    title: str
    command: str
    what: str
    file: str
    format: str
    version: int
    state: str
    shape: Mapping[str, Any]
    blocks: Callable[[Mapping[str, Any]], list[Block]]
    version_key: str = "version"

    def find(self, folder: Path) -> Result | None:
        """The finished run in a folder, or None if it holds none of this kind.

        Raises:
            DumpError: it is damaged or of another version.
        """
        path = folder / self.file
        if not path.exists():
            return None
        report = read_result(path)
        if report.get("format") != self.format:
            raise DumpError(f"{path} is no result of `anchorscope {self.command}`: run the command again")
        if report.get(self.version_key) != self.version:
            raise DumpError(
                f"{path} has format version {str(report.get(self.version_key))[:40]}, this AnchorScope reads"
                f" {self.version}: run `anchorscope {self.command}` again"
            )
        hint = f"it is damaged; run `anchorscope {self.command}` again"
        check(report, dict(self.shape), str(path), hint=hint, error=DumpError)
        if (name := _impossible_share(report)) is not None:
            raise DumpError(f"{path}: {name} must be from 0 to 1: {hint}")
        return Result(folder, folder.resolve().name, report)

    def refuse_unfinished(self, folder: Path, state: object) -> None:
        """Refuse a folder of this kind whose report, which is written last, is not there."""
        if state == self.state and not (folder / self.file).is_file():
            noun = self.what.split(" ", 1)[1]
            raise DumpError(
                f"{folder} holds an unfinished {noun}: give the same `anchorscope {self.command}` command again to"
                " finish it"
            )

    def pack(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """The sections of the page that results of this kind make."""
        return [
            {
                "id": f"{self.name}-{i}",
                "title": self.title if len(results) == 1 else f"{self.title}: {result.label}",
                "blocks": self.blocks(result.report),
            }
            for i, result in enumerate(results)
        ]


def _impossible_share(value: Any) -> str | None:
    """The name of the first recall, density, score or agreement that is not a share; None if all are."""
    if isinstance(value, list):
        return next((name for x in value if (name := _impossible_share(x)) is not None), None)
    if not isinstance(value, dict):
        return None
    for name, x in value.items():
        if name in _DIFFERENCES:
            continue
        if isinstance(x, (int, float)):
            if name.endswith(_SHARES) and not -_ROUNDING <= x <= 1 + _ROUNDING:
                return str(name)
        elif (within := _impossible_share(x)) is not None:
            return within
    return None


def refuse_different_models(runs: Iterable[Run], results: Iterable[Result]) -> None:
    """Make sure that all that goes on one page is about one model.

    Raises:
        InputError: with the names of two that differ.
    """
    known: list[tuple[Path, Mapping[str, Any]]] = []
    stated = [*((r.path, r.report["dump"].get("model")) for r in runs), *((r.path, r.model) for r in results)]
    for path, model in stated:
        for first, other in known if model else ():
            if model is not None and (key := different_in(other, model)) is not None:
                names = " and ".join(str(m.get("name") or "a model without a name")[:80] for m in (other, model))
                raise InputError(
                    f"{first} and {path} are of different models ({names}; their {key} differs): make a page of each"
                )
        if model:
            known.append((path, model))
