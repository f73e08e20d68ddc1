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
from anchorscope.vocabulary import Vocabulary, as_vocabulary

CONTEXT = 24  # characters of the prompt shown on each side of a token
NAME = 16  # characters shown of a token
PLACES = 4  # positions shown of a token that occurs often


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
    "hidden_sink_tokens",
    "stripe_tokens",
)


def table_row(row: HeadRow, text: TokenText | None = None) -> tuple[str, ...]:
    """A row of diagnostics.csv; `hidden_sinks` there is their number, `..._tokens` are their positions and words."""
    text = text or TokenText()
    cells = [row.prompt, str(row.layer), str(row.head), str(row.kv_head), row.kind]
    for name in COLUMNS[5:]:
        if name.endswith("_tokens"):
            value = getattr(row, {"hidden_sink_tokens": "hidden_sinks"}.get(name, name))
            found = by_token([{"position": x[0], **text.at(x[0])} for x in value])
            cells.append("; ".join(f"{places(where)} {token}".strip() for token, where in found.items()))
            continue
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
        pieces: text of the ids of the vocabulary, or None.
    """

    ids: Sequence[int] | None = None
    pieces: Vocabulary | Sequence[str] | None = None

    def at(self, position: int) -> dict[str, Any]:
        """`token_id`, and with a vocabulary `token` and `context` (text before and after), as far as known."""
        ids, known = self.ids, as_vocabulary(self.pieces)
        if ids is None or position >= len(ids):
            return {}
        if known is None:
            return {"token_id": ids[position]}
        before = known.passage(ids[max(position - CONTEXT, 0) : position])[-CONTEXT:]
        after = known.passage(ids[position + 1 : position + 1 + CONTEXT])[:CONTEXT]
        return {"token_id": ids[position], "token": known.text(ids[position]), "context": [before, after]}


def by_token(tokens: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Positions by token as people read it: `' the'` where its text is known, `#260` where only its id is, else empty.

    Two ids of the same text are told apart by their ids. Characters that would move or hide others are escaped.

    Args:
        tokens: `position`, and `token_id` and `token` as far as known.
    """
    ids: dict[str, set[int]] = {}
    for token in tokens:
        if "token" in token:
            ids.setdefault(_quoted(token["token"]), set()).add(token["token_id"])
    found: dict[str, list[int]] = {}
    for token in tokens:
        name = f"#{token['token_id']}" if "token_id" in token else ""
        # `#7 ` is how a vocabulary calls an id that it does not know
        if "token" in token and token["token"] != f"{name} ":
            text = _quoted(token["token"])
            name = text if len(ids[text]) == 1 else f"{text} {name}"
        found.setdefault(name, []).append(token["position"])
    return found


def places(positions: Sequence[int], most: int = PLACES) -> str:
    """Positions in a line: `254,2369,521,1685,+6`."""
    text = ",".join(map(str, positions[:most]))
    return text if len(positions) <= most else f"{text},+{len(positions) - most}"


def _quoted(text: str) -> str:
    """A token in quotes; what cannot be printed is escaped, so that nothing foreign reaches the terminal."""
    return repr(text if len(text) <= NAME else f"{text[: NAME - 1]}…")


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
