"""`bench`: dense and sparse attention timed on the same inputs, with what the sparse selection kept.

Every case is timed by itself and saved as one part; bench.json and its figures are made from the parts. An interrupted
bench continues: what was timed stays, and bench.json says which rows come from which start. A part is taken up only in
the same request, on the same machine, with the same versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from anchorscope import views
from anchorscope.bench.cases import Case
from anchorscope.bench.compare import comparison
from anchorscope.bench.environment import hardware
from anchorscope.bench.measure import time_case
from anchorscope.bench.output import FOLDER, VERSION
from anchorscope.bench.request import BenchConfig, BenchPlan
from anchorscope.bench.rows import FORMAT, BenchResult, MeasuredRow, Start, plain, restored
from anchorscope.devices import is_out_of_memory
from anchorscope.dumps import Dump
from anchorscope.errors import RunFailure
from anchorscope.moved import moved
from anchorscope.notebook import InNotebook
from anchorscope.runs.environment import versions
from anchorscope.runs.executors import Context, Executor, InTurn, Tick
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import Command, Parts, RunOptions, Summary, run
from anchorscope.runs.progress import Progress, ProgressCallback
from anchorscope.runs.request import split, takes
from anchorscope.shown import counted

_ROWS = ("Row", "DenseRow", "SparseRow", "Check", "FORMAT_VERSION")
__getattr__ = moved(__name__, {"DTYPES": "anchorscope.bench.request"} | dict.fromkeys(_ROWS, "anchorscope.bench.rows"))


@dataclass(frozen=True, repr=False)
class Bench(InNotebook):
    """A finished bench in its folder.

    Attributes:
        path: the output folder.
        report: what bench.json holds.
        result: the same as a `BenchResult`.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any]
    result: BenchResult = field(repr=False)
    figures: tuple[Path, ...] = ()
    look = views.bench


@dataclass(frozen=True)
class Remarks:
    """What a result says besides its times.

    Attributes:
        command: the command line, or None.
        against: name and content of an older bench.json to compare with, or None.
    """

    command: str | None = None
    against: tuple[str, Mapping[str, Any]] | None = None

    def report(self, result: BenchResult) -> dict[str, Any]:
        """The content of bench.json."""
        data = result.to_json()
        return data if self.against is None else {**data, "against": comparison(data, *self.against)}


def run_bench(
    config: BenchConfig,
    dump: str | Path | None = None,
    *,
    progress: Callable[[float, str], None] = lambda share, text: None,
    command: str | None = None,
) -> BenchResult:
    """Time sparse against dense attention; nothing is written.

    Args:
        config: what to time.
        dump: a dump folder to take inputs from; planted input without.
        progress: called with (share done from 0 to 1, what is being done).
        command: the command line, recorded in the result.

    Raises:
        InputError: settings that do not fit each other or the dump; DumpError for the dump itself.
        MissingBackendError: CUDA or Triton was asked for and is absent.
        RunFailure: out of memory.
    """

    def share(event: Progress) -> None:
        progress(event.work / event.total, event.detail)

    return _measure(BenchCommand(config.plan(dump), RunOptions(progress=share), Remarks(command)))


def measure_plan(plan: BenchPlan, progress: ProgressCallback, remarks: Remarks) -> dict[str, Any]:
    """Carry out a plan without a folder: the content of bench.json; see `run_bench`."""
    return remarks.report(_measure(BenchCommand(plan, RunOptions(progress=progress), remarks)))


def _measure(command: BenchCommand) -> BenchResult:
    """The rows of a plan, measured in turn and kept in memory."""
    rows: list[MeasuredRow] = []
    total, done = sum(case.work for case in command.plan.units), 0

    def tick(work: int, detail: str = "", unit: str = "") -> None:
        nonlocal done
        done += work
        command.options.report(Progress(command.stage, done, total, detail))

    try:
        for case in command.plan.units:
            rows.append(command.timed(case, tick))
            done = sum(c.work for c in command.plan.units[: len(rows)])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailure(command.out_of_memory()) from None
    command.options.report(Progress(command.stage, total, total, "done"))
    return command.result(rows)


