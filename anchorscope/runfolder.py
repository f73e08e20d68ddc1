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
from anchorscope.errors import InputError, RunFailure
from anchorscope.files import write_atomic


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
            state = json.loads((path / self.state).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        good = isinstance(state, dict) and state.get("format") == self.format and isinstance(state.get("started"), str)
        return state if good else None

    def clear(self, path: Path) -> None:
        """Remove what a run wrote, its report first, and nothing else."""
        for name in (self.report, self.state, *self.tables):
            (path / name).unlink(missing_ok=True)
        for folder, pattern in self.parts:
            for file in (path / folder).glob(pattern):
                file.unlink()
