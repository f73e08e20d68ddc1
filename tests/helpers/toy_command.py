"""A new resumable command, whole: a request, `measure`, `read`, `summarize`, and its folder's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anchorscope.files import csv_text
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.life import Command, Plan, Summary, run
from anchorscope.runs.request import planned, split, takes


@dataclass(frozen=True)
class Number:
    value: int
    work: int = 1

    @property
    def stem(self) -> str:
        return f"square-{self.value}"

    label = stem


@dataclass(frozen=True)
class SquaresRequest:
    numbers: tuple[int, ...]

    def plan(self) -> Plan[Number]:
        units = tuple(Number(n) for n in self.numbers)
        return Plan(request=self, units=units, identity={"numbers": list(self.numbers)}, memory=64, disk=1_500_000)


class SquaresCommand(Command[Number, int]):
    folder: ClassVar[RunFolder] = RunFolder(
        what="a list of squares",
        command="squares",
        format="squares-run",
        version=1,
        report="squares.json",
        tables=("squares.csv",),
        kept=("square", "parts/*.json"),
    )

    def measure(self, unit, context):
        return {"number": unit.value, "square": unit.value**2}

    def read(self, unit, saved):
        return saved["square"] if saved["number"] == unit.value else None

    def summarize(self, parts, run):
        return Summary({"sum": sum(parts)}, {"squares.csv": csv_text(("square",), [[x] for x in parts])})


@takes(SquaresRequest)
def squares(numbers, out, *, plan=None, **options):
    how, asked = split(options)
    return run(SquaresCommand(planned(SquaresRequest, plan, numbers, asked), how), out).report
