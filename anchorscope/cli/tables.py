"""Tables on the terminal: one look, cells as text. Where the terminal is narrow, whole columns are left out and named.

rich is loaded when a table is shown.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.files import visible
from anchorscope.shown import short_name

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

FOLDED = 12  # columns of text that take several lines are not made narrower than this
PIPED = 40  # and in a pipe, which has no width of its own, not wider than this


class FittingTable:
    """A table with a line under its head that never cuts a number.

    Args:
        columns: their names; numbers stand at the right and never fold.
        title: above the table, at the left.
        left: columns of text, which stand at the left.
        fold: columns of text that may be long: they stand at the left and take several lines.
        drop: columns to leave out where the terminal is too narrow, the least important first; others always stay.
        look: options of rich's `Table` in place of the common ones.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        title: str | None = None,
        left: Collection[str] = (),
        fold: Collection[str] = (),
        drop: Sequence[str] = (),
        look: Mapping[str, Any] | None = None,
    ) -> None:
        assert set(drop) <= set(columns), "a column to drop is none of the table"
        self.columns = tuple(columns)
        self._title, self._left, self._fold, self._drop = title, left, fold, tuple(drop)
        self._look = dict(look or {})
        self._rows: list[tuple[str, ...] | None] = []

    def add_row(self, *cells: str) -> None:
        """Add a line: one text per column."""
        assert len(cells) == len(self.columns), "cells and columns differ in number"
        self._rows.append(cells)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._rows.append(None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich prints: the table as far as it fits, and what was left out."""
        from rich.text import Text

        limit = options.max_width if has_width(console) else None
        names = list(self.columns)
        for name in self._drop:
            if limit is None or self._width(console, names) <= limit:
                break
            names.remove(name)
        table = self._table(names, PIPED if limit is None else None)
        if limit is None:
            table.width = self._width(console, names, PIPED)
        yield table
        if missing := [" ".join(name.replace("-\n", "").split()) for name in self.columns if name not in names]:
            yield Text(f"columns left out: {', '.join(missing)}; wider terminal or --json")

    def _width(self, console: Console, names: Sequence[str], folded: int | None = FOLDED) -> int:
        """Columns of the terminal that some columns of the table need, texts that fold at their narrowest."""
        from rich.measure import Measurement

        wide = console.options.update(width=10_000)
        return Measurement.get(console, wide, self._table(names, folded, title=False)).maximum

    def _table(self, names: Sequence[str], folded: int | None = None, *, title: bool = True) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        common = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
        shown = Text(visible(self._title)) if title and self._title is not None else None
        table = Table(title=shown, **{**common, **self._look})
        for name in names:
            folds = name in self._fold
            table.add_column(
                name,
                justify="left" if folds or name in self._left else "right",
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
                max_width=folded if folds else None,
            )
        places = [self.columns.index(name) for name in names]
        for row in self._rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*(row[i] for i in places))
        return table


def has_width(console: Console) -> bool:
    """Whether lines have to fit; a pipe is as wide as it needs to be, unless somebody says otherwise."""
    return console.is_terminal or "COLUMNS" in os.environ


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """A line for each fact, its name at the left; long ones continue below themselves where lines have to fit."""
    from rich.table import Table
    from rich.text import Text

    room = max(8, *map(len, facts))
    if not has_width(console):
        for name, text in facts.items():
            console.print(f"{name:<{room}} {visible(text, 600)}", soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, min_width=room)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(Text(name), Text(visible(text, 600)))
    console.print(table)


def new_table(columns: Sequence[str], **options: Any) -> FittingTable:
    """An empty table with a line under its head; options as of `FittingTable`, all others go to rich's `Table`."""
    own = {name: options.pop(name) for name in ("title", "left", "fold", "drop") if name in options}
    return FittingTable(columns, **own, look=options)


def boxed_table(columns: Sequence[str], **options: Any) -> FittingTable:
    """A table with lines around every column; options as of `new_table`."""
    from rich import box

    return new_table(columns, box=box.HEAVY_HEAD, padding=(0, 1), **options)


def optional(value: float | None, pattern: str) -> str:
    """A number in a format, "-" for None."""
    return "-" if value is None else format(value, pattern)


def clean_name(name: str, most: int, gap: str = "...") -> str:
    """A name of anybody's in at most `most` characters, `?` for what cannot be printed."""
    return short_name("".join(c if c.isprintable() else "?" for c in name), most, gap)


def print_places(console: Console, what: str, place: Path, figures: Sequence[Path]) -> None:
    """Where a run left its results, and its figures if there are any."""
    console.print(f"{what}: {place}", soft_wrap=True, highlight=False)
    if figures:
        console.print(f"Figures: {figures[0].parent}", soft_wrap=True, highlight=False)
