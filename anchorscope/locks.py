"""One writer at a time per output folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchorscope.errors import InputError, RunFailure

LOCK = ".anchorscope.lock"
HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)  # what a lock of somebody else gives
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file while inside; the system releases it however the process ends.

    A file left behind by a process that was killed is no lock. File systems that know no locks (some network and user
    space ones) are used without, after a warning.

    Raises:
        InputError: another run holds it, or the folder must not be written.
        RunFailure: the lock file cannot be made.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        kind = InputError if error.errno in FORBIDDEN else RunFailure
        raise kind(f"cannot write into {folder}: {error.strerror or error}; name another --out") from None
    try:
        # A holder removes the file at its end; whoever opened it before that and locks it after holds nothing.
        if not _try_lock(handle, folder) or not _is_at(path, handle):
            raise InputError(f"another run is writing into {folder}: wait for it, or name another --out")
        try:
            yield
        finally:
            if os.name != "nt":  # there an open file cannot be removed; it stays, unlocked and harmless
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _try_lock(handle: int, folder: Path) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        logger.warning(
            "the file system of %s offers no locks (%s): see to it that no other run writes there",
            folder,
            error.strerror or error,
        )
    return True