@takes(RunOptions, None)
def bench(
    config: BenchConfig,
    out: Path | str,
    dump: Dump | Path | str | None = None,
    *,
    command: str | None = None,
    against: tuple[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Bench:
    """Time sparse against dense attention into a folder; an interrupted bench continues.

    Args:
        config: what to time.
        out: the output folder; new, empty, or holding an unfinished bench of the same request, machine and versions,
            which then continues.
        dump: a dump folder, or an open dump, to take inputs from; planted input without.
        command: the command line, recorded in the result.
        against: name and content of an older bench.json to compare with (see `load_result`).
        **options: the fields of `RunOptions`.

    Returns:
        The finished bench. `out` then holds bench.json, parts/ and the figures: time and, with two thetas or more,
        density.

    Raises:
        InputError, DumpError, MissingBackendError: see `BenchConfig.plan`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    how, _ = split(options)
    FOLDER.refuse_early(Path(out), how.asked, **how.replacing)
    return bench_plan(config.plan(dump), out, how, Remarks(command, against))


def bench_plan(plan: BenchPlan, out: Path | str, options: RunOptions, remarks: Remarks | None = None) -> Bench:
    """Carry out a plan; see `bench`."""
    done = run(BenchCommand(plan, options, remarks), out)
    return Bench(done.path, done.report, done.summary.value, done.figures)


class BenchCommand(Command[Case, MeasuredRow]):
    """See `anchorscope.runs.life.Command`."""

    folder: ClassVar[RunFolder] = FOLDER
    stage: ClassVar[str] = "bench"
    plan: BenchPlan

    def __init__(self, plan: BenchPlan, options: RunOptions | None = None, remarks: Remarks | None = None) -> None:
        super().__init__(plan, options)
        self.remarks = remarks or Remarks()
        self.started = _now()
        self._case = plan.units[0]

    def executor(self) -> Executor:
        """One case after another, since nothing may run beside a timing."""
        return InTurn(self.plan.device)

    def measure(self, unit: Case, context: Context) -> dict[str, Any]:
        measured = self.timed(unit, context.tick)
        return {"format": f"{FORMAT}-case", "version": VERSION, "bench": self.plan.digest, **plain(asdict(measured))}

    def timed(self, case: Case, tick: Tick) -> MeasuredRow:
        """The row of a case, with what this command knows."""
        self._case, done = case, 0

        def tell(share: float, what: str) -> None:
            nonlocal done
            more = int(share * case.work) - done
            done += more
            tick(more, f"{case.label}: {what}")

        row = time_case(case, self.plan.setup, tell)
        return MeasuredRow(self.started, _now(), hardware(self.plan.device), row)

    def read(self, unit: Case, saved: dict[str, Any]) -> MeasuredRow | None:
        try:
            measured = restored(MeasuredRow, saved)
        except ValueError:
            return None
        same = saved.get("bench") == self.plan.digest and saved.get("version") == VERSION
        return measured if same and all(getattr(measured.row, k) == x for k, x in unit.facts.items()) else None

    def summarize(self, parts: Parts[Case, MeasuredRow], run: Run) -> Summary:
        result = self.result(list(parts))
        return Summary(self.remarks.report(result), value=result)

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        from anchorscope.bench.figures import draw_all

        model = None if self.plan.source is None else self.plan.source.model

        return draw_all(summary.report, run.path, model, formats=run.pictures)

    def result(self, rows: Sequence[MeasuredRow]) -> BenchResult:
        """All rows together; the bench was created, and its hardware last looked at, with the last of them."""
        last = sorted(rows, key=lambda measured: measured.created)[-1]
        times = sorted({measured.started for measured in rows})
        starts = [Start(t, tuple(i for i, x in enumerate(rows) if x.started == t)) for t in times]
        return BenchResult(
            created=last.created,
            command=self.remarks.command,
            settings=self.plan.settings,
            versions=versions(),
            hardware=last.hardware,
            rows=tuple(measured.row for measured in rows),
            starts=tuple(starts) if len(starts) > 1 else (),
        )

    def out_of_memory(self) -> str:
        case = self._case
        timed = max((c.n for c in self.plan.units[: case.index]), default=None)
        fits = f"; N = {timed:,} fitted, use --lengths up to that" if timed else ""
        return (
            f"out of memory on {self.plan.device} at N = {case.n:,} with {counted(case.heads, 'head')} of"
            f" {case.head_dim}"
            f"{fits} (or fewer heads, or a shorter --lengths)"
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
