"""Merging: the parts of all shards are copied into one folder, and the command that they are of finishes there.

It finds every part and measures nothing; tables, reports and figures are made of the parts as in any run. So the merged
folder is what one process would have written, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from anchorscope.elsewhere import Elsewhere, measured
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import write_atomic
from anchorscope.merging.shards import Folder, check_complete, open_shards, request_of
from anchorscope.pictures import DPI, FORMATS
from anchorscope.runs.executors import Context, Work
from anchorscope.runs.life import RunOptions
from anchorscope.runs.units import Unit

U = TypeVar("U", bound=Unit)


@dataclass(frozen=True)
class Merged:
    """A merged run.

    Attributes:
        command: the command that it is of: "analyze".
        shards: how many there were.
        result: what the command returns: an `Analysis`, a `Diagnosis`, ...
    """

    command: str
    shards: int
    result: Any

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.result.path)


class Gather:
    """An executor that measures nothing: it copies the parts that shards have measured.

    Args:
        folders: of the shards.
        out: the folder that they are merged into.
    """

    def __init__(self, folders: Sequence[Path], out: Path) -> None:
        self._folders, self._out = folders, out

    def run(self, work: Work[U]) -> None:
        """See `anchorscope.runs.executors.Executor`."""
        make: Any = work.measure
        inside = make.root.relative_to(self._out)
        for unit in work.units:
            if make.command.files(make.root, unit):
                self._copy(make, inside, unit)
            else:  # a run of its own
                make(unit, Context(torch.device("cpu")))
            work.finished(unit)

    def _copy(self, make: Any, inside: Path, unit: Unit) -> None:
        for folder in self._folders:
            if not make.command.holds(folder / inside, unit):
                continue
            for source, target in zip(
                make.command.files(folder / inside, unit), make.command.files(make.root, unit), strict=True
            ):
                write_atomic(target, source.read_bytes())
            return
        raise RunFailure(f"no shard holds {inside / unit.stem} any more: one of them changed meanwhile; merge again")


def merge(folders: Sequence[Path | str], out: Path | str, **options: Any) -> Merged:
    """Make the folder of a whole run of those of its shards.

    Args:
        folders: of all shards, in any order.
        out: the output folder; new, empty, or holding an unfinished merger of the same run.
        **options: `overwrite`, `resume`, `progress` and `notify` of `RunOptions`; figures are drawn as the shards were
            asked for them, unless `figures=False`, or `formats` and `dpi` say otherwise.

    Returns:
        The merged run: byte for byte the folder that the command writes without `shard`, but for the time at which
        nested runs started.

    Raises:
        InputError: shards of several runs, missing, given twice, unfinished, or measured on several kinds of hardware;
            an input of the run that is no longer what was measured; an `out` that cannot be used.
        DumpError: a folder without a shard, or an input that is missing.
        RunFailure: disk full.
    """
    paths, target = [Path(folder) for folder in folders], Path(out)
    if not paths:
        raise InputError("name the folders of all shards")
    if any(target.absolute() == path.absolute() for path in paths):
        raise InputError(f"--out {target} is one of the shards: name another folder")
    shards = open_shards(paths)
    first = shards[0]
    started = min(shard.state["started"] for shard in shards)
    recipe = first.state["recipe"]
    drawn = {form: recipe[form] for form in FORMATS if recipe.get(form)} or {"png": DPI}
    how: dict[str, Any] = {"formats": drawn, **options}
    how["figures"] = options.get("figures", True) and recipe["figures"]
    with measured(Elsewhere(first.state["hardware"], first.state["versions"], started)):
        plan = _plan(first)
        command = first.kind.command(replace(plan, devices=()), RunOptions())
        if command.whole() != first.identity:
            raise InputError(
                f"{first} was measured of other inputs than are there now: the dump or the results that it read changed"
            )
        check_complete(shards, command)
        how["executor"] = Gather(paths, target)
        source = next(iter(vars(plan.request).values()))
        return Merged(command.folder.command, len(shards), first.kind.function(source, target, plan=plan, **how))


def _plan(shard: Folder) -> Any:
    try:
        return request_of(shard).plan()
    except DumpError as error:
        raise DumpError(f"{shard} cannot be finished without what it was measured of: {error}") from None
