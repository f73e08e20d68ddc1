"""What a command says of itself so that it can be done in shards; `anchorscope.merging` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from anchorscope.errors import InputError
from anchorscope.runs.environment import hardware_name, versions
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.recipe import Kinds, to_json
from anchorscope.runs.units import Unit

if TYPE_CHECKING:
    from anchorscope.runs.life import BaseCommand, Plan, RunOptions

PATHS = ("dump", "sources", "costs")  # fields of requests in which a text is a path

U = TypeVar("U", bound=Unit)


class Sharing(Generic[U]):
    """The part of `life.BaseCommand` that is about shards."""

    folder: ClassVar[RunFolder]
    known: ClassVar[Kinds | None] = None
    plan: Plan[U]
    options: RunOptions

    @classmethod
    def kinds(cls) -> Kinds | None:
        """Dataclasses in its request, by name; None where it cannot be done in shards."""
        return cls.known

    def share(self) -> tuple[U, ...]:
        """The units that this run measures: all, or those of its shard."""
        shard = self.options.shard
        if shard is None:
            return self.plan.units
        self.plan.refuse_shards()
        return shard.pick(self.plan.units)

    def check_shares(self) -> None:
        """Refuse more shards than units before anything is written.

        Raises:
            InputError: there are more.
        """
        self.share()
        for other, _ in self.nested(Path()):
            other.share()

    def whole(self) -> dict[str, Any]:
        """What the state of a run without shards holds of the request."""
        return self.folder.identity(self.plan.identity)

    def identity(self) -> dict[str, Any]:
        """The plan's identity; a shard's also says which one it is, and where it is measured."""
        shard = self.options.shard
        if shard is None:
            return dict(self.plan.identity)
        where = {"hardware": hardware_name(self.plan.device), "versions": versions()}
        return {**self.plan.identity, "shard": {"index": shard.index, "of": shard.of}, **where}

    def recipe(self) -> dict[str, Any] | None:
        """How all shards are finished, as JSON; None where there is but one run.

        Raises:
            InputError: that cannot be said, so that this command cannot be done in shards.
        """
        if self.options.shard is None:
            return None
        kinds, request = self.kinds(), self.plan.request
        if kinds is None:
            raise InputError(f"`{self.folder.command}` cannot be done in shards")
        paths = {name: _as_paths(getattr(request, name)) for name in PATHS if hasattr(request, name)}
        made = to_json(replace(request, **paths), {"request": type(request), **kinds})
        return {"request": made, **self.options.asked}

    def nested(self, root: Path) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        """Other commands, and their folders, whose parts are measured with those of this one."""
        return ()


def _as_paths(value: Any) -> Any:
    if isinstance(value, str):
        return Path(value)
    return [_as_paths(item) for item in value] if isinstance(value, (list, tuple)) else value
