"""What every per-head run over a dump shares: which heads, where results go, who works, and how far it is."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from anchorscope.devices import is_out_of_memory
from anchorscope.dumps import Dump, Entry, LayerTensors
from anchorscope.errors import InputError, RunFailure
from anchorscope.params import visible_pairs
from anchorscope.parse import describe_indices
from anchorscope.profiles import profile_filename
from anchorscope.runs.environment import full_precision


@dataclass(frozen=True)
class Progress:
    """What a progress callback gets. `work` counts (query, key) pairs, so time left follows from it."""

    stage: str
    work: int
    total: int
    detail: str = ""


class Cancelled(Exception):
    """The caller asked the engine to stop."""


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Job:
    """One head to measure."""

    prompt_index: int
    entry: Entry
    head: int

    @property
    def name(self) -> str:
        return profile_filename(self.prompt_index, self.entry.layer, self.head)

    @property
    def work(self) -> int:
        return visible_pairs(self.entry.tokens, self.entry.window)


def choose_jobs(
    source: Dump, prompts: Sequence[str] | None, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[Job, ...]:
    """The heads of a dump that are asked for, by prompt, layer and head; None means all.

    Raises:
        InputError: an unknown prompt, layer or head, or nothing left.
    """
    names = [p.name for p in source.prompts]
    for name in prompts or ():
        if name not in names:
            raise InputError(f"the dump has no prompt {name!r}; it has {', '.join(names)}")
    chosen = set(names if prompts is None else prompts)
    all_layers = sorted({e.layer for e in source.entries})
    for layer in layers or ():
        if layer not in all_layers:
            raise InputError(f"the dump has no layer {layer}; it has {describe_indices(all_layers)}")
    entries = [e for e in source.entries if e.prompt in chosen and (layers is None or e.layer in layers)]
    all_heads = sorted({h for e in entries for h in e.query_heads})
    for head in heads or ():
        if head not in all_heads:
            raise InputError(f"the dump has no query head {head}; it has {describe_indices(all_heads)}")
    jobs = tuple(
        Job(names.index(e.prompt), e, h)
        for e in sorted(entries, key=lambda e: (names.index(e.prompt), e.layer))
        for h in e.query_heads
        if heads is None or h in heads
    )
    if not jobs:
        raise InputError("the chosen prompts, layers and heads leave nothing to analyze; widen one of them")
    return jobs


def check_beside_plan(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Refuse arguments that a plan has decided already, instead of ignoring them.

    Args:
        function: the public function; its signature holds the defaults.
        given: what it was called with, of the arguments that a plan covers.

    Raises:
        InputError: an argument differs from its default.
    """
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        default = parameters[name].default
        if value is not default and value != default:
            raise InputError(f"{name} is decided by the plan: give it when the plan is made, or leave out plan")


def check_plan_source(plan: Dump, dump: Dump | Path | str) -> None:
    """Refuse a plan that was made of another dump.

    Raises:
        InputError: the folders differ.
    """
    path = dump.path if isinstance(dump, Dump) else Path(dump)
    if path.resolve() != plan.path.resolve():
        raise InputError(f"the plan was made of {plan.path}, not of {path}: make one of this dump, or leave out plan")


def run_jobs(
    dump: Dump,
    jobs: Sequence[Job],
    measure: Callable[[Job, LayerTensors, threading.Event], None],
    *,
    workers: int,
    report: ProgressCallback,
    work_before: int,
    work_total: int,
    memory_advice: Callable[[], str],
) -> None:
    """Measure heads, `workers` at a time, reading each layer of the dump once.

    Args:
        dump: where the tensors are.
        jobs: heads, entry by entry.
        measure: called in a worker thread with the job, its layer's tensors and an event that asks it to stop.
        workers: heads at a time; with more than one, each uses one thread of torch.
        report: called after every head.
        work_before, work_total: pairs measured already, and in all.
        memory_advice: the sentence to fail with when memory runs out.

    Raises:
        RunFailure: out of memory.
    """
    threads = torch.get_num_threads()
    stop = threading.Event()
    done = work_before

    def prepare() -> None:
        if workers > 1:
            torch.set_num_threads(1)

    def collect(pending: dict[Future[None], Job]) -> int:
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        work = 0
        for future in finished:
            job = pending.pop(future)
            future.result()
            work += job.work
            report(Progress("heads", done + work, work_total, f"{job.entry.prompt}, layer {job.entry.layer}"))
        return work

    pool = ThreadPoolExecutor(workers, initializer=prepare)
    with full_precision():  # of the process: set around all workers, so that none's end changes it under another
        try:
            pending: dict[Future[None], Job] = {}
            loaded: tuple[Entry, LayerTensors] | None = None
            for job in jobs:
                if loaded is None or loaded[0] is not job.entry:
                    wanted = [j.head for j in jobs if j.entry is job.entry]
                    loaded = (job.entry, dump.load(job.entry, wanted))
                pending[pool.submit(measure, job, loaded[1], stop)] = job
                while len(pending) >= workers:
                    done += collect(pending)
            while pending:
                done += collect(pending)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise RunFailure(memory_advice()) from None
            raise
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
