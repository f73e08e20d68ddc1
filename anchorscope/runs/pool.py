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

from anchorscope.errors import RunFailure, first_line
from anchorscope.runs.executors import Work
from anchorscope.runs.folder import remove_strays
from anchorscope.runs.spread import Spread, batches
from anchorscope.runs.units import Unit
from anchorscope.runs.worker import PROGRAM, receive, send

if TYPE_CHECKING:
    from typing_extensions import Self

U = TypeVar("U", bound=Unit)
GRACE = 10.0  # seconds until a process that was asked to end is ended


class Worker:
    """One process and its device.

    Attributes:
        device: where it computes.
        process: the process.
        batch: number of the batch it works on, or None.
        ticks: what it said of units that are not done, by stem.
    """

    def __init__(self, device: torch.device, inbox: queue.Queue[tuple[Worker, Any]]) -> None:
        self.device = device
        self.batch: int | None = None
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
        root = work.measure.root  # type: ignore[attr-defined]  # a `life.Make`
        before = len(self._lost)
        try:
            self._begin(share)
            while share.open or any(worker.batch is not None for worker in self.workers):
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
            worker.batch, worker.ticks = None, {}
            worker.send("job", make, share.work.source, worker.device, torch.get_num_threads())

    def _deal(self, share: _Share[U]) -> None:
        """Give whoever is free a batch."""
        for worker in self.workers:
            if worker.batch is None and share.spread:
                worker.batch = share.spread.take(worker)
                worker.send("units", share.todo[worker.batch])

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
            share.finish(worker.batch, rest[0])
        elif kind == "free":
            worker.batch = None
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
        share.spread.put_back([] if worker.batch is None or not share.todo[worker.batch] else [worker.batch], worker)
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
        self.open = sum(map(len, todo))

    def finish(self, batch: int | None, stem: str) -> None:
        """A unit of a batch is done; if its worker dies later, the others of the batch are what is left."""
        assert batch is not None
        done = next(unit for unit in self.todo[batch] if unit.stem == stem)
        self.todo[batch] = tuple(unit for unit in self.todo[batch] if unit is not done)
        self.open -= 1
        self.work.finished(done)
