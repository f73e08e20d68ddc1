"""Text of single tokens: from a loaded tokenizer, or read straight from tokenizer.json or a GGUF model.

Vocabularies write blanks and bytes in several ways (`Ġthe`, `▁the`, `##the`, `the</w>`, `<0xE2>`); a `Style` is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

from anchorscope.errors import InputError, MissingBackendError
from anchorscope.files import check_regular, read_json
from anchorscope.shapes import Row, check
from anchorscope.vocabulary import MAX_IDS, Vocabulary, as_text, as_vocabulary

MAX_BYTES = 1 << 28
MAX_GGUF_BYTES = 1 << 43
_SHAPE = {
    "model": {"vocab": ({str: int}, [Row(str, float)])},
    "added_tokens": ([{"content": str, "id": int}], None, ...),
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARKS = "\u0120\u2581"  # how GPT-2's byte alphabet and SentencePiece write the blank before a word
_GGUF_AS_IS = (3, 4)  # llama.cpp's token types: control, user-defined; both are text as it stands


class Style(Enum):
    """How a vocabulary writes its tokens."""

    BYTES = "each character stands for a byte, as in GPT-2"
    METASPACE = "U+2581 is a blank, <0xE2> a byte, as in SentencePiece"
    WORDPIECE = "## continues a word, as in BERT"
    SUFFIX = "</w> ends a word"
    CONTINUED = "@@ says that the word goes on"
    LATIN = "each character is the byte of its number"
    WORDS = "whole words"

    def piece(self, raw: str) -> bytes:
        """UTF-8 bytes of a token as the vocabulary writes it."""
        if self is Style.BYTES:
            alphabet = byte_alphabet()
            return bytes(alphabet[c] for c in raw) if all(c in alphabet for c in raw) else _utf8(raw)
        if self is Style.LATIN:
            return raw.encode("latin-1") if all(c < "\u0100" for c in raw) else _utf8(raw)
        if (byte := _BYTE.fullmatch(raw)) is not None:
            return bytes([int(byte[1], 16)])
        if self is Style.METASPACE:
            raw = raw.replace("\u2581", " ")
        elif self is Style.WORDPIECE:
            raw = raw[2:] if raw.startswith("##") else f" {raw}"
        elif self is Style.SUFFIX:
            raw = raw.removesuffix("</w>") + " " * raw.endswith("</w>")
        elif self is Style.CONTINUED:
            raw = raw.removesuffix("@@") + " " * (not raw.endswith("@@"))
        elif self is Style.WORDS:
            raw = f" {raw}"
        return _utf8(raw)


# What a tokenizer that joins these tokens makes of them tells its style; the first that fits counts.
_PROBES = (
    (Style.BYTES, ("a", "\u0120b"), "a b"),
    (Style.METASPACE, ("a", "\u2581b"), "a b"),
    (Style.WORDPIECE, ("a", "##b"), "ab"),
    (Style.SUFFIX, ("a</w>", "b</w>"), "a b"),
    (Style.CONTINUED, ("a@@", "b"), "ab"),
    (Style.LATIN, ("\u00c3", "\u00a9"), "\u00e9"),
    (Style.WORDS, ("a", "b"), "a b"),
)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def token_texts(ids: Sequence[int], pieces: Vocabulary | Sequence[str] | None = None) -> list[str]:
    """Text of each token id; `#id ` without a vocabulary, or where it has no such id."""
    known = as_vocabulary(pieces) or Vocabulary({})
    return [known.text(i) for i in ids]


def tokenizer_texts(tokenizer: Any, ids: Iterable[int]) -> Vocabulary:
    """Text of token ids as a loaded tokenizer has them, fast or slow; only what it knows.

    Args:
        tokenizer: one of transformers, or any object with its `convert_ids_to_tokens` and `convert_tokens_to_string`.
        ids: the ids wanted.
    """
    as_is = _added(tokenizer)
    raw = {i: as_is[i] if i in as_is else _raw(tokenizer, i) for i in sorted(set(ids))}
    written = [x for i, x in raw.items() if isinstance(x, str) and i not in as_is]
    style = _style_of(tokenizer)
    if style in (None, Style.WORDS) and any(x[0] in MARKS for x in written if x):
        style = _guessed(written)
    plain = style or Style.METASPACE
    return Vocabulary({i: plain.piece(x) if isinstance(x, str) and i not in as_is else x for i, x in raw.items() if x})


def load_vocabulary(path: Path | str) -> Vocabulary:
    """Text of every token of a vocabulary.

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
    return _from_gguf(path) if path.suffix.lower() == ".gguf" else _from_json(path)


def load_pieces(path: Path | str) -> list[str]:
    """Text of every token of a vocabulary by id, empty where an id has none; as `load_vocabulary`."""
    known = load_vocabulary(path)
    return [known.text(i) if i in known else "" for i in range(max(known, default=-1) + 1)]


