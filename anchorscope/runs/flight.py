"""Measuring while a model runs: each layer passes once, and everything that needs it is measured then.

A command that reads a dump measures unit after unit. With a running model the layers set the pace: whatever one command
wants of a layer (profiles with several kinds of groups, what kind of head each one is) is measured while that layer is
at hand, by the command's own executor and into its own folder, and the layer is dropped. Parts are the same as with a
dump, so everything behind the measuring, and an interrupted run, is too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from anchorscope.devices import is_out_of_memory
from anchorscope.dumps import Entry
from anchorscope.dumps.format import MAX_MANIFEST_BYTES
from anchorscope.errors import InputError, RunFailure
from anchorscope.files import again_remark, json_bytes, read_json, write_atomic
from anchorscope.runs.executors import Context, Work
from anchorscope.runs.folder import SOURCE, Run
from anchorscope.runs.pool import Devices
from anchorscope.runs.progress import Progress
from anchorscope.runs.sources import DEVICES, InFlight, Wanted
from anchorscope.runs.units import Unit

if TYPE_CHECKING:
    from anchorscope.runs.life import BaseCommand, RunOptions

U = TypeVar("U", bound=Unit)


class Flying(Generic[U]):
    """The part of `life.BaseCommand` that is about layers which pass once."""

    def look(self, unit: U, context: Context) -> None:
        """Take what a unit needs of an earlier layer, which is at hand now and not when the unit is measured."""

    def companions(self, run: Run) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        """Other runs, and their folders, that this one will make, and that need layers of a running model now."""
        return ()


@dataclass
class Job:
    """One run that waits for layers, in its locked folder.

    Attributes:
        command: measures and saves.
        root: its folder.
        missing: units without a whole part.
        at: those that are measured when a layer passes, by layer.
        before: those that are measured later and look at an earlier layer, by that layer.
    """

    command: BaseCommand[Any, Any]
    root: Path
    missing: list[Any] = field(default_factory=list)
    at: dict[Entry, list[Any]] = field(default_factory=dict)
    before: dict[Entry, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missing = [unit for unit in self.units if not self.command.holds(self.root, unit)]
        for unit in self.missing:
            *earlier, last = (entry for entry, _ in unit.needs)
            self.at.setdefault(last, []).append(unit)
            for entry in earlier:
                self.before.setdefault(entry, []).append(unit)

    @property
    def units(self) -> list[Any]:
        """All units that need tensors, measured before or not."""
        return [unit for unit in self.command.share() if getattr(unit, "needs", ())]

    @property
    def source(self) -> InFlight | None:
        """The running model, if it is one that tensors come from."""
        source = self.command.plan.source
        return source if isinstance(source, InFlight) else None

    def visit(self, entry: Entry, finished: Callable[[Any], None], tick: Any) -> None:
        """Measure what is to be measured of a layer at hand.

        Raises:
            RunFailure: memory runs out, or a part cannot be written.
        """
        command, units = self.command, self.at.get(entry, [])
        with self._memory():
            if units:
                work = Work(units, self._make, finished, command.plan.source, tick, command.options.tell)
                command.workforce().run(work)
            else:
                for unit in self.before.get(entry, []):
                    command.look(unit, Context(command.plan.device))

    def _make(self, unit: Any, context: Context) -> None:
        self.command.make(self.root, unit, context)

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailure(self.command.out_of_memory()) from None


def measure_in_flight(
    command: BaseCommand[Any, Any],
    under_way: Run,
    begin: Callable[[BaseCommand[Any, Any], Path], contextlib.AbstractContextManager[Run]],
) -> bool:
    """Measure what comes from a running model, for a run and for those that it will make.

    Args:
        command: the command.
        under_way: its run.
        begin: begins the run of another command in its folder, locked.

    Returns:
        Whether there is anything that comes from a running model.

    Raises:
        InputError, RunFailure: the model or a layer is refused, or measuring failed.
    """
    with contextlib.ExitStack() as stack:
        jobs = [Job(command, under_way.path)] if isinstance(command.plan.source, InFlight) else []
        for other, folder in command.companions(under_way):
            jobs.append(Job(other, stack.enter_context(begin(other, folder)).path))
        return fly(jobs, command.options)


def fly(jobs: Sequence[Job], options: RunOptions) -> bool:
    """Measure the missing units of all jobs whose tensors come from a running model, in as few passes as there are.

    Args:
        jobs: the runs; others are left alone. Their folders are locked.
        options: who is told of progress and remarks.

    Returns:
        Whether there was any such job.

    Raises:
        InputError, RunFailure: the model or a layer is refused, or measuring failed.
    """
    from anchorscope.runs.cluster import RayTasks  # imports `life`

    jobs = [job for job in jobs if job.source is not None]
    again = [file for job in jobs for unit in job.missing for file in job.command.missing(job.root, unit)]
    if (remark := again_remark(again)) is not None:
        options.tell(remark)
    meter = _Meter(options, sum(u.work for job in jobs for u in job.units))
    meter.add(meter.total - sum(unit.work for job in jobs for unit in job.missing))
    if any(isinstance(job.command.workforce(), (Devices, RayTasks)) for job in jobs):
        raise InputError(DEVICES)
    for source in {id(job.source): job.source for job in jobs}.values():
        assert source is not None
        _fly(source, [job for job in jobs if job.source is source], meter)
    return bool(jobs)


def _fly(source: InFlight, jobs: Sequence[Job], meter: _Meter) -> None:
    for job in jobs:
        with contextlib.suppress(InputError):  # a new folder has none
            source.recall(read_json(job.root / SOURCE, MAX_MANIFEST_BYTES, "source"))

    def keep() -> None:
        data = json_bytes(source.record())
        for job in jobs:
            write_atomic(job.root / SOURCE, data)

    def visit(entry: Entry) -> None:
        for job in jobs:
            job.visit(entry, meter.finished, meter.tick)

    keep()
    asked = {entry: None for job in jobs for unit in job.units for entry, _ in unit.needs}
    source.fly(Wanted(tuple(asked), _kv_heads(jobs), visit, keep))


def _kv_heads(jobs: Sequence[Job]) -> dict[Entry, tuple[int, ...]]:
    """The layers that must pass, and the kv heads that are needed of each."""
    found: dict[Entry, set[int]] = {}
    for job in jobs:
        for unit in job.missing:
            for entry, heads in unit.needs:
                found.setdefault(entry, set()).update(entry.kv_head(h) for h in heads)
    return {entry: tuple(sorted(heads)) for entry, heads in found.items()}


class _Meter:
    """Adds up progress over all jobs."""

    def __init__(self, options: RunOptions, total: int) -> None:
        self.total = total
        self._options, self._done = options, 0
        self._within: dict[str, int] = {}  # of the units at work, by stem; under no name where one is at a time

    def add(self, work: int) -> None:
        """Say where the run begins."""
        self._done += work
        if self.total:
            self._report("")

    def tick(self, work: int, detail: str = "", unit: str = "") -> None:
        """See `anchorscope.runs.executors.Tick`."""
        self._within[unit] = self._within.get(unit, 0) + work
        self._report(detail)

    def finished(self, unit: Any) -> None:
        """See `anchorscope.runs.executors.Work.finished`."""
        self._done += unit.work
        for name in ("", unit.stem):
            self._within.pop(name, None)
        self._report(unit.label)

    def _report(self, detail: str) -> None:
        done = min(self._done + sum(self._within.values()), self.total)
        self._options.report(Progress("heads", done, self.total, detail))
