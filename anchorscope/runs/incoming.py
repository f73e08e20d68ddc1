"""The work of one process of `pool.Devices`: batches that come in one after another while others are measured.

An executor takes them as it takes any work. So a layer is read ahead while the one before is measured, as in a run on
one device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.dumps import Entry, LayerTensors
from anchorscope.runs.executors import Work
from anchorscope.runs.sources import Source
from anchorscope.runs.units import HeadUnit

Batch = Sequence[Any]


@dataclass(frozen=True)
class Incoming(Work[Any]):
    """Work whose first batch is there.

    Attributes:
        more: waits for the next batch; None says that there is none.
    """

    more: Callable[[], Batch | None] = lambda: None

    @classmethod
    def of(
        cls,
        first: Batch,
        more: Callable[[], Batch | None],
        make: Any,
        source: Source | None,
        answer: Callable[..., None],
    ) -> Incoming:
        """Work that says to the other process what is done."""
        at_work = [unit.stem for unit in first[:1]]

        def tick(work: int, detail: str = "", unit: str = "") -> None:
            answer("tick", work, detail, unit or at_work[0])

        def measure(unit: Any, context: Any) -> None:
            at_work[0] = unit.stem
            make(unit, context)

        return cls(first, measure, lambda unit: answer("done", unit.stem), source, tick, more=more)

    def with_tensors(self, ahead: int = 0) -> Iterator[tuple[Any, LayerTensors | None]]:
        """Every unit that comes in; heads with the tensors of their layer. A batch of heads is of one layer."""
        if self.source is None or not all(isinstance(unit, HeadUnit) for unit in self.units):
            for batch in self._batches():
                yield from ((unit, None) for unit in batch)
            return
        order: deque[Batch] = deque()

        def wanted() -> Iterator[tuple[Entry, list[int]]]:
            for batch in self._batches():
                order.append(batch)
                yield batch[0].entry, [unit.head for unit in batch]

        how: dict[str, Any] = {"ahead": ahead} if ahead else {}
        for loaded in self.source.stream(wanted(), **how):
            for unit in order.popleft():
                yield unit, loaded

    def _batches(self) -> Iterator[Batch]:
        batch: Batch | None = self.units
        while batch is not None:
            yield batch
            batch = self.more()
