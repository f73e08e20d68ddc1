"""Where the tensors of a run come from.

A dump folder is a source today. A model that is running can be one: it answers `stream` with the layers of a prefill
as they come by, in the order asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from anchorscope.dumps import Dump, Entry, LayerTensors
from anchorscope.dumps.format import Prompt
from anchorscope.vocabulary import Vocabulary


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
