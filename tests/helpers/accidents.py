"""What can happen to a process and its disk while it writes, at a step of one's choice."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class Killed(BaseException):
    """The process ends here: nothing of it happens any more."""


class Steps:
    """Counts every change of the file system, and lets the process die before one of them.

    A dead process renames, removes and makes nothing more, whatever its `finally` blocks try; its locks are released.

    Attributes:
        count: changes so far.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.count = 0
        self._kill_at = kill_at

    def before(self) -> None:
        """One more change is about to happen."""
        self.count += 1
        if self._kill_at is not None and self.count >= self._kill_at:
            raise Killed


@contextlib.contextmanager
def killed_at(step: int | None) -> Iterator[Steps]:
    """Die before change number `step` (counted from 1); None only counts."""
    steps = Steps(step)

    def counted(real: Callable[..., Any], matters: Callable[..., bool]) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            if matters(*args):
                steps.before()
            return real(*args, **options)

        return change

    with (
        mock.patch("os.replace", counted(os.replace, lambda *_: True)),
        mock.patch.object(Path, "unlink", counted(Path.unlink, lambda path, *_: os.path.lexists(path))),
        mock.patch.object(Path, "rmdir", counted(Path.rmdir, lambda *_: True)),
        mock.patch.object(Path, "mkdir", counted(Path.mkdir, lambda path, *_: not os.path.lexists(path))),
    ):
        yield steps


@contextlib.contextmanager
def full_disk_at(write: int | None) -> Iterator[list[int]]:
    """The disk is full from the flush number `write` on (counted from 1); None only counts."""
    real, count = os.fsync, [0]

    def flush(handle: int) -> None:
        count[0] += 1
        if write is not None and count[0] >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with mock.patch("os.fsync", flush):
        yield count
