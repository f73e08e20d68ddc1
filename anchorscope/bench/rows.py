"""What a bench measured, as dataclasses and as JSON, both ways."""

from __future__ import annotations

import functools
import math
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from anchorscope import views
from anchorscope.bench.dense import Absent
from anchorscope.bench.timing import Timing
from anchorscope.notebook import InNotebook

FORMAT = "anchorscope-bench"
FORMAT_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class DenseRow:
    """A dense back end: times, rate over causal pairs, peak memory, output error against exact attention."""

    name: str
    kv_repeated: bool
    timing: Timing
    tflops: float
    peak_memory_bytes: int | None
    output_error: float


@dataclass(frozen=True)
class Check:
    """The pipeline at theta = +inf against exact dense attention; no speed-up unless it passed."""

    passed: bool
    output_error: float
    limit: float
    recall: float
    pairs_equal: bool
    reason: str | None


@dataclass(frozen=True)
class SparseRow:
    """The pipeline at one theta; all figures from the same inputs and selection. See docs/bench.md."""

    theta: float
    whole: Timing
    stages: dict[str, Timing]
    tflops: float
    stage_tflops: dict[str, float]
    recall: float
    recall_worst_head: float
    density: float
    stripe_density: float | None
    kept_pairs: int
    output_error: float
    output_error_worst_head: float
    speedup: float | None
    efficiency: float | None
    peak_memory_bytes: int | None
    extra_memory_bytes: int | None
    state_bytes: int
    stripes_bytes: int


@dataclass(frozen=True)
class Row:
    """All that was measured on one input."""

    source: str
    n: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    visible_pairs: int
    input_bytes: int
    dense: tuple[DenseRow, ...]
    absent: tuple[Absent, ...]
    baseline: str | None
    check: Check
    sparse: tuple[SparseRow, ...]


@dataclass(frozen=True)
class MeasuredRow:
    """A row with what its command knew, as a part of a bench holds it.

    Attributes:
        started: when the command that measured it was started; UTC, ISO 8601.
        created: when it was finished; UTC, ISO 8601.
        hardware: see `anchorscope.bench.environment.hardware`, read right after the timing.
        row: the row.
    """

    started: str
    created: str
    hardware: dict[str, Any]
    row: Row


@dataclass(frozen=True)
class Start:
    """A command that measured a share of the rows of a bench.

    Attributes:
        started: when it was started; UTC, ISO 8601.
        rows: indices of the rows that it measured.
    """

    started: str
    rows: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class BenchResult(InNotebook):
    """A whole bench; `to_json` gives the documented file.

    `starts` says who measured what where a bench was interrupted and continued, and is empty otherwise.
    """

    created: str
    command: str | None
    settings: dict[str, Any]
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    rows: tuple[Row, ...]
    starts: tuple[Start, ...] = ()
    look = views.bench

    @property
    def passed(self) -> bool:
        """Whether every check against dense passed."""
        return all(row.check.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The content of bench.json: finite numbers, infinite thetas as the strings "inf" and "-inf"."""
        data = {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(asdict(self))}
        if not self.starts:
            del data["starts"]
        return data


def plain(value: Any) -> Any:
    """Tuples to lists, infinities to strings, NaN to null: what strict JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def restored(kind: type[T], value: Any) -> T:
    """The dataclass whose `plain(asdict(...))` this is.

    Raises:
        ValueError: it is none of that kind.
    """
    result: T = _restored(kind, value)
    return result


_hints = functools.cache(get_type_hints)


def _restored(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _restored(inner[0], value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        if missing := [f.name for f in fields(kind) if f.name not in value]:
            raise ValueError(f"{kind.__name__} lacks {missing[0]}")
        return kind(**{f.name: _restored(_hints(kind)[f.name], value[f.name]) for f in fields(kind)})
    if origin is tuple and isinstance(value, list):
        return tuple(_restored(inner[0], x) for x in value)
    if origin is dict and isinstance(value, dict):
        return {key: _restored(inner[1], x) for key, x in value.items()}
    if kind is float and (value is None or value in ("inf", "-inf")):
        return math.nan if value is None else float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{value!r} is no {kind}")
