"""An executor on a Ray cluster: batches of units are tasks, and their parts come back as bytes.

Ray is imported here and nowhere else. Tasks of a node that is lost run again elsewhere, which Ray sees to; a part is
written once, by this process.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from anchorscope.dumps import Dump, Entry, LayerTensors
from anchorscope.elsewhere import Elsewhere, measured
from anchorscope.errors import InputError, MissingBackendError, RunFailure, first_line
from anchorscope.files import human_bytes, write_atomic
from anchorscope.runs.environment import hardware_name, versions
from anchorscope.runs.executors import Work
from anchorscope.runs.life import Make
from anchorscope.runs.remote import Answer, measure, probe
from anchorscope.runs.spread import batches
from anchorscope.runs.units import Unit
from anchorscope.shown import counted

if TYPE_CHECKING:
    from typing_extensions import Self

U = TypeVar("U", bound=Unit)
RETRIES = 3  # how often a task is repeated whose node or process was lost
IN_FLIGHT = 2  # tasks for each place, so that none is idle and the object store stays small
ANSWER_SECONDS = 10  # for a cluster to say that it is there
LOOK_SECONDS = 2.0  # between looks at the nodes


class RayTasks:
    """Units measured as tasks of a Ray cluster; see `anchorscope.runs.executors.Executor`. Close it, or use `with`.

    Args:
        address: "auto" for the cluster that this machine belongs to, or host:port of its head.
        device: "auto" (GPUs if the cluster has any), "cpu" or "cuda".

    Raises:
        MissingBackendError: Ray is not installed, or the cluster has no GPU where one is asked for.
        InputError: nobody answers at the address, or the cluster has other versions.
    """

    def __init__(self, address: str = "auto", device: str = "auto") -> None:
        self._ray = _ray()
        _connect(self._ray, address)
        try:
            resources = self._ray.cluster_resources()
            gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
            if device not in ("auto", "cpu", "cuda"):
                raise InputError(f"--ray and --device {device!r} contradict each other: Ray chooses the GPU; give cuda")
            if device == "cuda" and not gpus:
                raise MissingBackendError("--device cuda: the Ray cluster has no GPU; use --device cpu")
            self.kind = "cuda" if gpus and device != "cpu" else "cpu"
            self._places = gpus if self.kind == "cuda" else cpus
            if not self._places:
                raise InputError("the Ray cluster has no CPU to run tasks on: start nodes with `ray start --num-cpus`")
            self.hardware = self._check()
        except BaseException:
            self.close()
            raise
        self._nodes = self._alive()
        self._send = False  # whether layers are sent, since a node does not see the dump

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """While inside, plans and reports are those of the cluster's GPUs, which this machine need not have."""
        if self.kind == "cpu":
            yield
            return
        with measured(Elsewhere(self.hardware, versions(), None)):
            yield

    def close(self) -> None:
        """Leave the cluster; tasks of this run end."""
        self._ray.shutdown()

    def run(self, work: Work[U]) -> None:
        """See `Executor`.

        Raises:
            RunFailure: a task was lost too often, or a node is of another kind.
        """
        make: Any = work.measure
        if not isinstance(make.command.plan.source, Dump):
            raise InputError("--ray measures what is in a dump: capture the model first")
        self._refuse_too_large(make.command.plan)
        todo = batches(work.units, self._places)[::-1]
        sent = self._ray.put(_portable(make))
        under_way: dict[Any, tuple[U, ...]] = {}
        try:
            while todo or under_way:
                while todo and len(under_way) < IN_FLIGHT * self._places:
                    batch = todo.pop()
                    under_way[self._start(sent, make, batch)] = batch
                ready, _ = self._ray.wait(list(under_way), timeout=LOOK_SECONDS)
                self._look(work)
                for ref in ready:
                    batch = under_way.pop(ref)
                    if not self._take(work, batch, ref):
                        todo.append(batch)
        finally:
            for ref in under_way:
                self._ray.cancel(ref, force=True)

    def _refuse_too_large(self, plan: Any) -> None:
        """A task that fits no node would wait for ever."""
        most = max((n["Resources"].get("memory", 0) for n in self._ray.nodes() if n["Alive"]), default=0)
        if self.kind == "cpu" and most < plan.memory:
            raise RunFailure(
                f"no node of the Ray cluster has the {human_bytes(plan.memory)} of memory that a task needs; the"
                f" largest has {human_bytes(most)}"
            )

    def _start(self, sent: Any, make: Any, batch: Sequence[U]) -> Any:
        plan = make.command.plan
        needs: dict[str, Any] = {"max_retries": RETRIES, "retry_exceptions": False}
        needs |= {"num_gpus": 1, "num_cpus": 1} if self.kind == "cuda" else {"num_cpus": 1, "memory": int(plan.memory)}
        layers = [self._ray.put(layer) for layer in _layers(plan.source, batch)] if self._send else []
        threads = 1 if self.kind == "cuda" else torch.get_num_threads()
        return self._ray.remote(measure).options(**needs).remote(sent, batch, threads, *layers)

    def _take(self, work: Work[U], batch: Sequence[U], ref: Any) -> bool:
        """Write the parts of a task that is done; False where it must be done again."""
        make: Any = work.measure
        with _plain_errors(self._ray, batch):
            answer: Answer = self._ray.get(ref)
        if answer.unseen:
            if not self._send:
                size = human_bytes(max(unit.entry.bytes for unit in batch))  # type: ignore[attr-defined]
                work.tell(
                    f"{answer.node} does not see {make.command.plan.source.path}: layers are sent to the nodes, up to"
                    f" {size} each; a path that all nodes share is quicker"
                )
            self._send = True
            return False
        if answer.failed is not None:
            kind, error, _ = answer.failed
            if kind == "memory":
                raise MemoryError
            if kind == "device":
                raise RunFailure(
                    f"the GPU of {answer.node} failed ({first_line(error)}); take that node out of the cluster"
                )
            raise error
        if answer.hardware != self.hardware:
            raise RunFailure(
                f"{answer.node} measures on {answer.hardware}, another node on {self.hardware}: results would differ by"
                " rounding; use nodes of one kind"
            )
        for unit in batch:
            for name, data in answer.parts[unit.stem]:
                write_atomic(make.root / name, data)
            work.finished(unit)
        return True

    def _look(self, work: Work[U]) -> None:
        """Say which nodes were lost or joined."""
        now = self._alive()
        for node in self._nodes.keys() - now.keys():
            rest = f"{counted(len(now), 'node')} left" if now else "none is left, so this waits for one"
            work.tell(f"node {self._nodes[node]} of the Ray cluster is lost; what it had is measured again; {rest}")
        self._nodes = now

    def _alive(self) -> dict[str, str]:
        """Names of the nodes that do tasks, by id."""
        key = "GPU" if self.kind == "cuda" else "CPU"
        return {n["NodeID"]: n["NodeName"] for n in self._ray.nodes() if n["Alive"] and n["Resources"].get(key, 0)}

    def _check(self) -> str:
        """The hardware of a node, whose versions must be those of this process."""
        needs = {"num_gpus": 1} if self.kind == "cuda" else {"num_cpus": 1}
        with _plain_errors(self._ray, ()):
            node, hardware, theirs = self._ray.get(self._ray.remote(probe).options(**needs).remote(self.kind))
        if different := [key for key, mine in versions().items() if theirs.get(key) != mine]:
            shown = ", ".join(f"{key} {theirs.get(key)} there and {versions()[key]} here" for key in different)
            raise InputError(f"node {node} of the Ray cluster has other versions: {shown}; install the same everywhere")
        return hardware if self.kind == "cuda" else hardware_name(torch.device("cpu"))


