"""One shard of a run: a job of an array measures its share of the units, and `anchorscope.merging` puts all together.

The folder of a shard is an unfinished run: its state says which shard it is, on which hardware it was measured, and
what to ask for to finish the whole (its recipe). Nothing that reads finished folders takes it for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from anchorscope.errors import InputError
from anchorscope.runs.units import Unit

U = TypeVar("U", bound=Unit)
MOST = 100_000  # shards, as many as an array may have jobs


@dataclass(frozen=True)
class Shard:
    """One of several shares of a run.

    Attributes:
        index: which one, from 1.
        of: how many there are.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of <= MOST:
            raise InputError(
                f"--shard {self.index}/{self.of} makes no sense: shards are numbered from 1 to their number,"
                f" which is at most {MOST:,}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `1/4` names.

        Raises:
            InputError: malformed, or out of range.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if found is None:
            raise InputError(f"--shard {text!r} is malformed: write the number of the shard / how many, like 1/4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"shard {self.index} of {self.of}"

    def pick(self, units: Sequence[U]) -> tuple[U, ...]:
        """Its share: neighbors, about as much work as in every other share, and one unit at least.

        Raises:
            InputError: there are fewer units than shards.
        """
        if len(units) < self.of:
            raise InputError(
                f"--shard {self.index}/{self.of}: there are only {len(units)} units of work (heads, or layers where"
                f" heads are diagnosed), so at most {len(units)} shards"
            )
        total, before, cuts = sum(unit.work for unit in units), 0, [0]
        for number, unit in enumerate(units):
            # The next share begins where the work is nearest to its due, and leaves a unit for each that follows.
            due = 2 * before + unit.work >= 2 * total * len(cuts) / self.of
            if number > cuts[-1] and len(cuts) < self.of and (due or len(units) - number <= self.of - len(cuts)):
                cuts.append(number)
            before += unit.work
        cuts.append(len(units))
        return tuple(units[cuts[self.index - 1] : cuts[self.index]])


def shard_of(state: Mapping[str, Any]) -> Shard | None:
    """Which shard a folder's state says that it is; None if it is none."""
    found = state.get("shard")
    if not isinstance(found, dict) or not all(type(found.get(key)) is int for key in ("index", "of")):
        return None
    try:
        return Shard(found["index"], found["of"])
    except InputError:
        return None


def numbers(shards: Iterable[int]) -> str:
    """`shard 3`, or `shards 2, 3`."""
    found = sorted(shards)
    return f"shard{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
