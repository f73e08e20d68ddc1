"""Writing a bench: OUT/bench.json and its figures, each under a temporary name first, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anchorscope.errors import InputError, RunFailure
from anchorscope.files import json_bytes, write_atomic
from anchorscope.locks import folder_lock
from anchorscope.runs.folder import make_folder, remove_strays

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
    from anchorscope.plots.save import save_all

    folder = check_out(out, overwrite)
    figures = {"time": figure_time(data), "density": figure_density(data)}
    make_folder(folder)
    with folder_lock(folder):
        try:
            (folder / RESULT).unlink(missing_ok=True)  # written last: without it nothing looks finished
            for name in figures:
                (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier result
            remove_strays(folder)
            written = save_all(((name, figure) for name, figure in figures.items() if figure is not None), folder)
        except OSError as error:
            raise RunFailure(f"the result could not be written to {folder}: {error.strerror}") from None
        write_atomic(folder / RESULT, json_bytes(data))
    return [folder / RESULT, *written]
