"""The files that figures become: formats, resolution and endings. Whoever names or looks for a picture does it here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorscope.errors import InputError

FORMATS = ("png", "pdf", "svg")
DPI = 110  # of the screen: the smallest letters are 13 pixels high
LEAST_DPI, MOST_DPI = 30, 600

Formats = str | Sequence[str] | Mapping[str, int]


def picture_formats(formats: Formats, dpi: int = DPI, names: tuple[str, str] = ("formats", "dpi")) -> dict[str, int]:
    """Formats with their resolution, each once, in the order of `FORMATS`.

    >>> picture_formats("svg,png", 200)
    {'png': 200, 'svg': 200}

    Args:
        formats: "png", "pdf" and "svg", as a list or separated by commas; or a mapping of formats to dpi.
        dpi: pixels per inch, of a PNG and of the maps inside a PDF or SVG.
        names: what the two are called, for errors.

    Raises:
        InputError: an unknown format, none at all, or a resolution out of range.
    """
    if isinstance(formats, Mapping):
        wanted = {str(name): value for name, value in formats.items()}
    else:
        listed = formats.split(",") if isinstance(formats, str) else list(formats)
        wanted = {str(name).strip().lower().removeprefix("."): dpi for name in listed}
    known = ", ".join(FORMATS[:-1]) + f" and {FORMATS[-1]}"
    if not wanted:
        raise InputError(f"{names[0]} names no format: give some of {known}")
    for name, value in wanted.items():
        if name not in FORMATS:
            raise InputError(f"{names[0]}: {name!r} is no format of figures; there are {known}, separated by commas")
        if isinstance(value, bool) or not isinstance(value, int) or not LEAST_DPI <= value <= MOST_DPI:
            raise InputError(
                f"{names[1]} must be a whole number of pixels per inch from {LEAST_DPI} to {MOST_DPI}, not {value!r}"
            )
    return {name: wanted[name] for name in FORMATS if name in wanted}


def asked_pictures(figures: bool, formats: Formats = ("png",), dpi: int = DPI) -> dict[str, Any]:
    """What is to be drawn, as the state of a folder says it: whether, and the dpi of each format or None."""
    wanted = picture_formats(formats, dpi) if figures else {}
    return {"figures": figures, **{form: wanted.get(form) for form in FORMATS}}


def picture_path(folder: Path, name: str, form: str) -> Path:
    """Where a figure called `name` is saved in a format."""
    return folder / f"{name}.{form}"


def picture_format(path: Path | str) -> str:
    """The format that a file's ending names.

    Raises:
        InputError: it names none.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise InputError(f"{path} does not end in one of {', '.join(f'.{x}' for x in FORMATS)}: name a picture")
    return form


def picture_patterns(folder: str, names: Iterable[str] = ("*",)) -> tuple[tuple[str, str], ...]:
    """(folder, pattern) of the pictures of these names in a folder, in every format."""
    return tuple((folder, f"{name}.{form}") for name in names for form in FORMATS)


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """The pictures in a folder, by name."""
    return tuple(sorted(file for _, pattern in picture_patterns("") for file in folder.glob(pattern)))


def picture_bytes(drawn: int, formats: Mapping[str, int]) -> int:
    """What figures that take `drawn` bytes as PNG at `DPI` take in these formats, about, as measured."""
    return sum(int(drawn * _GROWTH[form](dpi / DPI)) for form, dpi in formats.items())


# As measured of the figures of analyze, heads, compare and calibrate on small dumps, rounded up: all figures of a
# command take 0.35 to 0.55 of their PNGs as PDF, and 0.3 to 0.85 as SVG. Twice the resolution makes PNGs 2.25 times as
# large; of the others only the maps inside grow.
_GROWTH = {
    "png": lambda finer: finer**1.2,
    "pdf": lambda finer: 0.5 + 0.05 * finer**1.2,
    "svg": lambda finer: 0.8 + 0.1 * finer**1.2,
}
