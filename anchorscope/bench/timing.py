"""Timing and memory of callables: warm-up, interleaved repetitions, medians with quantiles, peak memory.

On a GPU, CUDA events around each call; on a CPU, the wall clock. The repetitions of all callables are interleaved (a,
b, c, a, b, c, ...) so that drift of clocks or temperature hits all alike.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MIN_REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """Times of one callable, in milliseconds.

    Attributes:
        median_ms, p20_ms, p80_ms: quantiles over the repetitions (linear interpolation).
        first_ms: the first call at this shape; what had to be compiled for it is included.
        repeats: number of timed repetitions.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    first_ms: float
    repeats: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock milliseconds of one synchronized call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, result


def repetitions(round_ms: float, wanted: int | None, *, most: int, budget_ms: float) -> int:
    """How often to repeat a round of `round_ms`: as wanted, else what fits the budget, 3 to `most` times."""
    if wanted is not None:
        return wanted
    return int(min(max(budget_ms / max(round_ms, 1e-3), MIN_REPEATS), most))


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    first_ms: Mapping[str, float],
    repeats: int,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time all callables, one repetition of each in turn; they must have been called before (`first_ms`).

    On a GPU a whole round is queued before waiting, so that short kernels do not wait for the host.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        if device.type == "cuda":
            events = {}
            for name, run in runs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                events[name] = (begin, end)
            torch.cuda.synchronize(device)
            for name, (begin, end) in events.items():
                samples[name].append(begin.elapsed_time(end))
        else:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                samples[name].append((time.perf_counter() - start) * 1e3)
        tick()
    result = {}
    for name, values in samples.items():
        p20, median, p80 = (float(x) for x in np.quantile(values, (0.2, 0.5, 0.8)))
        result[name] = Timing(median, p20, p80, first_ms[name], repeats)
    return result


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what was allocated before it, its results included.

    On a GPU, from PyTorch's caching allocator (exact). On Linux with glibc, growth of the resident set after the C
    library gave its free memory back: pages touched, fragmentation included. None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident set
        before = _status_kib("VmRSS")
        result = run()
        peak = _status_kib("VmHWM")
        del result
    except (OSError, KeyError, AttributeError, TypeError):
        return None
    return max(peak - before, 0) * 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise KeyError(field)
