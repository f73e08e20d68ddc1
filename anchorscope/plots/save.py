"""The one place where figures become files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter

from anchorscope.files import write_atomic


def save_figure(figure: Figure, path: Path | str) -> None:
    """Save a figure as PNG at its own resolution, atomically; the same figure gives the same bytes.

    Raises:
        RunFailure: the file cannot be written.
    """
    _names_literally(figure)
    buffer = io.BytesIO()
    # matplotlib would write its version into the file; pictures should not differ because of it
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _names_literally(figure: Figure) -> None:
    """Draw every text as it is: a `$` in a name begins no formula. Numbers beside an axis may be formulas (10^3)."""
    numbers = [
        text
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter))
        for text in (*axis.get_ticklabels(which="both"), axis.get_offset_text())
    ]
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in numbers:
            text.set_parse_math(False)


def save_all(
    figures: Iterable[tuple[str, Figure]], folder: Path | str, *, progress: Callable[[Path], None] | None = None
) -> list[Path]:
    """Save figures under their names, one at a time, into a folder that is made when missing.

    Args:
        figures: file names without ending, and figures; drawn as they are asked for.
        folder: where to.
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
        path = folder / f"{name}.png"
        save_figure(figure, path)
        written.append(path)
        if progress is not None:
            progress(path)
    return written


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """Prompt names, in order of appearance, as parts of file names; equal after cleaning means a number behind."""
    names: dict[str, str] = {}
    for prompt in prompts:
        if prompt not in names:
            base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(prompt).name.removesuffix(".txt"))[:48].strip("-.") or "prompt"
            name, number = base, 1
            while name in names.values():
                number += 1
                name = f"{base}-{number}"
            names[prompt] = name
    return names
