"""What a section of the page consists of: cards, remarks, tables, grids and charts, as JSON values.

The script (assets/blocks.js) draws them and knows nothing of what they are about. All text is text, never markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.shown import share_text

Block = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cell of a grid.

    Attributes:
        row, column: indices into the grid's labels.
        value: what it is colored by, or None for no color.
        text: what it shows.
        about: what it says in full.
        marked: framed, as the grid's `framed` explains.
    """

    row: int
    column: int
    value: float | None
    text: str
    about: str
    marked: bool = False


def cards(*items: tuple[str, str, str]) -> Block:
    """Large numbers: (what, the number, small print)."""
    return {"kind": "cards", "items": [list(item) for item in items]}


def remarks(texts: Iterable[str], *, warning: bool = True) -> Block:
    """Sentences; as warnings, or as plain hints."""
    return {"kind": "remarks", "warning": warning, "texts": list(texts)}


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)) -> Block:
    """A table of texts; the columns with the numbers `words` are aligned left."""
    return {
        "kind": "table",
        "caption": caption,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "words": list(words),
    }


def grid(
    name: str,
    axes: tuple[str, str],
    labels: tuple[Sequence[str], Sequence[str]],
    cells: Iterable[Cell],
    *,
    ends: tuple[float, float],
    colors: str = "viridis",
    framed: str = "",
) -> Block:
    """Cells in rows and columns, colored from `ends[0]` to `ends[1]`.

    Args:
        name: what the cells show.
        axes: what the rows and the columns are.
        labels: of the rows, of the columns.
        cells: those that exist.
        ends: the values at the two ends of the color map.
        colors: name of a color map of the page.
        framed: what it means that a cell is framed.
    """
    low, high = ends
    span = high - low if high > low else 1.0
    return {
        "name": name,
        "axes": list(axes),
        "rows": list(labels[0]),
        "columns": list(labels[1]),
        "cells": [
            [c.row, c.column, None if c.value is None else _finite((c.value - low) / span), c.text, c.about, c.marked]
            for c in cells
        ],
        "ends": [f"{low:.4g}", f"{high:.4g}"],
        "colors": colors,
        "framed": framed,
    }


def _finite(share: float) -> float | None:
    return round(share, 4) if math.isfinite(share) else None


def grids(caption: str, choices: Sequence[Block]) -> Block:
    """Several grids, of which the reader chooses one."""
    return {"kind": "grids", "caption": caption, "choices": list(choices)}


def chart(
    caption: str,
    axes: tuple[str, str],
    lines: Iterable[tuple[str, Sequence[float], Sequence[float]]],
    *,
    log: tuple[bool, bool] = (False, False),
) -> Block:
    """Lines through points: (name, x, y); `log` says which axes are logarithmic."""
    return {
        "kind": "chart",
        "caption": caption,
        "axes": list(axes),
        "log": list(log),
        "lines": [{"name": name, "x": list(x), "y": list(y)} for name, x, y in lines],
    }


def facts(caption: str, items: Iterable[tuple[str, str]]) -> Block:
    """Names and values behind a button: settings, versions."""
    return {"kind": "facts", "caption": caption, "items": [list(item) for item in items]}


def whole(value: float | None, digits: int = 3) -> str:
    """A share for a grid: "all" for exactly all, else never rounded to 1 or 0."""
    text = share_text(value, digits)
    if value is None or float(text) < 1:
        return text
    return "all" if value >= 1 else ">0.9999999"


def interval(ends: Sequence[float] | None, digits: int = 3) -> str:
    """A 95% interval of shares or scores: "0.44 to 1.00"; "-" where there is none."""
    return "-" if ends is None else " to ".join(f"{x:.{digits}f}" for x in ends)
