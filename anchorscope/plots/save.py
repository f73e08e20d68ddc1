"""The one place where figures become files."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from anchorscope.files import write_atomic
from anchorscope.pictures import DPI, picture_format, picture_path
from anchorscope.plots.text import as_it_is

MOST_PIXELS = 30_000  # of a side; matplotlib draws no more than 65,535
# What matplotlib would write of itself and of the time; pictures should not differ because of them.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
_SETTINGS: Any = {"svg.hashsalt": "anchorscope", "svg.fonttype": "none", "pdf.fonttype": 42}
_lock = threading.Lock()


def save_figure(figure: Figure, path: Path | str, *, dpi: int | None = None) -> None:
    """Save a figure as PNG, PDF or SVG, atomically; the same figure gives the same bytes, whatever came before.

    Text stays text in a PDF (as TrueType) and in an SVG (which names its fonts and does not hold them). Maps of many
    cells are pixels in both.

    Args:
        figure: drawn as it is; `$` in a name begins no formula. Where its axes stand is settled when it is first saved.
        path: the file; its ending says the format.
        dpi: pixels per inch, of a PNG and of the maps inside a PDF or SVG; by default the figure's own.

    Raises:
        InputError: the path does not end in a format.
        RunFailure: the file cannot be written.
    """
    form = picture_format(path)
    as_it_is(figure)
    _settle(figure)
    buffer = io.BytesIO()
    fits = int(MOST_PIXELS / max(figure.get_size_inches()))
    with _settings(form):
        figure.savefig(buffer, format=form, dpi=min(dpi or figure.dpi, fits), metadata=_METADATA[form])
    write_atomic(path, buffer.getvalue())


def _settle(figure: Figure) -> None:
    """Lay a figure out for good: another layout would begin where the last one ended."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@contextmanager
def _settings(form: str) -> Iterator[None]:
    """Matplotlib's settings of a format, which it takes from nowhere else; a PNG needs none of them."""
    if form == "png":
        yield
        return
    with _lock, matplotlib.rc_context(_SETTINGS):
        yield


def save_all(
    figures: Iterable[tuple[str, Figure]],
    folder: Path | str,
    *,
    formats: Mapping[str, int] | None = None,
    progress: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Save figures under their names, one at a time, into a folder that is made when missing.

    Args:
        figures: file names without ending, and figures; drawn as they are asked for.
        folder: where to.
        formats: dpi by format; PNG at 110 by default.
        progress: called with each file written.

    Returns:
        The files, in the order written.

    Raises:
        RunFailure: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures:
        for form, dpi in (formats or {"png": DPI}).items():
            path = picture_path(folder, name, form)
            save_figure(figure, path, dpi=dpi)
            written.append(path)
            if progress is not None:
                progress(path)
    return written
