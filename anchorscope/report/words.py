"""What tokens say, for the page: read from tokens.json of an analysis; parts of characters are packed as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from anchorscope.errors import DumpError
from anchorscope.files import MAX_JSON_BYTES, read_json
from anchorscope.report.pack import pack_bytes
from anchorscope.shapes import check
from anchorscope.vocabulary import Vocabulary, plain_piece

FILE = "tokens.json"
_SHAPE = {
    "format": str,
    "dump": str,
    "prompts": [{"name": str, "token_ids": [int]}],
    "token_texts": dict,
}


def read_words(folder: Path, identity: str) -> dict[str, list[bytes]]:
    """UTF-8 bytes of every token by prompt; empty where the analysis holds no words, or those of another dump.

    Raises:
        DumpError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    hint = "it is damaged; run analyze again"
    found = read_json(path, MAX_JSON_BYTES, "tokens", error=DumpError)
    check(found, _SHAPE, str(path), hint=hint, error=DumpError)
    if found["format"] != "anchorscope-tokens" or found["dump"] != identity:
        return {}
    try:
        known = Vocabulary.from_json(found["token_texts"])
    except ValueError as error:
        raise DumpError(f"{path}: token_texts {error}: {hint}") from None
    return {p["name"]: [known.piece(i) for i in p["token_ids"]] for p in found["prompts"]}


def pack_words(pieces: Sequence[str | bytes]) -> str:
    """Pieces as the page holds them: JSON, deflated; text, or byte values where a token is a part of a character."""
    return pack_bytes(json.dumps([x if isinstance(x, str) else plain_piece(x) for x in pieces]).encode())
