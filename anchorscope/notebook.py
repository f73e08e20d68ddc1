"""Results as a notebook shows them: a title, facts, a table and a picture in HTML that needs nothing from anywhere.

A result class inherits `InNotebook` and says what is to be seen (`views.py`). Nothing heavy is imported: pictures are
those that the run drew, put in as they are.
"""

from __future__ import annotations

import base64
import html
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorscope.files import visible

MOST_ROWS = 20
MOST_TEXT = 120  # characters of a cell or a fact
MOST_PICTURE = 400_000  # bytes of a picture that is put into the notebook
MOST_REPR = 400
_CELL = "padding: 2px 10px 2px 0; border: 0; border-bottom: 1px solid rgba(128, 128, 128, 0.35)"
_LOOK = "color: inherit; background: transparent; font-size: 90%"  # readable on light and on dark


@dataclass(frozen=True)
class View:
    """What of a result is seen at a glance.

    Attributes:
        title: what it is, in a few words.
        facts: (name, value), the most important first.
        columns, rows: a table; long ones are cut.
        notes: sentences below it.
        pictures: files that a run drew; the first that is there and small enough is shown.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Path] = ()

    def to_text(self) -> str:
        """One line: the title and the facts."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts)
        return visible(f"{self.title}: {facts}" if facts else self.title, MOST_REPR)

    def to_html(self) -> str:
        """A fragment of HTML with inline style; every text of anybody's is escaped."""
        parts = [f"<p><b>{_text(self.title)}</b></p>"]
        if self.facts:
            cells = (f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in self.facts)
            parts.append(f"<p>{' &nbsp; '.join(cells)}</p>")
        if self.rows:
            parts.append(self._table())
        parts += [f"<p>{_text(note, 400)}</p>" for note in self.notes]
        picture = next((x for x in map(_picture, self.pictures) if x is not None), None)
        return f'<div style="{_LOOK}">{"".join(parts)}{picture or ""}</div>'

    def _table(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            sides = ("right" if _is_number(x) else "left" for x in self.rows[0])
            made = (
                f'<{tag} style="{_CELL}; text-align: {side}">{_text(x)}</{tag}>'
                for x, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        shown = self.rows[:MOST_ROWS]
        more = len(self.rows) - len(shown)
        end = f"<p>{more:,} more rows; the files of the result hold them all</p>" if more else ""
        head = f"<thead>{line('th', self.columns)}</thead>"
        body = "".join(line("td", row) for row in shown)
        return f'<table style="border-collapse: collapse; {_LOOK}">{head}<tbody>{body}</tbody></table>{end}'


class InNotebook(ABC):
    """A result that a notebook shows as a table, and that prints as one line.

    A subclass says `look = views.SOMETHING`, a function of the result that gives its `View`.
    """

    @abstractmethod
    def look(self) -> View:
        """What is seen of this result."""

    def _repr_html_(self) -> str | None:
        view = self._view()
        return None if view is None else view.to_html()

    def __repr__(self) -> str:
        view = self._view()
        name = type(self).__name__
        text = "" if view is None else view.to_text()
        return f"<{text}>" if text.startswith(name) else f"<{name}: {text}>" if text else f"<{name}>"

    def _view(self) -> View | None:
        try:
            return self.look()
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError):
            # a result made by hand, or a folder that was edited: being looked at must not fail
            return None


def _text(value: str, most: int = MOST_TEXT) -> str:
    """Text of anybody's, escaped, cut, and without characters that move or hide others."""
    return html.escape(visible(value, most))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?([0-9.,]+(e[-+]?[0-9]+)?|inf|)[%x]?", text) is not None


def _picture(path: Path) -> str | None:
    """A PNG file as an image with its bytes inside, or None if it is no small PNG."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MOST_PICTURE else b""
    except OSError:
        return None
    if not data.startswith(b"\x89PNG"):
        return None
    source = base64.b64encode(data).decode()
    look = "max-width: 100%; background: white"
    return f'<img alt="{_text(path.stem)}" style="{look}" src="data:image/png;base64,{source}">'


__all__ = ["InNotebook", "View"]
