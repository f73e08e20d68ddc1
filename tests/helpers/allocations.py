"""What a piece of work costs, counted instead of timed: bytes that torch allocates on the CPU, operations, elements.

The counts are the same on a busy machine and on a quiet one. Times are measured by the scripts in tests/benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def peak_allocated(work: Callable[[], object]) -> int:
    """Most bytes that were allocated by torch's CPU allocator at once, while `work` ran in this thread."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    kineto = record.profiler.kineto_results
    assert kineto is not None
    now = peak = 0
    for event in kineto.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@dataclass(frozen=True)
class Work:
    """Operations made, elements of their results, and floating-point operations of matrix products."""

    operations: int
    elements: int
    flops: int


class _Elements(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += sum(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def counted(work: Callable[[], object]) -> Work:
    """Count the torch operations that `work` makes in this thread."""
    with FlopCounterMode(display=False) as flops, _Elements() as made:
        work()
    return Work(made.operations, made.elements, flops.get_total_flops())
