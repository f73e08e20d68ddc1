"""Rows of a diagnosis: one per head, as saved, as a table, and with its tokens as text. Column names are API."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.heads.diagnostics import CLASSES
from anchorscope.runs.values import jsonable, number
from anchorscope.shapes import Row
from anchorscope.tokens import token_texts

CONTEXT = 24  # characters of the prompt shown on each side of a token


@dataclass(frozen=True)
class HeadRow:
    """What is reported of one head. Metrics: docs/heads.md; NaN where a metric does not apply.

    Attributes:
        kind: the class; the column is called `class`.
        hidden_sinks: (position, mean mass from queries 256 tokens behind and more), heaviest first.
        influential: (position, influence), most first.
        stripe_tokens: (position, share of the head's attention from queries 256 tokens behind and more, groups that
            select it, groups it is a candidate of), heaviest first.
        previous_layer: the layer `overlap_layer` compares with, or None.
    """

    prompt: str
    layer: int
    head: int
    kv_head: int
    kind: str
    window_recall: float
    sink_1: float
    sink_4: float
    hidden_sinks: tuple[tuple[int, float], ...]
    hidden_sink_mass: float
    local_128: float
    local_1024: float
    distance: float
    distance_1024: float
    effective_keys_mean: float
    effective_keys_median: float
    influence: float
    influential: tuple[tuple[int, float], ...]
    vertical_mass: float
    slash_mass: float
    block_mass: float
    stripe_density: float
    stripe_tokens: tuple[tuple[int, float, int, int], ...]
    overlap_groups: float
    overlap_heads: float
    overlap_layer: float
    previous_layer: int | None


METRICS = tuple(f.name for f in dataclasses.fields(HeadRow) if f.type == "float")
LISTS = ("hidden_sinks", "influential", "stripe_tokens")
# What a row looks like in a part.
ROW_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("layer", "head", "kv_head"), int),
    **dict.fromkeys(("prompt", "kind"), str),
    **dict.fromkeys(METRICS, (float, None)),
    "hidden_sinks": [Row(int, float)],
    "influential": [Row(int, float)],
    "stripe_tokens": [Row(int, float, int, int)],
    "previous_layer": (int, None),
}
COLUMNS = (
    "prompt",
    "layer",
    "head",
    "kv_head",
    "class",
    *(f.name for f in dataclasses.fields(HeadRow)[5:] if f.name not in ("influential", "stripe_tokens")),
)


def table_row(row: HeadRow) -> tuple[str, ...]:
    """A row of diagnostics.csv; `hidden_sinks` there is their number."""
    cells = [row.prompt, str(row.layer), str(row.head), str(row.kv_head), row.kind]
    for name in COLUMNS[5:]:
        value = getattr(row, name)
        if name in LISTS:
            cells.append(str(len(value)))
        elif name == "previous_layer":
            cells.append("" if value is None else str(value))
        else:
            cells.append(number(value))
    return tuple(cells)


def row_json(row: HeadRow) -> dict[str, Any]:
    """A row as JSON holds it, to be read by `row_from_json`."""
    return {k: jsonable(v) if isinstance(v, float) else v for k, v in vars(row).items()}


def row_from_json(saved: dict[str, Any]) -> HeadRow:
    """Inverse of `row_json`.

    Raises:
        ValueError, TypeError, KeyError: the object is no such row.
    """
    fields: dict[str, Any] = {f.name: saved[f.name] for f in dataclasses.fields(HeadRow)}
    for name in METRICS:
        fields[name] = math.nan if fields[name] is None else float(fields[name])
    for name in LISTS:
        fields[name] = tuple((int(x[0]), float(x[1]), *map(int, x[2:])) for x in fields[name])
    return HeadRow(**fields)


@dataclass(frozen=True)
class TokenText:
    """What is known about the tokens of a prompt.

    Attributes:
        ids: token ids, or None.
        pieces: text of every id of the vocabulary, or None.
    """

    ids: Sequence[int] | None = None
    pieces: Sequence[str] | None = None

    def at(self, position: int) -> dict[str, Any]:
        """`token_id`, and with a vocabulary `token` and `context` (text before and after), as far as known."""
        ids, pieces = self.ids, self.pieces
        if ids is None or position >= len(ids):
            return {}
        if pieces is None:
            return {"token_id": ids[position]}
        around = token_texts(ids[max(position - CONTEXT, 0) : position + 1 + CONTEXT], pieces)
        here = min(position, CONTEXT)
        before, after = "".join(around[:here])[-CONTEXT:], "".join(around[here + 1 :])[:CONTEXT]
        return {"token_id": ids[position], "token": around[here], "context": [before, after]}


def report_row(row: HeadRow, text: TokenText) -> dict[str, Any]:
    """A head in heads.json: the row with named list entries and the tokens' text."""
    out = row_json(row)
    out["class"] = out.pop("kind") or None
    out["hidden_sinks"] = [{"position": j, **text.at(j), "mass": m} for j, m in row.hidden_sinks]
    out["influential"] = [{"position": j, **text.at(j), "influence": x} for j, x in row.influential]
    out["stripe_tokens"] = [
        {"position": j, **text.at(j), "mass": m, "groups": g, "candidate_groups": c} for j, m, g, c in row.stripe_tokens
    ]
    first = ("prompt", "layer", "head", "kv_head", "class")
    return {name: out[name] for name in (*first, *(x for x in out if x not in first))}


def summarize(rows: Sequence[HeadRow]) -> dict[str, Any]:
    """Heads per class and the mean of each metric over the heads where it applies."""
    counts = Counter(r.kind for r in rows)
    means: dict[str, float | None] = {}
    for name in METRICS:
        known = [x for r in rows if not math.isnan(x := getattr(r, name))]
        means[name] = math.fsum(known) / len(known) if known else None
    return {
        "heads": len(rows),
        "classes": {kind: counts[kind] for kind in CLASSES},
        "unclassified": counts[""],
        "means": means,
    }
