"""Writing a bench: OUT/bench.json and its figures, each under a temporary name first, then renamed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.errors import InputError, RunFailure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "bench.json"
DPI = 150


def check_out(out: str | Path, overwrite: bool = False) -> Path:
    """Check, before anything is timed, that a result can be written to the folder `out`; creates nothing.

    Raises:
        InputError: `out` is a file, cannot be written, or holds a result and `overwrite` is off.
    """
    folder = Path(out)
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder} is a file; name a folder")
        if (folder / RESULT).exists() and not overwrite:
            raise InputError(f"{folder / RESULT} exists; choose another --out, or add --overwrite")
        parent = folder
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"--out {folder} cannot be written: no permission in {parent}")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error.strerror}") from None
    return folder


def save(data: dict[str, Any], out: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write bench.json and the figures of a result.

    Args:
        data: `BenchResult.to_json()`, with `against` added if compared.
        out: folder, made if missing.
        overwrite: replace an existing result.

    Returns:
        The files written, bench.json first.

    Raises:
        InputError: see `check_out`. RunFailure: the disk is full or fails.
    """
    from anchorscope.bench.figures import figure_density, figure_time

    folder = check_out(out, overwrite)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    figures = {"time.png": figure_time(data), "density.png": figure_density(data)}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure is not None:
                written.append(_write_figure(figure, folder / name))
            else:
                (folder / name).unlink(missing_ok=True)  # not of this result
        part = folder / f".{RESULT}.{os.getpid()}.part"
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(folder / RESULT)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise RunFailure(f"the result could not be written to {folder}: {why}") from None
    return [folder / RESULT, *written]


def _write_figure(figure: Figure, path: Path) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=DPI)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
