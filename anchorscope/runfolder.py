"""The output folder of a run that can be interrupted: what it holds, whether to continue, refuse or replace it.

A run writes down what it is (`state`) before it starts, its parts one by one, and its report last, so that nothing
unfinished looks finished and the same request continues where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anchorscope._version import __version__
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import MAX_JSON_BYTES, read_json, write_atomic
from anchorscope.shapes import check, fits


@dataclass(frozen=True)
class RunFolder:
    """The vocabulary of one command's folders.

    Attributes:
        what: for messages, with its article: "an analysis", "a comparison".
        format: the state file's `format`.
        version: of what the folder holds; a run of another version is not continued.
        state: file that says what the run is.
        report: file that is written last.
        tables: other files at the top.
        parts: (folder, pattern) of the files below it; the first folder is made when a run begins.
    """

    what: str
    format: str
    version: int
    state: str
    report: str
    tables: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]

    def begin(
        self, path: Path, request: Mapping[str, Any], *, disk: int, overwrite: bool, resume: bool = False
    ) -> dict[str, Any]:
        """Start or continue a run in a folder that is locked.

        Args:
            path: the folder.
            request: everything that makes two runs the same, as JSON values.
            disk: bytes the run may need.
            overwrite: replace what an earlier run wrote.
            resume: continue a finished run of the same request instead of refusing.

        Returns:
            The state written down: the request, the version, and when the (first) run started.

        Raises:
            InputError: the folder holds something else, or a run that may not be replaced.
            RunFailure: not enough disk, or the folder cannot be written.
        """
        identity = {"format": self.format, "version": self.version, "anchorscope": __version__, **request}
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if any(not x.name.startswith(".") for x in path.iterdir()):
            found = self.read(path)
            if found is None:
                raise InputError(f"--out {path} exists and is not {self.what}; name a new folder")
            same = {key: value for key, value in found.items() if key != "started"} == identity
            finished = (path / self.report).exists()
            if same and (resume or not finished):
                started = found["started"]
            elif overwrite:
                self.clear(path)
            else:
                noun = self.what.split(" ", 1)[1]
                what = f"a finished {noun}" if finished else f"an unfinished {noun}"
                what += "" if same else " with other settings"
                raise InputError(f"--out {path} holds {what}; add --overwrite to replace it, or name a new folder")
        free = shutil.disk_usage(path).free
        if free < disk:
            raise RunFailure(
                f"{path} has {free / 1e9:.2f} GB free and {self.what} like this may need {disk / 1e9:.2f} GB;"
                " free some space or name another --out"
            )
        for stray in path.rglob(".*.tmp"):  # what a killed run was writing; nobody else writes here under our lock
            stray.unlink(missing_ok=True)
        state = {**identity, "started": started}
        write_atomic(path / self.state, (json.dumps(state, indent=2, allow_nan=False) + "\n").encode())
        (path / self.parts[0][0]).mkdir(exist_ok=True)
        return state

    def read(self, path: Path) -> dict[str, Any] | None:
        """The state of the run in a folder, or None if it holds none of this kind."""
        try:
            state: Any = read_json(path / self.state, MAX_JSON_BYTES, "state")
        except InputError:
            return None
        return state if fits(state, {"format": self.format, "started": str}) else None

    def clear(self, path: Path) -> None:
        """Remove what a run wrote, its report first, and nothing else."""
        for name in (self.report, self.state, *self.tables):
            (path / name).unlink(missing_ok=True)
        for folder, pattern in self.parts:
            for file in (path / folder).glob(pattern):
                file.unlink()


def load_finished(path: Path, folder: RunFolder, report: Any, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report and the state of a finished run, each of the shape that the caller needs.

    Args:
        path: the run's folder.
        folder: its vocabulary.
        report, state: shapes, see `anchorscope.shapes`.

    Raises:
        DumpError: there is no finished run, or a file of it is damaged.
    """
    noun = folder.what.split(" ", 1)[1]
    found = folder.read(path)
    if found is None:
        raise DumpError(f"{path} holds no finished {noun}: run the command that makes one first")
    if not (path / folder.report).exists():
        raise DumpError(f"{path} holds no finished {noun}, only part of one: give the same command again to finish it")
    hint = "it is damaged; run the command that made it again"
    check(found, state, str(path / folder.state), hint=hint, error=DumpError)
    value = read_json(path / folder.report, MAX_JSON_BYTES, "report", error=DumpError)
    check(value, report, str(path / folder.report), hint=hint, error=DumpError)
    return value, found
