"""The one life of a run: request -> plan -> units -> parts -> report.

A command says what it measures (`Command.measure`), how a saved part is read (`read`) and what all parts come to
(`summarize`). `run` does everything else: it locks the folder, starts or continues, lets an executor measure the units
whose parts are missing, writes each part once under a checksum, shows progress, and writes the report last of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

import torch

from anchorscope.devices import is_out_of_memory
from anchorscope.errors import RunFailure
from anchorscope.files import again_remark, human_bytes, read_part, write_atomic, write_part
from anchorscope.pictures import Formats, picture_bytes, picture_formats
from anchorscope.runs.executors import Context, Executor, Threads, Work
from anchorscope.runs.flight import Flying, measure_in_flight
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.options import RunOptions as RunOptions
from anchorscope.runs.pool import Devices
from anchorscope.runs.progress import Progress
from anchorscope.runs.sharing import Sharing
from anchorscope.runs.sources import Source
from anchorscope.runs.units import Unit

if TYPE_CHECKING:
    from typing_extensions import Self

U = TypeVar("U", bound=Unit)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[U]):
    """Everything decided before the first unit is measured.

    Attributes:
        request: what the plan was made of.
        units: what to measure, in order.
        identity: what makes two runs measure the same, as JSON values; a folder continues only the same.
        settings: the request as JSON values, for the report.
        source: where tensors come from; None where a command reads none.
        device: where to compute.
        devices: GPUs that share the units, `device` first; empty where one device does all.
        workers: units measured at the same time.
        memory: bytes of working memory, besides the libraries themselves.
        disk: bytes that tables, parts and report need, about.
        pictures: bytes that the figures need besides, about.
        warnings: sentences for the user.
    """

    request: Any = None
    units: tuple[U, ...]
    identity: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    devices: tuple[torch.device, ...] = ()
    workers: int = 1
    memory: int = 0
    disk: int = 0
    pictures: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def dump(self) -> Source:
        """The source, of a plan that has one."""
        assert self.source is not None, "nothing is read from a source"
        return self.source

    @property
    def jobs(self) -> tuple[U, ...]:
        """The units, by their former name."""
        return self.units

    def refuse_shards(self) -> None:
        """Refuse what cannot be done where others measure some of the units; see `anchorscope.runs.shards`."""

    def needs(self, *, figures: bool = True, formats: Formats = ("png",)) -> str:
        """Memory and disk that a run takes, in words; arguments as of `RunOptions`."""
        disk = self.needed_disk(picture_formats(formats) if figures else {})
        return f"needs about {self.memory_words()} and {human_bytes(disk)} of disk"

    def needed_disk(self, formats: Mapping[str, int]) -> int:
        """Bytes of disk that a run takes, about, with figures in these formats (dpi by format)."""
        return self.disk + picture_bytes(self.pictures, formats)

    def memory_words(self) -> str:
        """The working memory, in words."""
        each = f" on each of {len(self.devices)} GPUs" if self.devices else ""
        return f"{human_bytes(self.memory)} of {'memory' if self.device.type == 'cpu' else 'GPU memory'}{each}"


@dataclass(frozen=True)
class Summary:
    """What the parts of a run come to.

    Attributes:
        report: the report, as JSON values.
        tables: content of the other files at the top of the folder, by name.
        value: what the command returns of it besides.
    """

    report: dict[str, Any]
    tables: Mapping[str, str] = field(default_factory=dict)
    value: Any = None


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, its summary, the figures drawn, and what `Command.extend` made."""

    path: Path
    summary: Summary
    figures: tuple[Path, ...] = ()
    extension: Any = None

    @property
    def report(self) -> dict[str, Any]:
        """What the report holds."""
        return self.summary.report


