"""Text of single tokens, read straight from a tokenizer file: tokenizer.json or a GGUF model; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorscope.errors import InputError, MissingBackendError


def token_texts(ids: Sequence[int], pieces: Sequence[str] | None = None) -> list[str]:
    """Text of each token id; `#id ` without a vocabulary, or where it has no such id."""
    if pieces is None:
        return [f"#{i} " for i in ids]
    return [pieces[i] if 0 <= i < len(pieces) and pieces[i] else f"#{i} " for i in ids]


def load_pieces(path: Path | str) -> list[str]:
    """Text of every token of a vocabulary, by id.

    Args:
        path: a tokenizer.json, a folder that holds one, or a GGUF model.

    Raises:
        InputError: missing, damaged, or no vocabulary in it.
        MissingBackendError: a GGUF file, and the package `gguf` is absent.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}: name a tokenizer.json, a folder that holds one, or a GGUF file")
    raw = _from_gguf(path) if path.suffix.lower() == ".gguf" else _from_json(path)
    # GPT-2's byte alphabet and SentencePiece's "▁" never meet in one vocabulary.
    alphabet = _byte_alphabet()
    bytewise = any(p.startswith("\u0120") for p in raw)
    return [_bytes_text(p, alphabet) if bytewise else p.replace("\u2581", " ") for p in raw]


def _from_json(path: Path) -> list[str]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        pairs = (
            list(vocabulary.items())
            if isinstance(vocabulary, dict)
            else [(item[0], i) for i, item in enumerate(vocabulary)]
        )
        pairs += [(item["content"], item["id"]) for item in content.get("added_tokens", [])]
        pieces = [""] * (1 + max(i for _, i in pairs))
        for text, i in pairs:
            pieces[i] = str(text)
        return pieces
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} holds no vocabulary that can be read: name a Hugging Face tokenizer.json") from None


def _from_gguf(path: Path) -> list[str]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingBackendError("reading a GGUF tokenizer needs gguf: pip install 'anchorscope[hf]'") from None
    try:
        field = GGUFReader(str(path)).get_field("tokenizer.ggml.tokens")
        if field is None:
            raise ValueError("no tokens")
        return [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
    except (OSError, ValueError, KeyError, IndexError):
        raise InputError(f"{path} holds no vocabulary that can be read: name a GGUF model with its tokenizer") from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest for code points from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def _bytes_text(piece: str, alphabet: dict[str, int]) -> str:
    if any(c not in alphabet for c in piece):
        return piece  # an added token, written as it is
    return bytes(alphabet[c] for c in piece).decode("utf-8", "replace")


__all__ = ["load_pieces", "token_texts"]
