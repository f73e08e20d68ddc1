"""A command whose units fail on purpose where a worker measures them, once or always: devices that break down."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from toy_command import SquaresCommand

from anchorscope.runs.life import Plan


@dataclass(frozen=True)
class Fault:
    """A number to square, and what happens to whoever tries.

    Attributes:
        value: the number.
        kind: "", "memory", "device", "killed" or "error".
        once: a file; where it is there, nothing happens any more. None means always.
    """

    value: int
    kind: str = ""
    once: Path | None = None
    work: int = 1

    @property
    def stem(self) -> str:
        return f"square-{self.value}"

    label = stem

    def strike(self) -> None:
        if self.once is not None:
            try:
                os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if self.kind == "device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "error":
            raise ZeroDivisionError("of this unit alone")


class FaultyCommand(SquaresCommand):
    def __init__(self, plan, options=None):
        super().__init__(plan, options)
        self.seen = []

    def handed_over(self):
        found, self.seen = self.seen, []
        return found

    def take_over(self, found):
        self.seen.extend(found)

    def measure(self, unit, context):
        self.seen.append(unit.value)
        time.sleep(0.02)  # so that both workers get some
        context.tick(1)
        unit.strike()
        return super().measure(unit, context)


def plan(units: list[Fault], workers: int = 1) -> Plan[Fault]:
    return Plan(units=tuple(units), identity={"numbers": [u.value for u in units]}, memory=64, workers=workers)
