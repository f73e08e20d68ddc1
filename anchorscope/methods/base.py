"""What a method is: a frozen dataclass whose fields are its parameters, with one verb, `select`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from anchorscope.errors import InputError
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Selection

M = TypeVar("M", bound="Method")

GRANULARITIES = ("stripe", "block", "pattern", "token")


def setting(default: float, help: str, *, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A parameter of a method. An int default makes it a whole number.

    Args:
        default: the authors' value.
        help: what it is, with its unit.
        low, high: range allowed, ends included.
        above: the low end itself is not allowed.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class Method(ABC):
    """A rule that chooses which (query, key) pairs to compute.

    Class attributes:
        name: what users type. parameter: the field that a sweep varies. sweep: its values, sparsest first.
        sweep_end: the value that keeps every visible pair, with which a sweep ends; None if there is none, or if it
            depends on the length (see `dense_at`). sweep_doubles: the parameter counts tokens or blocks, so a sweep
            doubles it until it keeps every pair. never_dense: why no value keeps every pair, of a method whose sweep
            ends at the most that its rule can keep.
        granularity: "stripe" (token columns shared by queries), "block", "pattern" (fixed or diagonal) or "token".
        oracle: it looks at the full attention, so it bounds others and cannot run. source: paper or repository.

    Raises:
        InputError: a parameter out of range.
    """

    name: ClassVar[str]
    parameter: ClassVar[str]
    sweep: ClassVar[tuple[float, ...]]
    sweep_end: ClassVar[float | None] = None
    never_dense: ClassVar[str] = ""
    sweep_doubles: ClassVar[bool] = False
    granularity: ClassVar[str]
    oracle: ClassVar[bool] = False
    source: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            object.__setattr__(self, item.name, check_setting(f"{self.name}.{item.name}", value, item))

    @abstractmethod
    def select(self, head: Head) -> Selection:
        """What the rule keeps for this head, and what finding it costs.

        Must be a function of `head` and the fields alone, and never build an N x N tensor. `head.once` holds what the
        settings of a sweep share.
        """

    def at(self: M, value: float) -> M:
        """This method with its swept parameter at `value`."""
        return replace(self, **{self.parameter: value})

    def dense_at(self, tokens: int) -> float | None:
        """The value of the swept parameter that keeps every visible pair of so many tokens; None if none is known."""
        return self.sweep_end

    def sweep_for(self, tokens: int) -> tuple[float, ...]:
        """The values that a comparison tries where the user names none: from the sparsest to all of so many tokens."""
        last = self.dense_at(tokens)
        if last is None:
            return self.sweep
        if not self.sweep_doubles:
            return tuple(dict.fromkeys((*self.sweep, last)))
        values = [value for value in self.sweep if value < last]
        while values and 2 * values[-1] < last:
            values.append(2 * values[-1])
        return (*values, last)

    @property
    def settings(self) -> dict[str, float]:
        """Field values by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def check_setting(label: str, value: object, item: Any) -> float:
    """A field's value as its own type.

    Raises:
        InputError: not a number, not whole where it must be, or out of range.
    """
    meta = item.metadata
    whole = isinstance(item.default, int)
    low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise InputError(f"{label} must be a number, not {value!r}")
    if whole and (not math.isfinite(value) or value != int(value)):
        raise InputError(f"{label} must be a whole number, not {value!r}")
    if not low <= value <= high or (meta.get("above") and value == low):
        bounds = f"{'above' if meta.get('above') else 'at least'} {low:g}" if low > -math.inf else ""
        upper = f"at most {high:g}" if high < math.inf else ""
        raise InputError(f"{label} must be {' and '.join(x for x in (bounds, upper) if x)}, not {value:g}")
    return int(value) if whole else float(value)
