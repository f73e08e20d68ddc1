"""Text of single tokens, read straight from a tokenizer file: tokenizer.json or a GGUF model; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchorscope.errors import InputError, MissingBackendError
from anchorscope.files import check_regular, read_json
from anchorscope.shapes import Row, check

MAX_BYTES = 1 << 28
MAX_GGUF_BYTES = 1 << 43
MAX_TOKENS = 1 << 24  # ids: the largest vocabularies have a million
_SHAPE = {
    "model": {"vocab": ({str: int}, [Row(str, float)])},
    "added_tokens": ([{"content": str, "id": int}], None, ...),
}


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
    if not path.exists():
        raise InputError(f"no tokenizer at {path}: name a tokenizer.json, a folder that holds one, or a GGUF file")
    raw = _from_gguf(path) if path.suffix.lower() == ".gguf" else _from_json(path)
    # GPT-2's byte alphabet and SentencePiece's "▁" never meet in one vocabulary.
    alphabet = _byte_alphabet()
    bytewise = any(p.startswith("\u0120") for p in raw)
    return [_bytes_text(p, alphabet) if bytewise else p.replace("\u2581", " ") for p in raw]


def _from_json(path: Path) -> list[str]:
    hint = "there is no vocabulary that can be read, name a Hugging Face tokenizer.json"
    try:
        content = read_json(path, MAX_BYTES, "tokenizer")
    except InputError as error:
        raise InputError(f"{error}: {hint}") from None
    check(content, _SHAPE, f"tokenizer {path}", hint=hint)
    vocabulary = content["model"]["vocab"]
    pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(x[0], i) for i, x in enumerate(vocabulary)]
    pairs += [(item["content"], item["id"]) for item in content.get("added_tokens") or []]
    count = 1 + max((i for _, i in pairs), default=-1)
    if not 0 < count <= MAX_TOKENS:
        raise InputError(f"tokenizer {path} has ids up to {count - 1}: {hint}")
    pieces = [""] * count
    for text, i in pairs:
        pieces[i] = text
    return pieces


def _from_gguf(path: Path) -> list[str]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingBackendError("reading a GGUF tokenizer needs gguf: pip install 'anchorscope[hf]'") from None
    check_regular(path, MAX_GGUF_BYTES, "tokenizer")
    try:
        field = GGUFReader(str(path)).get_field("tokenizer.ggml.tokens")
        if field is None:
            raise ValueError("no tokens")
        return [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
    except MemoryError:
        raise  # that is no fault of the file
    except Exception:  # the package checks little: a damaged file fails it in any way
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
