"""What was measured on another machine: its hardware and versions count in a report, not those of this one.

Merging shards measures nothing, and the machine that gives a cluster work measures nothing either, so neither needs a
GPU; yet the report names the GPU that measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Elsewhere:
    """Where parts were measured.

    Attributes:
        hardware: name of the device.
        versions: as `runs.environment.versions` gives them.
        started: when the first of them began, or None where they are being measured.
    """

    hardware: str
    versions: Mapping[str, str | None]
    started: str | None


_here: ContextVar[Elsewhere | None] = ContextVar("elsewhere", default=None)


def elsewhere() -> Elsewhere | None:
    """Where everything is measured, or None: then it is measured here."""
    return _here.get()


@contextmanager
def measured(where: Elsewhere) -> Iterator[None]:
    """While inside, plans and reports are those of another machine, and nothing may be measured."""
    token = _here.set(where)
    try:
        yield
    finally:
        _here.reset(token)
