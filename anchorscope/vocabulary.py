"""`Vocabulary`: the text of token ids, so that people read words and not numbers.

A token of a byte-level vocabulary may be a part of a character. So a piece is bytes: a run of tokens reads as text
again, and a single token that is no text by itself is shown as its bytes, like `<0xE2>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

MAX_PIECE_BYTES = 1024  # longer ones are runs of blanks or worse; they are left out
MAX_IDS = 1 << 24  # the largest vocabularies have a million


class Vocabulary:
    """Text of token ids.

    Args:
        pieces: by id, the text, or the UTF-8 bytes of a token that may be a part of a character.
    """

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self._pieces = {i: x.encode("utf-8", "replace") if isinstance(x, str) else bytes(x) for i, x in pieces.items()}

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._pieces))

    def __contains__(self, token: object) -> bool:
        return token in self._pieces

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._pieces == other._pieces

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens)"

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes of a token; `#id ` where the vocabulary does not know it, or knows no text for it."""
        return self._pieces.get(token) or f"#{token} ".encode()

    def text(self, token: int) -> str:
        """A token by itself; bytes that are no character are written like `<0xE2>`."""
        return as_text(self.piece(token))

    def passage(self, tokens: Iterable[int]) -> str:
        """A run of tokens as it reads: characters whose bytes lie in several of the tokens are whole."""
        return as_text(b"".join(map(self.piece, tokens)))

    def part(self, tokens: Iterable[int]) -> Vocabulary:
        """The vocabulary of these ids alone."""
        return Vocabulary({i: self._pieces[i] for i in set(tokens) if i in self._pieces})

    def to_json(self) -> dict[str, str | list[int]]:
        """As a dump's manifest holds it: by id in decimal, ascending, text or a list of byte values."""
        return {str(i): plain_piece(self._pieces[i]) for i in self if len(self._pieces[i]) <= MAX_PIECE_BYTES}

    @classmethod
    def from_json(cls, found: object) -> Vocabulary:
        """Inverse of `to_json`, of a value that may come from anybody.

        Raises:
            ValueError: it is of another shape; says where.
        """
        if not isinstance(found, dict) or len(found) > MAX_IDS:
            raise ValueError(f"must be an object of at most {MAX_IDS:,} token ids")
        return cls({_id(key): _piece(key, value) for key, value in found.items()})


def as_text(piece: bytes) -> str:
    """UTF-8 as text; bytes that are no part of a character are written like `<0xE2>`."""
    escaped = piece.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in escaped)


def plain_piece(piece: bytes) -> str | list[int]:
    """A piece as JSON holds it: text, or a list of byte values where it is none."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def as_vocabulary(pieces: Vocabulary | Sequence[str] | None) -> Vocabulary | None:
    """Pieces in any form that callers may have: a list holds the text of every id, empty where there is none."""
    if pieces is None or isinstance(pieces, Vocabulary):
        return pieces
    return Vocabulary(dict(enumerate(pieces)))


def _id(key: str) -> int:
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", key, re.ASCII) is None:
        raise ValueError(f"has the key {key[:40]!r}, which is no token id")
    return int(key)


def _piece(key: str, value: object) -> bytes:
    if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        piece = value.encode()
    elif isinstance(value, list) and all(type(x) is int and 0 <= x < 256 for x in value[: MAX_PIECE_BYTES + 1]):
        piece = bytes(value[: MAX_PIECE_BYTES + 1])
    else:
        raise ValueError(f"holds neither text nor a list of byte values for token {key}")
    if len(piece) > MAX_PIECE_BYTES:
        raise ValueError(f"holds more than {MAX_PIECE_BYTES} bytes for token {key}")
    return piece


__all__ = ["Vocabulary", "as_text", "as_vocabulary", "plain_piece"]
