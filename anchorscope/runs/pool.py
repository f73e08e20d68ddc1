"""An executor on several devices of this machine: a process for each, so that none waits for another's Python.

Processes, not threads: measuring a head is thousands of short launches from Python, and a GPU that fails spoils the
process that used it. The parts are files, so a worker needs only the plan, its units and where the parts go.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from anchorscope.dumps import Dump
from anchorscope.errors import InputError, RunFailure, first_line
from anchorscope.runs.executors import Work
from anchorscope.runs.folder import remove_strays
from anchorscope.runs.spread import Spread, batches
from anchorscope.runs.units import Unit
from anchorscope.runs.worker import PROGRAM, receive, send

if TYPE_CHECKING:
    from typing_extensions import Self

U = TypeVar("U", bound=Unit)
AHEAD = 2  # batches whose layers are read while one is measured
GRACE = 10.0  # seconds until a process that was asked to end is ended


class Worker:
    """One process and its device.

    Attributes:
        device: where it computes.
        process: the process.
        batches: numbers of the batches that it has and that are not done, in order.
        resting: whether it was told that there is no more for now, or has nothing yet.
        ticks: what it said of units that are not done, by stem.
    """

    def __init__(self, device: torch.device, inbox: queue.Queue[tuple[Worker, Any]]) -> None:
        self.device = device
        self.batches: list[int] = []
        self.resting = True
        self.under_way = 0  # how often it was set to work and has not said that it rests
        self.ticks: dict[str, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the run, which ends its workers
        )
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def _listen(self, inbox: queue.Queue[tuple[Worker, Any]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for message in receive(answers):  # type: ignore[arg-type]  # binary
                inbox.put((self, message))
        inbox.put((self, ("gone",)))

    def send(self, *message: object) -> None:
        """Say something to the process; one that has died says so itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            send(self.process.stdin, message)  # type: ignore[arg-type]  # binary

    def end(self) -> None:
        """End the process at once; what it was writing stays under a temporary name."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def fate(self) -> str:
        """How a process ended, in words."""
        code = self.process.wait(GRACE)
        if code >= 0:
            return f"its process ended with code {code}"
        try:
            return f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
        except ValueError:
            return f"its process was killed by signal {-code}"


class Devices:
    """Units measured by one process for each device, whoever is free; see `Executor`.

    A device that runs out of memory, fails, or whose process dies gets nothing any more, and its units go to the
    others. Processes start when there is something to do and serve every run until `close`; a context manager closes.

    Args:
        devices: where to compute. Results are the same bytes as one device's if all are of one kind.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self.workers: list[Worker] = []
        self._inbox: queue.Queue[tuple[Worker, Any]] = queue.Queue()
        self._lost: list[tuple[torch.device, str, bool]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        while self.workers:
            self.workers.pop().end()
        self._inbox = queue.Queue()  # what they still said is about nothing

    def run(self, work: Work[U]) -> None:
        """See `Executor`.

        Raises:
            RunFailure: no device is left.
        """
        share = _Share(batches(work.units, len(self.devices)), work)
        if work.source is not None and not isinstance(work.source, Dump):
            raise InputError("several devices share the layers of a dump; a model that runs is measured on one device")
        root = work.measure.root  # type: ignore[attr-defined]  # a `life.Make`
        before = len(self._lost)
        try:
            self._begin(share)
            while share.open or any(worker.under_way for worker in self.workers):
                self._deal(share)
                self._hear(share)
        except BaseException:
            self.close()
            remove_strays(root)
            raise
        if len(self._lost) > before:
            remove_strays(root)

    def _begin(self, share: _Share[U]) -> None:
        """Start the processes that are needed, and tell all of them what the work is."""
        gone = {device for device, *_ in self._lost}
        for index, device in enumerate(self.devices):
            if len(self.workers) <= index < len(share.todo) and device not in gone:
                self.workers.append(Worker(device, self._inbox))
        for worker in self.workers:
            make = share.work.measure.on(worker.device)  # type: ignore[attr-defined]
            worker.batches, worker.ticks = [], {}
            worker.send("job", make, share.work.source, torch.get_num_threads())

    def _deal(self, share: _Share[U]) -> None:
        """Give everybody batches in turns, a few more than they work on, and say so where there is no more."""
        while needy := [w for w in self.workers if len(w.batches) < share.depth and share.spread]:
            worker = min(needy, key=lambda w: len(w.batches))
            worker.batches.append(number := share.spread.take(worker))
            worker.under_way += worker.resting
            worker.resting = False
            worker.send("units", share.todo[number])
        for worker in self.workers:
            if not share.spread and not worker.resting:
                worker.resting = True
                worker.send("rest")

    def _hear(self, share: _Share[U]) -> None:
        """Wait for a message, and act on it."""
        worker, (kind, *rest) = self._inbox.get()
        if worker not in self.workers:
            return
        if kind == "tick":
            count, detail, stem = rest
            worker.ticks[stem] = worker.ticks.get(stem, 0) + count
            share.work.tick(count, detail, stem)
        elif kind == "done":
            worker.ticks.pop(rest[0], None)
            share.finish(worker, rest[0])
        elif kind == "rested":
            worker.under_way -= 1
            if rest[0] is not None:
                share.work.measure.command.take_over(rest[0])  # type: ignore[attr-defined]
        elif kind == "gone":
            self._lose(worker, share, worker.fate())
        else:
            self._fail(worker, share, *rest)

    def _fail(self, worker: Worker, share: _Share[U], kind: str, error: BaseException, trace: str) -> None:
        """A measurement raised something: the device's fault, or that of what was asked."""
        if kind == "error":
            raise error from _Remote(trace)
        self._lose(worker, share, "ran out of memory" if kind == "memory" else f"failed ({first_line(error)})", kind)

    def _lose(self, worker: Worker, share: _Share[U], why: str, kind: str = "") -> None:
        """Do without a device.

        Raises:
            MemoryError, RunFailure: it was the last one.
        """
        self.workers.remove(worker)
        worker.end()
        self._lost.append((worker.device, why, kind == "memory"))
        for stem, count in worker.ticks.items():
            share.work.tick(-count, "", stem)
        share.spread.put_back(worker.batches, worker)
        if not share.open:
            return
        if self.workers:
            others = ", ".join(str(w.device) for w in self.workers)
            share.work.tell(f"{worker.device}: {why}; its work goes to {others}")
            return
        if all(memory for *_, memory in self._lost):
            raise MemoryError
        said = "; ".join(f"{device}: {reason}" for device, reason, _ in self._lost)
        raise RunFailure(f"no device is left ({said}); what is measured is kept, give the same command again")


class _Remote(Exception):
    """Stands for the traceback of another process."""


class _Share(Generic[U]):
    """The units of one run on their way: batches to do, who may take them, how many are not done."""

    def __init__(self, todo: list[tuple[U, ...]], work: Work[U]) -> None:
        self.todo, self.work = todo, work
        self.spread = Spread(len(todo))
        executor = work.measure.command.executor()  # type: ignore[attr-defined]
        # An executor that has so many batches says what is done before it asks for more.
        self.depth = getattr(executor, "workers", 1) + AHEAD + 1
        self.open = sum(map(len, todo))

    def finish(self, worker: Worker, stem: str) -> None:
        """A unit is done; if its worker dies later, the others of the batch are what is left."""
        number, done = next((n, unit) for n in worker.batches for unit in self.todo[n] if unit.stem == stem)
        self.todo[number] = tuple(unit for unit in self.todo[number] if unit is not done)
        if not self.todo[number]:
            worker.batches.remove(number)
        self.open -= 1
        self.work.finished(done)
