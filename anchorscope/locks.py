"""One writer at a time per output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchorscope.errors import InputError, RunFailure

LOCK = ".anchorscope.lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file while inside; the system releases it however the process ends.

    Raises:
        InputError: another run holds it.
        RunFailure: the lock file cannot be made.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFailure(f"cannot write into {folder}: {error.strerror or error}") from None
    try:
        # A holder removes the file at its end; whoever opened it before that and locks it after holds nothing.
        if not _try_lock(handle) or not _is_at(path, handle):
            raise InputError(f"another run is writing into {folder}: wait for it, or name another --out")
        try:
            yield
        finally:
            if os.name != "nt":  # there an open file cannot be removed; it stays, unlocked and harmless
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _try_lock(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
