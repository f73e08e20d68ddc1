"""Who works: an executor takes the units of a run and measures them, in whatever order and number at a time.

An executor knows nothing of commands, and commands nothing of executors: a unit's part is written by its measurement,
and reports are made of all parts in a fixed order. So the result is the same bytes whoever did the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from anchorscope.dumps import Dump, LayerTensors
from anchorscope.runs.environment import full_precision
from anchorscope.runs.progress import Cancelled
from anchorscope.runs.sources import Source
from anchorscope.runs.units import HeadUnit, Unit

AHEAD = 2  # layers read while a GPU measures one: reading and its checksum take as long
MEMORY_BUDGET = 8 << 30  # bytes that units measured at the same time may take together

U = TypeVar("U", bound=Unit)


class Tick(Protocol):
    """Is told of progress within a unit: of the unit whose stem is given, where several are at work."""

    def __call__(self, work: int, detail: str = "", unit: str = "") -> None: ...


def no_tick(work: int, detail: str = "", unit: str = "") -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Context:
    """What the measurement of a unit gets besides the unit.

    Attributes:
        device: where to compute.
        tensors: of the unit's layer, on the CPU, if the run has a source.
        stop: is set when the run ends early.
        tick: is told how much more of the unit's work is done, and of what; in the main thread only.
    """

    device: torch.device
    tensors: LayerTensors | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    tick: Tick = no_tick

    def check(self) -> None:
        """Leave if the run ends early.

        Raises:
            Cancelled: it does.
        """
        if self.stop.is_set():
            raise Cancelled

    def head(self, head: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q (N, d), K (N, d) and V (N, d_v) or None of one query head, in the stored dtype, on `device`."""
        assert self.tensors is not None, "the run has no source"
        kv = self.tensors.kv_index(head)
        q, k = self.tensors.q[self.tensors.query_heads.index(head)], self.tensors.k[kv]
        v = None if self.tensors.v is None else self.tensors.v[kv].to(self.device)
        return q.to(self.device), k.to(self.device), v


@dataclass(frozen=True)
class Work(Generic[U]):
    """What an executor has to do.

    Attributes:
        units: the units, in order.
        measure: measures one and writes its part; may run in any thread. `life.Make` may be sent to other processes.
        finished: is told of every unit that is done, in the main thread.
        source: where the tensors of heads come from.
        tick: see `Context.tick`.
        tell: is told sentences for the user, in the main thread.
    """

    units: Sequence[U]
    measure: Callable[[U, Context], None]
    finished: Callable[[U], None] = lambda unit: None
    source: Source | None = None
    tick: Tick = no_tick
    tell: Callable[[str], None] = lambda sentence: None

    def with_tensors(self, ahead: int = 0) -> Iterator[tuple[U, LayerTensors | None]]:
        """Every head with its layer's tensors, which heads of one layer share; other units find their own. Of a dump
        so many layers are read ahead.
        """
        heads = [unit for unit in self.units if isinstance(unit, HeadUnit)]
        if self.source is None or len(heads) < len(self.units):
            yield from ((unit, None) for unit in self.units)
            return
        layers = [(entry, list(units)) for entry, units in groupby(heads, key=lambda unit: unit.entry)]
        wanted = ((entry, [unit.head for unit in units]) for entry, units in layers)
        source = self.source
        tensors = source.stream(wanted, ahead=ahead) if isinstance(source, Dump) else source.stream(wanted)
        for (_, units), loaded in zip(layers, tensors, strict=True):
            for unit in units:
                yield unit, loaded


def threads_for(units: Sequence[object], each: int) -> int:
    """Heads at a time on a CPU: one head per core beats one head on all cores, as far as memory goes."""
    return max(1, min(torch.get_num_threads(), len(units), MEMORY_BUDGET // each))


class Executor(Protocol):
    """Carries out the units of a run: `pool.Devices` does on several GPUs."""

    def run(self, work: Work[U]) -> None:
        """Measure all units, or raise what the first failing measurement raised."""
        ...


@dataclass(frozen=True)
class InTurn:
    """One unit after another, in the caller's thread."""

    device: torch.device

    def run(self, work: Work[U]) -> None:
        """See `Executor`."""
        for unit, tensors in work.with_tensors():
            work.measure(unit, Context(self.device, tensors, tick=work.tick))
            work.finished(unit)


@dataclass(frozen=True)
class Threads:
    """Some units at a time in threads of this process, at full float32 precision; each layer is read once.

    Attributes:
        device: where all of them compute.
        workers: units at a time; with more than one, each uses one thread of torch.
    """

    device: torch.device
    workers: int = 1

    def run(self, work: Work[U]) -> None:
        """See `Executor`."""
        threads = torch.get_num_threads()
        stop = threading.Event()
        pending: dict[Future[None], U] = {}

        def prepare() -> None:
            if self.workers > 1:
                torch.set_num_threads(1)

        def collect() -> None:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                unit = pending.pop(future)
                future.result()
                work.finished(unit)

        pool = ThreadPoolExecutor(self.workers, initializer=prepare)
        with full_precision():  # of the process: set around all workers, so that none's end changes it under another
            try:
                for unit, tensors in work.with_tensors(AHEAD if self.device.type == "cuda" else 0):
                    pending[pool.submit(work.measure, unit, Context(self.device, tensors, stop))] = unit
                    while len(pending) >= self.workers:
                        collect()
                while pending:
                    collect()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                torch.set_num_threads(threads)
