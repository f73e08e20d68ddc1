"""`anchorscope merge`, and what a command with `--shard` says at its end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import drawn, note, progress_bar, warn
from anchorscope.files import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from anchorscope.runs.shards import Shard


def merge(
    outs: Annotated[
        list[Path],
        typer.Argument(help="Folders of all shards of one run, as `--shard 1/4` and so on wrote them.", metavar="OUT"),
    ],
    out: opt.Out,
    no_figures: opt.NoFigures = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier run in --out")] = False,
    as_json: Annotated[bool, opt.prints_json("the merged report as JSON")] = False,
) -> None:
    """Put the shards of `analyze`, `heads`, `compare` or `calibrate` together: the folder that one process would write.

    Nothing is measured, and no GPU is needed. The dump that was measured must be where it was.
    """
    pictures = drawn(form, dpi, no_figures)
    if form is None and dpi is None:
        del pictures["formats"]  # those that the shards were asked for

    from anchorscope.merging import merge as run

    with progress_bar() as bar:
        merged = run(outs, out, **pictures, overwrite=overwrite, progress=bar, notify=warn)
    note(f"merged {merged.shards} shards of {merged.command}")
    if as_json:
        print(json.dumps(merged.result.report, indent=2))
        return
    importlib.import_module(f"anchorscope.cli.{merged.command}").print_summary(merged.result)


def parse_shard(text: str | None) -> Shard | None:
    """The value of --shard.

    Raises:
        InputError: malformed, or out of range.
    """
    if text is None:
        return None
    from anchorscope.runs.shards import Shard

    return Shard.parse(text)


def print_result(result: Any, file: str, part: Shard | None, as_json: bool, summary: Callable[[Any], None]) -> None:
    """Print what a run came to: its shard, its report as JSON, or its summary.

    Args:
        result: the run; its `path` is the folder.
        file: the name of the report in it.
        part: the shard measured, if it is no whole run.
        as_json: print JSON.
        summary: prints a whole run's summary.
    """
    if part is not None:
        _print_shard(result.path, part, as_json)
    elif as_json:
        sys.stdout.write((result.path / file).read_text(encoding="utf-8"))
    else:
        summary(result)


def _print_shard(out: Path, shard: Shard, as_json: bool) -> None:
    """Say that a shard is complete, and what to do with it."""
    if as_json:
        sys.stdout.write(json.dumps({"shard": shard.index, "of": shard.of, "out": str(out)}) + "\n")
        return
    print(f"{shard} is complete in {visible(out)}; when all are: anchorscope merge OUT... --out MERGED")
