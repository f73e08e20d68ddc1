"""The folder of a dump: whether it may be written to, what of it belongs to a dump, and failures of the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from anchorscope.dumps.format import MANIFEST, plain_file, read_manifest
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import human_bytes
from anchorscope.locks import LOCK

PARTIAL = ".partial"


def check_output(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that must not be written to, before any work is done.

    Raises:
        InputError: it is a file, is not writable, or holds something and neither `overwrite` nor `resume` allows that.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: give a folder")
        if path.is_dir():
            names = {p.name for p in path.iterdir()} - {LOCK}
            if names and MANIFEST not in names and any(PARTIAL not in n for n in names):
                raise InputError(f"{path} holds other files and no dump: give a new folder")
            if MANIFEST in names and not overwrite and not resume:
                if not _is_complete(path):
                    raise InputError(f"{path} holds an unfinished dump: --resume continues it, --overwrite replaces it")
                raise InputError(f"{path} exists already: give another folder, or --overwrite to replace the dump")
            if MANIFEST in names and resume and not overwrite and _is_complete(path):
                raise InputError(f"{path} is complete: there is nothing to resume")
        base = path.absolute()
        while not base.exists():
            base = base.parent
        if not base.is_dir():
            raise InputError(f"{path} cannot be created: {base} is a file")
        if not os.access(base, os.W_OK | os.X_OK):
            raise InputError(f"{path} cannot be written: no permission in {base}")
    except OSError as error:
        raise InputError(f"{path} cannot be used: {error.strerror}") from None


def _is_complete(path: Path) -> bool:
    try:
        return read_manifest(path).get("complete", True)
    except DumpError:
        return True  # whatever it is, it cannot be resumed


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start when the disk below `path` has less than `needed` bytes (and 1 MiB) free.

    Raises:
        RunFailure: the disk has less; the message names both numbers.
    """
    base = path.absolute()
    while not base.exists():
        base = base.parent
    free = shutil.disk_usage(base).free
    if free < needed + (1 << 20):
        raise RunFailure(
            f"{path} needs {human_bytes(needed)} and its disk has {human_bytes(free)} free:"
            " use fewer --tokens, --layers or --kv-heads, or another disk"
        )


def remove_dump_files(path: Path) -> None:
    """Delete a dump's files, its manifest last, and nothing else in its folder.

    Whenever this stops, the folder can be overwritten; the manifest should say before that the dump is unfinished.
    """
    remove_tensor_files(path, listed_files(path))
    (path / MANIFEST).unlink(missing_ok=True)


def listed_files(path: Path) -> list[Path]:
    """The tensor files that a manifest, if there is a good one, lists."""
    with contextlib.suppress(DumpError):
        names = [e.get("file") for e in read_manifest(path)["entries"] if isinstance(e, dict)]
        return [file for name in names if (file := _plain_or_none(path, name)) is not None]
    return []


def _plain_or_none(path: Path, name: object) -> Path | None:
    with contextlib.suppress(DumpError):
        return plain_file(path, name)
    return None


def remove_tensor_files(path: Path, listed: Iterable[Path]) -> None:
    """Delete the tensor files listed, and whatever else looks like one of a dump."""
    found = [file for pattern in ("prompt*-layer*.safetensors", f"*{PARTIAL}") for file in path.glob(pattern)]
    for file in (*listed, *found):
        file.unlink(missing_ok=True)


def make_folder(path: Path) -> list[Path]:
    """Create `path` and its parents; the folders that were created, innermost first."""
    made = []
    folder = path.absolute()
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be created: {error.strerror}") from None
    return made


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "nt":
        return  # folders cannot be opened there; NTFS journals the rename
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A failure of the disk while `path` is written is a `RunFailure`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailure(
                f"the disk is full: {path} could not be written; free some space or use another disk"
            ) from None
        raise RunFailure(f"{path} could not be written: {error.strerror or error}") from None
