"""The errors a user can meet, each one sentence: what is wrong, where, and what to do.

The CLI turns them into exit codes (2: bad usage or input, 1: the run failed) and never shows a traceback for them.
Library callers can catch `AnchorScopeError`, or `ValueError` / `RuntimeError` as usual.
"""

from __future__ import annotations


class AnchorScopeError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class InputError(AnchorScopeError, ValueError):
    """Bad usage or bad input: the caller can fix it (exit code 2)."""

    exit_code = 2


class BadOption(AnchorScopeError):
    """An option of the command line with a value that it cannot have (exit code 2)."""

    exit_code = 2


class DumpError(InputError):
    """A dump folder that is missing, incomplete, damaged or not a dump (exit code 2)."""


class MissingBackendError(InputError, RuntimeError):
    """CUDA, Triton or an optional dependency was asked for and is absent (exit code 2)."""


class RunFailure(AnchorScopeError, RuntimeError):
    """The request was fine but the run could not finish: disk full, out of memory (exit code 1)."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, with a sentence that says what is kept (exit code 130).

    It stays a KeyboardInterrupt, so that `except Exception` does not swallow it.
    """


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text that says something, with the next where it ends in a colon; or its type.

    Args:
        error: anything that was raised.
        most: how many characters are kept.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    while lines[0].endswith(":") and len(lines) > 1:
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0][:most]


def type_and_line(error: BaseException, most: int = 300) -> str:
    """An error's type and its first line, for errors of other programs' code."""
    kind, line = type(error).__name__, first_line(error, most)
    return kind if line == kind else f"{kind}: {line}"
