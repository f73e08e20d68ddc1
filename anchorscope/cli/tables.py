"""Tables on the terminal: one look, cells as text. rich is loaded when a table is made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.files import visible
from anchorscope.shown import short_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(
    columns: Sequence[str],
    *,
    title: str | None = None,
    left: Collection[str] = (),
    fold: Collection[str] = (),
    **look: Any,
) -> Table:
    """An empty table with a line under its head.

    Args:
        columns: their names; numbers stand at the right and never fold.
        title: above the table, at the left.
        left: columns of text, which stand at the left.
        fold: columns of text that may be long: they stand at the left and take several lines.
        look: options of rich's `Table` in place of the common ones.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    common = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=None if title is None else Text(visible(title)), **{**common, **look})
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in left or name in fold else "right",
            no_wrap=name not in fold,
            overflow="fold" if name in fold else "ellipsis",
        )
    return table


def boxed_table(columns: Sequence[str], **options: Any) -> Table:
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
