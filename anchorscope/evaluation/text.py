"""Prompts built token by token: pieces of text, and running text cut to an exact number of tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING

from anchorscope.errors import InputError
from anchorscope.models.prompts import in_template

if TYPE_CHECKING:
    from anchorscope.models import LoadedModel

OWN_TEXT = "alice"


@cache
def own_text() -> str:
    """The public-domain prose that comes with the package (assets/README.md), one line per paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in _asset(OWN_TEXT).split("\n\n"))


def word_lists() -> tuple[tuple[str, ...], ...]:
    """Adjectives, and nouns: plain words that most vocabularies hold as one token."""
    return tuple(tuple(paragraph.split()) for paragraph in _asset("words").split("\n\n"))


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / f"{name}.txt").read_text(encoding="utf-8")


class Pieces:
    """Token ids of pieces of text, to be joined into one prompt.

    Attributes:
        opening: ids before the user's text: the tokenizer's own beginning, or that of a message in its chat template.
        closing: ids after it; empty without a template.
    """

    def __init__(self, loaded: LoadedModel, *, chat: bool = False) -> None:
        """Prepare a model's tokenizer.

        Raises:
            InputError: the model has none, or (with `chat`) no template that takes a user's message.
        """
        if loaded.tokenizer is None:
            raise InputError(f"model {loaded.name} brings no tokenizer, so no task can be written for it: drop --task")
        self._tokenizer = loaded.tokenizer
        self.opening, self.closing = self._template() if chat else (self._beginning(), [])

    def encode(self, text: str) -> list[int]:
        """Ids of a piece, without special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many pieces at once."""
        return [list(x) for x in self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _beginning(self) -> list[int]:
        bare, whole = self.encode("a"), list(self._tokenizer("a")["input_ids"])
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])

    def _template(self) -> tuple[list[int], list[int]]:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        before, found, after = in_template("tasks", mark, self._tokenizer).partition(mark)
        if not found:
            raise InputError("the tokenizer's chat template does not show a user's message: drop --chat")
        return self.encode(before), self.encode(after)


class Prose:
    """Running text, by sentences: any number of tokens of it, from any sentence on, from the start again at its end."""

    def __init__(self, pieces: Pieces) -> None:
        text = own_text()
        # A sentence keeps the blanks before it, so that the parts add up to the text.
        ends = [m.end() for m in re.finditer(r"[.!?]['\")]*(?=\s+[`'\"(]?[A-Z])", text)]
        self.sentences = [x for x in pieces.encode_all(_parts(text, ends)) if x]

    def cut(self, room: int, first: int) -> tuple[list[int], list[int]]:
        """Exactly `room` ids, beginning with sentence `first` (modulo their number).

        Returns:
            The ids, and the offsets at which a sentence begins: 0 the first, `room` the last.
        """
        ids: list[int] = []
        starts: list[int] = []
        while len(ids) < room:
            starts.append(len(ids))
            ids += self.sentences[(first + len(starts) - 1) % len(self.sentences)]
        return ids[:room], [*starts, room]


def words_cut(rounds: Callable[[], list[list[int]]], room: int) -> list[int]:
    """Exactly `room` ids of words that come in rounds; the last word may be cut."""
    ids: list[int] = []
    while len(ids) < room:
        ids += [i for word in rounds() for i in word]
    return ids[:room]


def insert(ids: Sequence[int], starts: Sequence[int], needles: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Put each needle where a sentence begins, nearest to its depth (0: before the text, 1: after it)."""
    places = [_nearest(starts, depth * len(ids)) for depth, _ in needles]
    result: list[int] = []
    done = 0
    for place, (_, needle) in sorted(zip(places, needles, strict=True), key=lambda x: x[0]):
        result += [*ids[done:place], *needle]
        done = place
    return [*result, *ids[done:]]


def _nearest(starts: Sequence[int], at: float) -> int:
    after = min(bisect_left(starts, at), len(starts) - 1)
    return min(starts[max(after - 1, 0) : after + 1], key=lambda x: abs(x - at))


def _parts(text: str, ends: Sequence[int]) -> list[str]:
    lengths = [b - a for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [text[end - size : end] for size, end in zip(lengths, accumulate(lengths), strict=True) if size]