def _from_json(path: Path) -> Vocabulary:
    hint = "there is no vocabulary that can be read, name a Hugging Face tokenizer.json"
    try:
        content = read_json(path, MAX_BYTES, "tokenizer")
    except InputError as error:
        raise InputError(f"{error}: {hint}") from None
    check(content, _SHAPE, f"tokenizer {path}", hint=hint)
    vocabulary = content["model"]["vocab"]
    pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(x[0], i) for i, x in enumerate(vocabulary)]
    added = [(item["content"], item["id"]) for item in content.get("added_tokens") or []]
    ids = [i for _, i in (*pairs, *added)]
    if not ids or max(ids) >= MAX_IDS or min(ids) < 0:
        raise InputError(f"tokenizer {path} has ids up to {max(ids, default=-1)}: {hint}")
    style = _stated(content) or _guessed(text for text, _ in pairs)
    return Vocabulary({**{i: style.piece(text) for text, i in pairs if text}, **{i: text for text, i in added if text}})


def _stated(content: Mapping[str, Any]) -> Style | None:
    """The style that the decoder of a tokenizer.json, or what it does before encoding, tells."""
    for place in ("decoder", "pre_tokenizer"):
        kinds = set(_types(content.get(place)))
        for kind, style in (
            ("ByteLevel", Style.BYTES),
            ("Metaspace", Style.METASPACE),
            ("ByteFallback", Style.METASPACE),
            ("WordPiece", Style.WORDPIECE),
            ("BPEDecoder", Style.SUFFIX),
        ):
            if kind in kinds:
                return style
    return Style.WORDPIECE if content["model"].get("type") == "WordPiece" else None


def _types(found: Any, depth: int = 0) -> Iterator[str]:
    """The type of a part of a tokenizer, and those of the parts it consists of."""
    if not isinstance(found, dict) or depth > 4:
        return
    if isinstance(found.get("type"), str):
        yield found["type"]
    for key in ("decoders", "pretokenizers"):
        for inner in found[key][:100] if isinstance(found.get(key), list) else ():
            yield from _types(inner, depth + 1)


def _guessed(pieces: Iterable[str]) -> Style:
    """GPT-2's byte alphabet or SentencePiece's blank, by what begins more tokens."""
    marks = [p[0] for p in pieces if p]
    return Style.BYTES if marks.count(MARKS[0]) > marks.count(MARKS[1]) else Style.METASPACE


def _from_gguf(path: Path) -> Vocabulary:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingBackendError("reading a GGUF tokenizer needs gguf: pip install 'anchorscope[hf]'") from None
    check_regular(path, MAX_GGUF_BYTES, "tokenizer")
    try:
        reader = GGUFReader(str(path))
        field = reader.get_field("tokenizer.ggml.tokens")
        if field is None:
            raise ValueError("no tokens")
        raw = [bytes(field.parts[i]) for i in field.data]
        types = reader.get_field("tokenizer.ggml.token_type")
        kinds = [] if types is None else [int(types.parts[i][0]) for i in types.data]
        kind = reader.get_field("tokenizer.ggml.model")
        said = "" if kind is None else bytes(kind.parts[kind.data[0]]).decode("utf-8", "replace")
    except MemoryError:
        raise  # that is no fault of the file
    except Exception:  # the package checks little: a damaged file fails it in any way
        raise InputError(f"{path} holds no vocabulary that can be read: name a GGUF model with its tokenizer") from None
    style = {"gpt2": Style.BYTES, "llama": Style.METASPACE}.get(said) or _guessed(
        piece.decode("utf-8", "replace") for piece in raw
    )
    kinds += [0] * (len(raw) - len(kinds))
    return Vocabulary(
        {
            i: x if kind in _GGUF_AS_IS else style.piece(x.decode("utf-8", "replace"))
            for i, (x, kind) in enumerate(zip(raw, kinds, strict=False))
            if x
        }
    )


def _raw(tokenizer: Any, token: int) -> str | bytes:
    """A token as its vocabulary writes it: text, or bytes as tiktoken has them; empty if there is none."""
    found = _quietly(lambda: tokenizer.convert_ids_to_tokens(token))
    return found if isinstance(found, (str, bytes)) else ""


def _style_of(tokenizer: Any) -> Style | None:
    """How a loaded tokenizer writes its tokens, by what it makes of some; None if that does not tell."""
    join: Callable[[list[str]], Any] = getattr(tokenizer, "convert_tokens_to_string", lambda _: None)
    for style, tokens, text in _PROBES:
        found = _quietly(partial(join, list(tokens)))
        if isinstance(found, str) and found.strip() == text:
            return style
    return None


def _added(tokenizer: Any) -> dict[int, str]:
    """The tokens that stand outside the vocabulary, by id: special ones and others."""
    found: dict[int, str] = {}
    decoder = _quietly(lambda: dict(tokenizer.added_tokens_decoder)) or {}
    for i, token in decoder.items():
        text = getattr(token, "content", token)
        if isinstance(i, int) and isinstance(text, str) and text:
            found[i] = text
    return found


def _quietly(action: Callable[[], Any]) -> Any:
    """What an action gives, or None: code that comes with a model may fail in any way, and words are worth no run."""
    try:
        return action()
    except MemoryError:
        raise
    except Exception:
        return None


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest for code points from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


__all__ = ["Vocabulary", "as_text", "load_pieces", "load_vocabulary", "token_texts", "tokenizer_texts"]