class BaseCommand(Sharing[U], Flying[U], ABC, Generic[U, T]):
    """What a resumable command says of itself, whatever its parts look like. One object is made for one run.

    Attributes:
        folder: the vocabulary of its folders; parts go into the first of `folder.parts`.
        stage: what progress calls the measuring.
        suffix: the end of its parts' names.
    """

    folder: ClassVar[RunFolder]
    stage: ClassVar[str] = "heads"
    suffix: ClassVar[str] = ".json"

    def __init__(self, plan: Plan[U], options: RunOptions | None = None) -> None:
        self.plan = plan
        self.options = options or RunOptions()

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process is sent: the plan. The command reports to nobody there, and knows no earlier units."""
        return type(self), (self.plan,)

    def on(self, device: torch.device) -> Self:
        """The same command on another device."""
        return type(self)(replace(self.plan, device=device, devices=()))

    @abstractmethod
    def make(self, root: Path, unit: U, context: Context) -> None:
        """Measure a unit and save its part, all or nothing.

        Raises:
            RunFailure: it cannot be written.
        """

    @abstractmethod
    def load(self, root: Path, unit: U) -> T | None:
        """A unit's part, or None where it is missing, damaged or of another run."""

    @abstractmethod
    def summarize(self, parts: Parts[U, T], run: Run) -> Summary:
        """Report and tables, made of the saved parts alone."""

    # some commands

    def holds(self, root: Path, unit: U) -> bool:
        """Whether a unit's part is there and whole, so that it need not be measured."""
        return self.load(root, unit) is not None

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        """Draw the figures into the folder; called only where they are asked for."""
        return ()

    def extend(self, run: Run) -> Any:
        """Make what else was asked for, before the report is written."""
        return None

    def asked(self) -> dict[str, Any]:
        """What is to be made of the measurements; a later command may ask for more."""
        return self.options.asked

    def pieces(self) -> int:
        """How many of the things that `folder.kept` speaks of the run makes."""
        return sum(len(self.files(Path(), unit)) for unit in self.share())

    def executor(self) -> Executor:
        """Who measures on one device, if the caller does not say."""
        return Threads(self.plan.device, self.plan.workers)

    def handed_over(self) -> Any:
        """What a process found besides the parts, for the command that it works for; None where that is nothing."""
        return None

    def take_over(self, found: Any) -> None:
        """Take what a process found besides the parts, see `handed_over`; it is lost where that process dies."""

    def workforce(self) -> Executor:
        """Who measures: whom the caller says, or `executor`."""
        return self.options.executor or self.executor()

    def files(self, root: Path, unit: U) -> tuple[Path, ...]:
        """The files that hold a unit's part."""
        return (root / self.folder.parts[0][0] / (unit.stem + self.suffix),)

    def missing(self, root: Path, unit: U) -> tuple[Path, ...]:
        """Which of its files are to be made, of a unit that has no whole part."""
        return self.files(root, unit)

    def out_of_memory(self) -> str:
        """The sentence to fail with when memory runs out."""
        each = human_bytes(self.plan.memory / self.plan.workers)
        return f"out of memory on {self.plan.device}: about {each} are needed at a time"


class Command(BaseCommand[U, T]):
    """A command whose parts are sealed JSON: `measure`, `read` and `summarize` are all that it says."""

    @abstractmethod
    def measure(self, unit: U, context: Context) -> Mapping[str, Any]:
        """Measure one unit, as JSON values."""

    @abstractmethod
    def read(self, unit: U, saved: dict[str, Any]) -> T | None:
        """What a sealed part holds, or None where it is of another run or not of the right shape."""

    def make(self, root: Path, unit: U, context: Context) -> None:
        write_part(self.files(root, unit)[0], self.measure(unit, context))

    def load(self, root: Path, unit: U) -> T | None:
        saved = read_part(self.files(root, unit)[0])
        return None if saved is None else self.read(unit, saved)


