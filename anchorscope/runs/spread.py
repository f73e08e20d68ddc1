"""How units are dealt out to several workers: whoever is free gets the next, and keeps to one stretch of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from anchorscope.runs.units import HeadUnit, Unit

U = TypeVar("U", bound=Unit)
PIECES = 4  # batches for each worker, at least, where there are enough units


def batches(units: Sequence[U], workers: int) -> list[tuple[U, ...]]:
    """Units that are best measured by one worker, in order: heads of one layer, which share its tensors.

    Args:
        units: in their order.
        workers: how many share them; batches are small enough that none of them is idle for long.
    """
    most = max(1, len(units) // (PIECES * workers))
    found: list[tuple[U, ...]] = []
    for unit in units:
        last = found[-1] if found else ()
        together = last and isinstance(unit, HeadUnit) and isinstance(last[0], HeadUnit) and last[0].entry == unit.entry
        if together and len(last) < most:
            found[-1] = (*last, unit)
        else:
            found.append((unit,))
    return found


class Spread:
    """Batches that nobody has taken yet, by number.

    A worker gets the batch behind its last one, since neighbors share a layer's tensors and what the layer before
    selected. Where somebody else has taken that, it gets the middle of the longest stretch that is left.
    """

    def __init__(self, count: int) -> None:
        self._left = set(range(count))
        self._at: dict[object, int] = {}  # what each worker took last

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, worker: object) -> int:
        """The number of the batch that a worker shall do now; there must be one."""
        last = self._at.get(worker)
        chosen = last + 1 if last is not None and last + 1 in self._left else self._elsewhere()
        self._left.discard(chosen)
        self._at[worker] = chosen
        return chosen

    def put_back(self, numbers: Iterable[int], worker: object) -> None:
        """What a worker took and could not do; it takes no more."""
        self._at.pop(worker, None)
        self._left.update(numbers)

    def _elsewhere(self) -> int:
        stretches: list[list[int]] = []
        for number in sorted(self._left):
            if stretches and number == stretches[-1][-1] + 1:
                stretches[-1].append(number)
            else:
                stretches.append([number])
        longest = max(stretches, key=len)
        taken = longest[0] - 1 in self._at.values()  # somebody comes along there
        return longest[len(longest) // 2] if taken else longest[0]
