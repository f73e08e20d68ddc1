"""Where the tensors of a run come from.

A dump folder is a source, whose layers can be read in any order, again and again. A model that runs is one too
(`InFlight`): its layers come by once, and each is measured as it passes (`anchorscope.runs.flight`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from anchorscope.dumps import Dump, Entry, LayerTensors, open_dump
from anchorscope.dumps.format import Prompt
from anchorscope.errors import InputError
from anchorscope.vocabulary import Vocabulary

DEVICES = (
    "the layers of a running model are measured where it runs: leave out --devices, or capture the prompts and give the"
    " dump"
)


class Source(Protocol):
    """Q, K and V of the layers of some prompts.

    Attributes:
        identity: names the content, so that a run does not continue with other tensors.
        model: what is known of the model, or None.
        prompts: the prompts.
        vocabulary: text of their tokens, or None.
        entries: one for each prompt and layer: shapes, scale, window, soft-cap.
    """

    @property
    def identity(self) -> str: ...
    @property
    def model(self) -> Mapping[str, Any] | None: ...
    @property
    def prompts(self) -> Sequence[Prompt]: ...
    @property
    def vocabulary(self) -> Vocabulary | None: ...
    @property
    def entries(self) -> Sequence[Entry]: ...

    def stream(self, wanted: Iterable[tuple[Entry, Sequence[int]]]) -> Iterator[LayerTensors]:
        """The tensors of each entry asked for, with these query heads, one entry after another in this order.

        Raises:
            DumpError: tensors are missing or damaged.
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """What a run wants of a source whose layers pass once.

    Attributes:
        asked: every layer that the run is about, measured before or not.
        kv_heads: the layers that must pass now, and which of their kv heads are needed, ascending.
        visit: measures a layer while it is at hand: `InFlight.stream` gives its tensors meanwhile.
        proven: is called whenever `InFlight.record` has changed.
    """

    asked: Sequence[Entry]
    kv_heads: Mapping[Entry, Sequence[int]]
    visit: Callable[[Entry], None]
    proven: Callable[[], None]


class InFlight(ABC):
    """A source whose layers come by once, while a model runs. It is a `Source`; a subclass runs the model.

    Attributes:
        name: what folders of results are called after.
    """

    name: str

    def __init__(self) -> None:
        self._at_hand: dict[Entry, LayerTensors] = {}

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names everything that determines the tensors."""

    @property
    @abstractmethod
    def model(self) -> Mapping[str, Any] | None:
        """What is known of the model."""

    @property
    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """The prompts."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary | None:
        """Text of the prompts' tokens, or None."""

    @property
    @abstractmethod
    def entries(self) -> Sequence[Entry]:
        """The layers of every prompt, as far as they can be measured."""

    @property
    @abstractmethod
    def refused(self) -> Mapping[int, str]:
        """Why other layers cannot be measured, by index."""

    @abstractmethod
    def memory(self, entries: Sequence[Entry], device: torch.device) -> int:
        """Bytes that the source takes on a device while these layers pass."""

    @abstractmethod
    def fly(self, wanted: Wanted) -> None:
        """Run the model and visit every layer wanted, once.

        Raises:
            InputError: the model or a layer is refused.
            RunFailure: the model failed, or memory ran out.
        """

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The source as JSON values: model, prompts, what is known of both. Results keep it (`SOURCE`)."""

    @abstractmethod
    def recall(self, record: object) -> None:
        """Take over what an earlier run found out of this same source; anything else is ignored."""

    def stream(self, wanted: Iterable[tuple[Entry, Sequence[int]]]) -> Iterator[LayerTensors]:
        """The tensors of layers that are at hand; see `Source.stream`."""
        for entry, heads in wanted:
            yield _picked(self._at_hand[entry], heads)

    @contextmanager
    def at_hand(self, entry: Entry, tensors: LayerTensors) -> Iterator[None]:
        """Let `stream` give these tensors inside, and keep nothing of them behind."""
        self._at_hand[entry] = tensors
        try:
            yield
        finally:
            del self._at_hand[entry]


def _picked(tensors: LayerTensors, heads: Sequence[int]) -> LayerTensors:
    """A layer with some of its query heads."""
    if tuple(heads) == tensors.query_heads:
        return tensors
    rows = [tensors.query_heads.index(h) for h in heads]
    successive = rows == list(range(rows[0], rows[0] + len(rows)))
    q = tensors.q[rows[0] : rows[-1] + 1] if successive else tensors.q[rows]
    kv_rows = tuple(tensors.kv_rows[row] for row in rows)
    return LayerTensors(q, tensors.k, tensors.v, tuple(heads), tensors.kv_heads, kv_rows)


def open_source(source: Source | Path | str) -> Source:
    """A source as it is, or the dump in a folder.

    Raises:
        DumpError: the dump is missing or damaged.
    """
    return open_dump(source) if isinstance(source, (str, Path)) else source


def called(source: Source) -> str:
    """A source in the words of a message: "the dump"."""
    return "the model" if isinstance(source, InFlight) else "the dump"


def name_of(source: Source) -> str:
    """What folders of results are called after."""
    if isinstance(source, Dump):
        return source.path.resolve().name
    return getattr(source, "name", "")


def refuse_layers(source: Source, layers: Iterable[int] | None) -> None:
    """Refuse layers that a source cannot give.

    Args:
        source: the source.
        layers: those asked for; None means all.

    Raises:
        InputError: with the reason.
    """
    refused = source.refused if isinstance(source, InFlight) else {}
    for layer in sorted(refused):
        if layers is None or layer in layers:
            raise InputError(refused[layer])


def layer_memory(source: Source, entries: Sequence[Entry], device: torch.device, layers: int = 1) -> int:
    """Bytes on a device that tensors take while these are measured, and the model where one runs.

    Args:
        source: where the tensors come from.
        entries: the layers.
        device: where they are measured.
        layers: how many of a dump's are read at a time.
    """
    if isinstance(source, InFlight):
        return source.memory(entries, device)
    return layers * max(entry.bytes for entry in entries) if device.type == "cpu" else 0


def place_of(source: object) -> object:
    """What tells two sources apart before they are opened: the folders. A list of one is that one."""
    if isinstance(source, Dump):
        return source.path.resolve()
    if isinstance(source, (str, Path)):
        return Path(source).resolve()
    if not isinstance(source, (list, tuple)):
        return source
    places = tuple(map(place_of, source))
    return places[0] if len(places) == 1 else places