class Parts(Sequence[T], Generic[U, T]):
    """The saved parts of a run in the order of its units; each is read when it is asked for, since some are large."""

    def __init__(self, command: BaseCommand[U, T], root: Path) -> None:
        self._command, self._root = command, root
        self.units = command.plan.units

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = self._command.load(self._root, self.units[index])
        if part is None:
            file = next(iter(self._command.missing(self._root, self.units[index])), self._root)
            raise RunFailure(f"{file} cannot be read back: run the same command again")
        return part

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Make(Generic[U]):
    """Makes the parts of a command in a folder; what `executors.Work.measure` is in a run.

    Attributes:
        command: the command.
        root: its folder.
    """

    command: BaseCommand[U, Any]
    root: Path

    def __call__(self, unit: U, context: Context) -> None:
        self.command.make(self.root, unit, context)

    def on(self, device: torch.device) -> Make[U]:
        """The same on another device; see `BaseCommand.on`."""
        return Make(self.command.on(device), self.root.absolute())


def run(command: BaseCommand[U, T], out: Path | str) -> Finished:
    """Carry out a command's plan in a folder that is new, empty, or holds an unfinished run of the same request.

    Raises:
        InputError: the folder cannot be used, is in use, or holds something else.
        RunFailure: the disk is full, or memory runs out.
        Interrupted: Ctrl-C; says what is kept.
    """
    with _workforce(command):
        return _run(command, out)


@contextmanager
def _workforce(command: BaseCommand[U, T]) -> Iterator[None]:
    """Let an executor on the plan's devices work for the command and for all that it starts, and end it after that."""
    if command.options.executor is not None or not command.plan.devices:
        yield
        return
    with Devices(command.plan.devices) as executor:
        command.options = replace(command.options, executor=executor)
        yield


def _run(command: BaseCommand[U, T], out: Path | str) -> Finished:
    options = command.options
    command.check_shares()
    with _begun(command, out) as under_way:
        _measure(command, under_way)
        if options.shard is not None:
            return Finished(under_way.path, Summary({}, value=()), (), command.extend(under_way))
        summary = command.summarize(Parts(command, under_way.path), under_way)
        for name, text in summary.tables.items():
            write_atomic(under_way.path / name, text.encode())
        figures: tuple[Path, ...] = ()
        if under_way.asked["figures"]:
            options.report(Progress("figures", 0, 1))
            figures = tuple(command.draw(under_way, summary))
            options.report(Progress("figures", 1, 1))
        extension = command.extend(under_way)
        under_way.finish(summary.report)
        return Finished(under_way.path, summary, figures, extension)


def _begun(command: BaseCommand[U, T], out: Path | str) -> AbstractContextManager[Run]:
    """The command's run in its folder, locked."""
    plan, options = command.plan, command.options
    disk = plan.needed_disk(options.pictures) // (options.shard.of if options.shard else 1)
    how: dict[str, Any] = {"disk": disk, "pieces": command.pieces(), "recipe": command.recipe(), **options.replacing}
    return command.folder.run(Path(out), command.identity(), asked=command.asked(), **how)


def _measure(command: BaseCommand[U, T], under_way: Run) -> None:
    """Let the executor make the parts that are not there yet."""
    plan, options, root = command.plan, command.options, under_way.path
    flown = measure_in_flight(command, under_way, _begun)
    units = command.share()
    missing = [unit for unit in units if not command.holds(root, unit)]
    if (remark := again_remark(file for unit in missing for file in command.missing(root, unit))) is not None:
        options.tell(remark)
    total = sum(unit.work for unit in units)
    done = total - (0 if flown else sum(unit.work for unit in missing))
    within: dict[str, int] = {}  # of the units at work, by stem; under no name where one is at a time
    options.report(Progress(command.stage, done, total))

    def report(detail: str) -> None:
        options.report(Progress(command.stage, min(done + sum(within.values()), total), total, detail))

    def tick(work: int, detail: str = "", unit: str = "") -> None:
        within[unit] = within.get(unit, 0) + work
        report(detail)

    def finished(unit: U) -> None:
        nonlocal done
        done = min(done + unit.work, total)
        for name in ("", unit.stem):
            within.pop(name, None)
        report(unit.label)

    work = Work(missing, Make(command, root), finished, plan.source, tick, options.tell)
    try:
        command.workforce().run(work)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailure(command.out_of_memory()) from None
