"""These counters record what ran in each layer (pairs, recall and time) without waiting for the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerUse:
    """The work of one layer in its calls of more than one query; single tokens, which are decoding, are not counted.

    Short calls that follow a cache (candidates of speculative decoding, a last chunk) are counted as dense, which they
    are.

    Attributes:
        layer: index of the layer.
        kind: "sparse" if any call went through the pipeline, else "dense".
        calls: attention calls.
        queries: queries of all calls and prompts; padding does not count.
        visible_pairs: (query, key) pairs of all query heads that the model's own attention computes.
        kept_pairs: the visible pairs that were computed, an exact count. Dense calls and heads keep all.
        recall: share of the attention mass that was kept, mean over all queries and query heads of the sparse calls;
            None unless measured.
        seconds: the time spent in attention, between CUDA events on a GPU and by the wall clock on a CPU. Measuring
            recall is not included.
    """

    layer: int
    kind: str
    calls: int
    queries: int
    visible_pairs: int
    kept_pairs: int
    recall: float | None
    seconds: float

    @property
    def density(self) -> float:
        """Return kept over visible pairs."""
        return self.kept_pairs / self.visible_pairs if self.visible_pairs else 1.0


class Clock:
    """The seconds inside `running`, summed up. On a GPU nothing waits before `seconds` is called."""

    def __init__(self) -> None:
        self._wall = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time what runs inside."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._wall += time.perf_counter() - start
            return
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
        self._events.append((begin, end))

    def seconds(self) -> float:
        """Return the sum so far. This waits for the GPU to reach it."""
        for begin, end in self._events:
            end.synchronize()
            self._wall += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return self._wall


class Tally:
    """The running sums of one layer. Numbers that the GPU computes stay there until `use`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.kind = "dense"
        self.calls = 0
        self.queries = 0
        self.visible = 0
        self.kept = 0
        self._stripes: Tensor | None = None
        self._mass: Tensor | None = None
        self._rows = 0

    def stripes(self, pairs: Tensor) -> None:
        """Add kept pairs whose number only the device knows, () int64."""
        self._stripes = pairs if self._stripes is None else self._stripes + pairs

    def mass(self, rows: Tensor, full: int) -> None:
        """Add the share of attention mass that each row of sparse heads kept, and `full` rows that kept all of it."""
        total = rows.double().clamp_(max=1).sum() + full
        self._mass = total if self._mass is None else self._mass + total
        self._rows += rows.numel() + full

    def use(self, layer: int) -> LayerUse:
        """Return the sums as numbers."""
        return LayerUse(
            layer=layer,
            kind=self.kind,
            calls=self.calls,
            queries=self.queries,
            visible_pairs=self.visible,
            kept_pairs=self.kept + (0 if self._stripes is None else int(self._stripes)),
            recall=None if self._mass is None else float(self._mass) / self._rows,
            seconds=self.clock.seconds(),
        )
