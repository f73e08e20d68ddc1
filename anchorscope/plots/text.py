"""Words in figures: foreign names as they are, glyphs that exist, lines that fit. No global setting is touched."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedFormatter, FuncFormatter

from anchorscope.shown import short_name

BASE = "DejaVu Sans"  # comes with matplotlib
# Fonts that hold what the base lacks, as operating systems and their packages bring them; beginnings of family names.
OTHERS = (
    "Noto Sans CJK",
    "Source Han Sans",
    "WenQuanYi",
    "Droid Sans Fallback",
    "PingFang",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans",
    "Arial Unicode MS",
    "FreeSans",
    "Segoe UI",
    "Symbola",
    "Unifont",
)
WIDER = 1.03  # hinted letters of a picture stand wider than those measured
PARTS = "  |  "  # between the parts of a line above a figure


def name_text(name: str, most: int = 44) -> str:
    """A name of anybody's in at most `most` characters: one line, every character with a glyph."""
    return short_name("".join(_spelled(c) for c in name), most)


def drawable(text: str) -> str:
    """A text in which what no font can draw is spelled out (`\\u4e2d`); line breaks stay."""
    return text if text.isascii() and text.isprintable() else "\n".join(map(_line, text.split("\n")))


def as_it_is(figure: Figure) -> None:
    """Draw every text of a figure as it is: `$` begins no formula, every character has a glyph.

    Numbers beside an axis may be formulas (10^3).
    """
    numbers: list[Text] = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FixedFormatter):  # it writes its labels again whenever the figure is drawn
                formatter.seq = [drawable(str(label)) for label in formatter.seq]
            elif not isinstance(formatter, FuncFormatter):
                numbers += [*axis.get_ticklabels(which="both"), axis.get_offset_text()]
    for text in figure.findobj(Text):
        if not isinstance(text, Text) or text in numbers:
            continue
        text.set_parse_math(False)
        text.set_text(drawable(text.get_text()))
        if not text.get_text().isascii():
            text.set_fontfamily([BASE, *dict.fromkeys(filter(None, map(_font_of, text.get_text())))])


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Inches that a line of text takes."""
    families = [BASE, *dict.fromkeys(filter(None, map(_font_of, text)))]
    font = FontProperties(family=families, size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


def wrapped(text: str, width: float, size: float, *, bold: bool = False) -> list[str]:
    """A text in lines of at most `width` inches, broken between its parts, else between words.

    The middle of a word that is too long by itself is left out.
    """

    def fits(line: str) -> bool:
        return WIDER * text_width(line, size, bold=bold) <= width

    lines: list[str] = []
    for part in text.split(PARTS):
        joined = f"{lines[-1]}{PARTS}{part}" if lines else part
        if fits(joined):
            lines[-1:] = [joined]
            continue
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}" if line else word
            if line and not fits(longer):
                lines.append(line)
                longer = word
            while not fits(longer) and len(longer) > 4:
                longer = short_name(longer, len(longer) - 1)
            line = longer
        lines.append(line)
    return lines


def _line(text: str) -> str:
    return "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    """A character, or its escape where it cannot be seen or no font has it."""
    there = character.isprintable() and (character.isascii() or _font_of(character) is not None)
    return character if there else character.encode("unicode_escape").decode()


@functools.cache
def _font_of(character: str) -> str | None:
    """The family that draws a character: "" for the base, None if nothing installed does."""
    if ord(character) in _glyphs(BASE):
        return ""
    return next((family for family in _others() if ord(character) in _glyphs(family)), None)


@functools.cache
def _others() -> tuple[str, ...]:
    """The families installed that may hold what the base lacks, in the order of `OTHERS`."""
    return tuple(_installed())


def _installed() -> Iterator[str]:
    families = sorted({entry.name for entry in fontManager.ttflist})
    for beginning in OTHERS:
        yield from (family for family in families if family.startswith(beginning))


@functools.cache
def _glyphs(family: str) -> frozenset[int]:
    """Code points that a family has glyphs for; none where its file cannot be read."""
    try:
        return frozenset(get_font(fontManager.findfont(FontProperties(family=family))).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
