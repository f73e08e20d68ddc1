"""The folder of a bench, and how a result that was measured without one gets into it afterwards."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from anchorscope.bench.rows import FORMAT
from anchorscope.errors import InputError
from anchorscope.pictures import DPI, Formats, asked_pictures, picture_bytes, picture_formats, picture_patterns
from anchorscope.runs.folder import RunFolder

REPORT = "bench.json"
VERSION = 1
FOLDER = RunFolder(
    what="a bench",
    command="bench",
    format=f"{FORMAT}-run",
    version=VERSION,
    report=REPORT,
    parts=(("parts", "case-*.json"), *picture_patterns(".", ("time", "density"))),
    figures=".",
    kept=("timed input", "parts/case-*.json"),
    stateless=FORMAT,
)
_DISK = 1_000_000  # bytes of figures and JSON, at most about


def save(
    data: dict[str, Any], out: str | Path, *, overwrite: bool = False, formats: Formats = ("png",), dpi: int = DPI
) -> list[Path]:
    """Write bench.json and the figures of a result.

    Args:
        data: `BenchResult.to_json()`, with `against` added if compared.
        out: folder, made if missing.
        overwrite: replace an existing result.
        formats, dpi: of the figures, as in `bench`.

    Returns:
        The files written, bench.json first.

    Raises:
        InputError: `out` cannot be used, or holds a result and `overwrite` is off.
        RunFailure: the disk is full or fails.
    """
    from anchorscope.bench.figures import draw_all

    content = {"result": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}
    pictures = picture_formats(formats, dpi)
    asked, disk = asked_pictures(True, pictures), picture_bytes(_DISK, pictures)
    with FOLDER.run(Path(out), content, asked=asked, disk=disk, overwrite=overwrite) as under_way:
        figures = draw_all(data, under_way.path, formats=under_way.pictures)
        under_way.finish(data)
    return [under_way.path / REPORT, *figures]


def check_out(out: str | Path, overwrite: bool = False) -> Path:
    """Check that a result can be written to the folder `out`; `bench` and `save` do so themselves.

    Raises:
        InputError: `out` is a file, or holds a result and `overwrite` is off.
    """
    warnings.warn("anchorscope.bench.bench checks its folder itself", DeprecationWarning, stacklevel=2)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a folder")
    if (folder / REPORT).exists() and not overwrite:
        raise InputError(f"{folder / REPORT} exists; choose another --out, or add --overwrite")
    return folder