def _portable(make: Make[Any]) -> Make[Any]:
    """The run as other machines need it: the dump by its whole path."""
    source: Any = copy.copy(make.command.plan.source)
    source.path = source.path.absolute()
    return Make(type(make.command)(replace(make.command.plan, source=source, devices=())), make.root)


def _layers(dump: Dump, batch: Sequence[Unit]) -> Iterator[tuple[Entry, LayerTensors]]:
    """The layers that a batch needs, with all their heads."""
    entries = dict.fromkeys(entry for unit in batch for entry, _ in unit.needs)  # type: ignore[attr-defined]
    return ((entry, dump.load(entry)) for entry in entries)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingBackendError("--ray needs Ray, which is not installed: pip install 'anchorscope[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Join the cluster at an address, without the banners, signal handlers and long waits of Ray itself."""
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: give host:port of the head, on a machine that belongs to the cluster, or auto"
        )
    if ray.is_initialized():
        raise InputError("this process is connected to a Ray cluster already: call ray.shutdown() first")
    if not _answers(address):
        where = "on this machine" if address == "auto" else f"at {address}"
        raise InputError(
            f"--ray {address}: no Ray cluster answers {where}; start one with `ray start --head`, or give"
            " host:port of its head"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray._private.worker._worker_logs_enabled = False  # else Ray prints its own words on nodes to standard output
    with _same_signals():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "ersion mismatch" in str(error):
                lines = " ".join(str(error).split())
                raise InputError(f"--ray {address}: the cluster runs another Ray or Python ({lines[:300]})") from None
            raise InputError(f"--ray {address}: the cluster cannot be joined ({first_line(error)})") from None


def _answers(address: str) -> bool:
    """Whether a Ray cluster is at an address; Ray itself would wait for minutes for one."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal():
            raise InputError(
                f"--ray {address!r} is malformed: write auto, or host:port of the head, like 10.0.0.1:6379"
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError):
            return False
        words += ["--address", address]
    try:
        return subprocess.run(words, capture_output=True, timeout=ANSWER_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@contextmanager
def _same_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_errors(ray: Any, batch: Sequence[Unit]) -> Iterator[None]:
    """Ray's errors in a sentence."""
    what = f" while {batch[0].label} was measured" if batch else ""
    kept = "; what is measured is kept, give the same command again"
    try:
        yield
    except ray.exceptions.OutOfMemoryError:
        raise MemoryError from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError) as error:
        raise RunFailure(f"a process or node was lost {RETRIES + 1} times{what} ({first_line(error)}){kept}") from None
    except ray.exceptions.RayError as error:
        if "No module named" in str(error):
            module = str(error).split("No module named", 1)[1].split("\n")[0].strip(" '\"")
            raise InputError(
                f"a node of the Ray cluster has no {module}: install the same packages everywhere"
            ) from None
        raise RunFailure(f"Ray failed{what} ({first_line(error)}){kept}") from None
