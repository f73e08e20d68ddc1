"""The output folder of a run that can be interrupted: what it holds, whether to continue, refuse or replace it.

A run writes down what it is (`state`) before it starts, its parts one by one, and its report last of all, when tables,
diagnostics and figures are there. So nothing unfinished looks finished, and the same request continues where it
stopped. The state holds two things apart: the request (what is measured, which never changes in a folder) and what was
asked for on top of it (figures, diagnostics), which a later command may extend.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anchorscope._version import __version__
from anchorscope.elsewhere import elsewhere
from anchorscope.errors import DumpError, InputError, Interrupted, RunFailure
from anchorscope.files import MAX_JSON_BYTES, human_bytes, json_bytes, read_json, write_atomic
from anchorscope.locks import folder_lock
from anchorscope.pictures import DPI, FORMATS
from anchorscope.runs.shards import shard_of
from anchorscope.shapes import check, fits
from anchorscope.shown import counted

_IS_FILE = "is a file or lies below one; name a folder"
SOURCE = "source.json"  # in folders of runs without a dump: the model and the prompts
OWN = ("started", "asked", "pieces", "recipe")  # keys of a state that do not tell two requests apart


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The vocabulary of one command's folders.

    Attributes:
        what: for messages, with its article: "an analysis", "a comparison".
        command: the subcommand that writes them: "analyze".
        format: the state file's `format`.
        version: of what the folder holds; a run of another version is not continued.
        state: file that says what the run is.
        report: file that is written last.
        tables: other files at the top.
        parts: (folder, pattern) of the files below it; the first folder is made when a run begins.
        figures: the folder among them that holds pictures.
        kept: one of the things that an interrupted run keeps, in words, and the pattern of their files.
        stateless: `format` of a report that earlier versions wrote without a state; None if they never did.
    """

    what: str
    command: str
    format: str
    version: int
    state: str = "run.json"
    report: str
    tables: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = (("parts", "*.json"),)
    kept: tuple[str, str]
    figures: str = "figures"
    stateless: str | None = None

    @contextmanager
    def run(
        self,
        path: Path,
        request: Mapping[str, Any],
        *,
        asked: Mapping[str, Any],
        disk: int,
        overwrite: bool,
        resume: bool = False,
        pieces: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> Iterator[Run]:
        """Lock the folder and start or continue a run in it.

        Args:
            path: the folder; made when missing.
            request: everything that makes two runs measure the same, as JSON values.
            asked: what is to be made of it (`figures`, ...), as JSON values; false and None mean "not". In an
                unfinished run, what the last command asked for is made and the rest is removed. A finished run is
                refused, unless something is asked for that no earlier command asked for.
            disk: bytes the run may need.
            overwrite: replace what an earlier run wrote.
            resume: continue a finished run of the same request instead of refusing.
            pieces: how many things of `kept` the whole run makes; 0 where nobody knows.
            recipe: of a shard: how the whole is finished.

        Raises:
            InputError: the folder cannot be used, is in use, holds something else or a run that may not be replaced.
            RunFailure: not enough disk, or the folder cannot be written.
            Interrupted: Ctrl-C; says what is kept.
        """
        make_folder(path)
        with folder_lock(path):
            try:
                own = {"asked": dict(asked), "pieces": pieces, **({} if recipe is None else {"recipe": dict(recipe)})}
                state = self._begin(path, request, own, disk=disk, overwrite=overwrite, resume=resume)
                yield Run(self, path, state)
            except KeyboardInterrupt:
                raise Interrupted(self._kept(path)) from None

    def refuse_early(
        self, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False
    ) -> None:
        """Refuse what `run` would refuse whatever the request is, before minutes are spent on planning one.

        Args:
            path: the folder; nothing is written.
            asked, overwrite, resume: as for `run`.

        Raises:
            InputError: the folder cannot be used, or holds something else or a finished run.
        """
        there = next(x for x in (path.absolute(), *path.absolute().parents) if os.path.lexists(x))
        if not there.is_dir():
            raise InputError(f"--out {path} {_IS_FILE}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(
                f"--out {path} cannot be {'written' if there == path.absolute() else 'made'}: {there} is"
                " protected against you; name a folder of your own"
            )
        try:
            empty = _is_empty(path)
        except OSError:  # it is not there yet, or `run` says what is wrong with it
            return
        if empty:
            return
        found = self.find(path)
        if found is None:
            raise InputError(f"--out {path} {self._foreign()}")
        if (path / self.report).exists() and not (overwrite or resume) and self.covers(found, asked):
            raise InputError(f"--out {path} holds {self._refusal(found, found, finished=True)}")

    def _begin(
        self,
        path: Path,
        request: Mapping[str, Any],
        own: Mapping[str, Any],
        *,
        disk: int,
        overwrite: bool,
        resume: bool,
    ) -> dict[str, Any]:
        """The state written down: the request, the version, what was asked for, when the (first) run started."""
        identity, asked = self.identity(request), own["asked"]
        state = {**identity, **own, "started": _now()}
        free = shutil.disk_usage(path).free
        if not _is_empty(path):
            found = self.find(path)
            if found is None:
                raise InputError(f"--out {path} {self._foreign()}")
            same = _without_own(found) == identity
            before, finished = found.get("asked"), (path / self.report).exists()
            extends = finished and (resume or not self.covers(found, asked))
            if same and (extends or not finished):
                self._check_disk(path, free, disk)
                state["started"] = found["started"]
                if finished:  # nothing may look finished while more is being made
                    state["asked"] = _both(before or {}, asked)
                    if not set(FORMATS) & set(before or {}):  # earlier versions called pictures otherwise
                        self._clear(path, (x for x in self.parts if x[0] == self.figures))
                    (path / self.report).unlink()
                elif before is not None and before != state["asked"]:
                    self._clear(path, (x for x in self.parts if x[0] == self.figures))
            elif overwrite:
                self._check_disk(path, free, disk)
                self._replace(path, found)
            else:
                raise InputError(f"--out {path} holds {self._refusal(found, identity, finished)}")
        else:
            self._check_disk(path, free, disk)
        remove_strays(path)
        write_atomic(path / self.state, (json.dumps(state, indent=2, allow_nan=False) + "\n").encode())
        (path / self.parts[0][0]).mkdir(exist_ok=True)
        return state

    def find(self, path: Path) -> dict[str, Any] | None:
        """The state of the run in a folder; one that stands for it where an earlier version wrote none."""
        found = self.read(path)
        if found is not None or self.stateless is None or (path / self.state).exists():
            return found
        try:
            report: Any = read_json(path / self.report, MAX_JSON_BYTES, "report")
        except InputError:
            return None
        return {"format": self.format, "started": ""} if fits(report, {"format": self.stateless}) else None

    def _replace(self, path: Path, found: Mapping[str, Any]) -> None:
        """Remove what the run that was found wrote; the parts in an earlier version's folder are somebody else's."""
        if (path / self.state).exists():
            self.clear(path, state=False)
            return
        write_atomic(path / self.state, json_bytes(found))  # first: whatever interrupts this, the folder stays known
        (path / self.report).unlink()
        self._clear(path, (x for x in self.parts if x[0] == self.figures))

    def holds(self, path: Path, request: Mapping[str, Any]) -> bool:
        """Whether a folder holds a finished run of this request."""
        found = self.read(path)
        return found is not None and (path / self.report).is_file() and _without_own(found) == self.identity(request)

    def identity(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What tells a run from others: its request, and the versions of the program and of the folder."""
        return {"format": self.format, "version": self.version, "anchorscope": __version__, **request}

    def _foreign(self) -> str:
        return f"exists and is not {self.what}; name a new folder"

    def _refusal(self, found: Mapping[str, Any], identity: Mapping[str, Any], finished: bool) -> str:
        shard = shard_of(found)
        if shard is not None and found["shard"] != identity.get("shard"):
            return f"{shard} of {self.what}; give every shard, and what is made of all, a folder of its own"
        noun = self.what.split(" ", 1)[1]
        what = f"a finished {noun}" if finished else f"an unfinished {noun}"
        if "version" not in found:  # see `_find`
            what += " of an earlier version"
        elif different := {key for key in identity if found.get(key) != identity[key]}:
            elsewhere = different <= {"hardware", "versions", "anchorscope"}
            what += " from another machine, thread count or version" if elsewhere else " with other settings"
        return f"{what}; add --overwrite to replace it, or name a new folder"

    def _check_disk(self, path: Path, free: int, disk: int) -> None:
        if free < disk:
            raise RunFailure(
                f"{path} has {human_bytes(free)} free and {self.what} like this may need {human_bytes(disk)};"
                " free some space or name another --out"
            )

    def _kept(self, path: Path) -> str:
        """What an interrupted run leaves behind."""
        if self.read(path) is None:
            return "interrupted; nothing was written"
        if (path / self.report).exists():
            return f"interrupted, but {path} is complete"
        return f"interrupted; {self.progress(path)} kept in {path}: give the same command again to continue"

    def progress(self, path: Path) -> str:
        """How much of a begun run is done, with its verb: "12 of 30 heads are", "1 head is"."""
        noun, pattern = self.kept
        state = self.read(path) or {}
        count, pieces = sum(1 for _ in path.glob(pattern)), state.get("pieces")
        whole = max(count, pieces) if isinstance(pieces, int) and pieces > 0 else None
        words = counted(count, noun) if whole is None else f"{count:,} of {counted(whole, noun)}"
        return f"{words} {'is' if count == 1 else 'are'}"

    def covers(self, state: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """Whether a finished run has all that is asked for. One that does not say (by an older version) does not."""
        before = state.get("asked")
        return isinstance(before, dict) and all(not v or before.get(k) == v for k, v in asked.items())

    def reopen(self, path: Path, asked: Mapping[str, Any]) -> None:
        """Make a finished run that has other pictures than these an unfinished one, so that the next word counts."""
        found = self.read(path)
        if found is not None and _pictures(found.get("asked")) != _pictures(asked):
            (path / self.report).unlink(missing_ok=True)

    def read(self, path: Path) -> dict[str, Any] | None:
        """The state of the run in a folder, or None if it holds none of this kind."""
        try:
            state: Any = read_json(path / self.state, MAX_JSON_BYTES, "state")
        except InputError:
            return None
        return state if fits(state, {"format": self.format, "started": str}) else None

    def load(self, path: Path, report: Any, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The report and the state of a finished run, each of the shape that the caller needs (`anchorscope.shapes`).

        Raises:
            DumpError: there is no finished run, or a file of it is damaged.
        """
        self.check_finished(path)
        hint = f"it is damaged; run `anchorscope {self.command}` again"
        found: Any = read_json(path / self.state, MAX_JSON_BYTES, "state", error=DumpError)
        check(found, state, str(path / self.state), hint=hint, error=DumpError)
        value = read_json(path / self.report, MAX_JSON_BYTES, "report", error=DumpError)
        check(value, report, str(path / self.report), hint=hint, error=DumpError)
        return value, found

    def check_finished(self, path: Path) -> None:
        """Refuse a folder whose run is not finished, or that holds none.

        Raises:
            DumpError: with what to do.
        """
        if (path / self.report).is_file():
            return
        noun = self.what.split(" ", 1)[1]
        state = self.read(path)
        if state is not None and (shard := shard_of(state)) is not None:
            raise DumpError(f"{path} holds {shard} of {self.what}: put all of them together with `anchorscope merge`")
        if state is not None:
            raise DumpError(
                f"{path} holds no finished {noun} but an unfinished one: give the same `anchorscope {self.command}`"
                " command again to finish it"
            )
        raise DumpError(f"{path} holds no finished {noun}: run `anchorscope {self.command}` first")

    def clear(self, path: Path, *, state: bool = True) -> None:
        """Remove what a run wrote and nothing else: the report first, the state (if at all) last.

        Whatever interrupts this, the folder is still known as an unfinished run.
        """
        for name in (self.report, *self.tables, SOURCE):
            (path / name).unlink(missing_ok=True)
        self._clear(path, self.parts)
        if state:
            (path / self.state).unlink(missing_ok=True)

    def _clear(self, path: Path, parts: Iterable[tuple[str, str]]) -> None:
        for folder, pattern in parts:
            for file in (path / folder).glob(pattern):
                file.unlink()


def _is_empty(path: Path) -> bool:
    return all(x.name.startswith(".") for x in path.iterdir())


def _now() -> str:
    """The time of day; where parts are merged, that at which their measuring began."""
    measured = elsewhere()
    return (measured and measured.started) or datetime.now(timezone.utc).isoformat(timespec="seconds")


def _without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in OWN}


def _both(before: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for before and what is now; where both say something, now counts."""
    return {**before, **{key: value for key, value in asked.items() if value or not before.get(key)}}


def _pictures(asked: Any) -> dict[str, Any]:
    """What is asked of figures."""
    known = asked if isinstance(asked, dict) else {}
    return {key: known[key] for key in ("figures", *FORMATS) if known.get(key)}


@dataclass(frozen=True)
class Run:
    """A run under way in its locked folder.

    Attributes:
        folder: its kind.
        path: where it writes.
        state: what its state file holds.
    """

    folder: RunFolder
    path: Path
    state: dict[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """What is to be made, things asked for by earlier commands included."""
        return dict(self.state["asked"])

    @property
    def pictures(self) -> dict[str, int]:
        """Dpi of every format that figures are to be saved in."""
        return {form: self.asked[form] for form in FORMATS if self.asked.get(form)} or {"png": DPI}

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the report, last of all: a folder without it is an unfinished run.

        Raises:
            RunFailure: it cannot be written.
        """
        write_atomic(self.path / self.folder.report, json_bytes(report))


def remove_strays(path: Path) -> None:
    """Remove what a killed run was writing, from a folder that is locked, so that nobody else is writing there."""
    for stray in path.rglob(".*.tmp"):
        stray.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Make the output folder.

    Raises:
        InputError: it is a file, lies below one, or cannot be made.
        RunFailure: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {path} {_IS_FILE}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailure(f"--out {path} cannot be made: {error.strerror}; free some space") from None
        raise InputError(f"--out {path} cannot be made: {error.strerror}") from None
    return path
