"""What a run tells its caller while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a progress callback gets.

    Attributes:
        stage: what is being done: "heads", "figures", ...
        work: how much of it is done; for heads in (query, key) pairs, so that the time left follows from it.
        total: how much there is.
        detail: what is worked on, in words.
    """

    stage: str
    work: int
    total: int
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


class Cancelled(Exception):
    """The caller asked a measurement to stop."""
