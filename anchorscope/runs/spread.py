"""How units are dealt out to several workers: whoever is free gets the next, and keeps to one stretch of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from anchorscope.runs.units import HeadUnit, Unit

U = TypeVar("U", bound=Unit)


def batches(units: Sequence[U], workers: int) -> list[tuple[U, ...]]:
    """Units that are best measured by one worker, in order: the heads of a layer, which share its tensors.

    Whole layers come first, as many for each worker. Those that are left over are cut, so that nobody waits while
    another measures the last one, between kv heads.

    Args:
        units: in their order.
        workers: how many share them.
    """
    layers = [list(found) for _, found in groupby(units, key=lambda u: u.entry if isinstance(u, HeadUnit) else u)]
    whole = len(layers) - len(layers) % workers
    return [
        tuple(piece) for i, layer in enumerate(layers) for piece in ([layer] if i < whole else _cut(layer, workers))
    ]


def _cut(layer: list[U], pieces: int) -> Iterator[list[U]]:
    """About as many pieces of a layer's heads, each of whole kv heads."""
    first = layer[0]
    share = len(first.entry.query_heads) // len(first.entry.kv_heads) if isinstance(first, HeadUnit) else 1
    each = -(-len(layer) // (pieces * share)) * share
    return (layer[i : i + each] for i in range(0, len(layer), each))


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
