"""The folders of shards: what they say of themselves, whether they belong together, and whether all is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from anchorscope.analysis.request import AnalyzeRequest
from anchorscope.analysis.run import AnalyzeCommand, analyze
from anchorscope.calibration.request import CalibrateRequest
from anchorscope.calibration.run import CalibrateCommand, calibrate
from anchorscope.compare.request import CompareRequest
from anchorscope.compare.run import CompareCommand, compare
from anchorscope.errors import DumpError, InputError
from anchorscope.heads.request import HeadsRequest
from anchorscope.heads.run import HeadsCommand, diagnose
from anchorscope.runs.folder import OWN
from anchorscope.runs.life import BaseCommand
from anchorscope.runs.recipe import from_json
from anchorscope.runs.shards import Shard, numbers, shard_of
from anchorscope.shapes import fits

C = TypeVar("C", bound=BaseCommand[Any, Any])
OF_A_SHARD = ("shard", "hardware", "versions")  # keys of a shard's state beside those of the whole run
SHAPE = {"hardware": str, "versions": dict, "recipe": {"request": {"kind": "request"}, "figures": bool}}


@dataclass(frozen=True)
class Kind(Generic[C]):
    """A command whose runs can be merged: its class, the class of its request, and the function that carries it out."""

    command: type[C]
    request: type
    function: Any


KINDS: tuple[Kind[Any], ...] = (
    Kind(AnalyzeCommand, AnalyzeRequest, analyze),
    Kind(HeadsCommand, HeadsRequest, diagnose),
    Kind(CompareCommand, CompareRequest, compare),
    Kind(CalibrateCommand, CalibrateRequest, calibrate),
)


@dataclass(frozen=True)
class Folder:
    """The folder of one shard.

    Attributes:
        path: the folder.
        shard: which one it is.
        kind: of which command.
        state: what its state file holds.
    """

    path: Path
    shard: Shard
    kind: Kind[Any]
    state: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What all shards of a run have in common, and the whole run too."""
        return {key: value for key, value in self.state.items() if key not in (*OWN, *OF_A_SHARD)}

    def __str__(self) -> str:
        return f"{self.path} ({self.shard})"


def open_shard(path: Path) -> Folder:
    """The shard in a folder.

    Raises:
        DumpError: there is none, or its state is damaged.
    """
    for kind in KINDS:
        folder = kind.command.folder
        state = folder.read(path)
        if state is None:
            continue
        shard = shard_of(state)
        if shard is None:
            raise DumpError(f"{path} holds {folder.what} that is no shard: merge takes what `--shard i/n` wrote")
        if not fits(state, SHAPE):
            raise DumpError(f"{path / folder.state} is damaged: run {shard} again with --overwrite")
        return Folder(path, shard, kind, state)
    raise DumpError(f"{path} holds no shard: merge takes the folders that `--shard i/n` wrote")


def open_shards(paths: Sequence[Path]) -> list[Folder]:
    """All shards of one run, by number.

    Raises:
        InputError: folders of several runs, machines or versions, a shard twice, or one missing.
        DumpError: a folder holds no shard.
    """
    folders = sorted(map(open_shard, paths), key=lambda x: x.shard.index)
    first = folders[0]
    for other in folders[1:]:
        if other.kind is not first.kind or other.identity != first.identity or other.shard.of != first.shard.of:
            what = first.kind.command.folder.what
            raise InputError(
                f"{other} and {first} are not of one run: merge the shards of {what} with the same settings"
            )
        if other.state["recipe"] != first.state["recipe"]:
            raise InputError(f"{other} and {first} were asked for different figures or diagnostics, or of other paths")
        for key, word in (("hardware", "hardware"), ("versions", "versions of the packages")):
            if (mine := other.state[key]) != (its := first.state[key]):
                shown = f": {mine} and {its}" if key == "hardware" else _differing(mine, its)
                raise InputError(
                    f"{other} and {first} were measured with different {word}{shown}; measure one of them again like"
                    " the other"
                )
    by_number: dict[int, Folder] = {}
    for folder in folders:
        if (twice := by_number.setdefault(folder.shard.index, folder)) is not folder:
            raise InputError(f"{twice.path} and {folder.path} are both {folder.shard}: leave one of them out")
    if missing := set(range(1, first.shard.of + 1)) - set(by_number):
        raise InputError(f"{numbers(missing)} of {first.shard.of} missing: name the folders of all shards")
    return folders


def _differing(mine: dict[str, Any], its: dict[str, Any]) -> str:
    names = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
    return ": " + ", ".join(f"{name} {mine.get(name)} and {its.get(name)}" for name in names)


def request_of(folder: Folder) -> Any:
    """The request of the whole run, on the kind of device that it was measured on.

    Raises:
        DumpError: what the folder says of it is damaged.
    """
    kinds = {"request": folder.kind.request, **(folder.kind.command.kinds() or {})}
    settings = folder.state["settings"]
    recipe = folder.state["recipe"]["request"]
    where = {name: settings[name] for name in ("device", "backend") if settings.get(name) and name in recipe["fields"]}
    try:
        return from_json({**recipe, "fields": {**recipe["fields"], **where, "devices": None}}, kinds)
    except InputError as error:
        path = folder.path / folder.kind.command.folder.state
        raise DumpError(f"{path} is damaged: {error}; run {folder.shard} again with --overwrite") from None


def commands(command: BaseCommand[Any, Any], root: Path) -> Iterator[tuple[BaseCommand[Any, Any], Path]]:
    """A command and all that are measured with it, with their folders."""
    yield command, root
    for other, folder in command.nested(root):
        yield from commands(other, folder)


def check_complete(folders: Sequence[Folder], command: BaseCommand[Any, Any]) -> None:
    """Make sure that every shard has measured all its units.

    Raises:
        InputError: names the shard that has not.
    """
    for folder in folders:
        for each, root in commands(command, folder.path):
            units = each.plan.units
            units = folder.shard.pick(units) if units and each.files(root, units[0]) else ()
            missing = [unit for unit in units if not each.holds(root, unit)]
            state = each.folder.read(root)
            same = state is not None and Folder(root, folder.shard, folder.kind, state).identity == each.whole()
            if missing or (units and not same):
                count = f"{len(missing) or len(units)} of {len(units)} units of work are missing or damaged"
                raise InputError(
                    f"{folder} is unfinished ({count}): give its command again, with --shard"
                    f" {folder.shard.index}/{folder.shard.of}"
                )
