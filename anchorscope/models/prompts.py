"""This module turns files and text into the token ids that a model prefills."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anchorscope.errors import InputError, MissingBackendError
from anchorscope.files import MAX_PROMPT_BYTES, read_stream, visible
from anchorscope.shown import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anchorscope.models.positions import Positions


@dataclass(frozen=True)
class PromptInput:
    """A prompt with its name, and its text or token ids.

    Attributes:
        name: becomes the prompt's name in the dump (made unique there).
        text: what the tokenizer reads, or None.
        token_ids: ready ids, used as they are instead of `text`.
    """

    name: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model reads it. `text` is the part of the text that the ids cover, if known."""

    name: str
    token_ids: tuple[int, ...]
    text: str | None


def prompt_from_file(path: str | os.PathLike[str]) -> PromptInput:
    """Read a UTF-8 text file; it is named after the file's stem.

    Raises:
        InputError: the file is missing, a folder, unreadable, empty, or not text.
    """
    path = Path(path)
    return PromptInput(path.stem, decode(read_stream(path, MAX_PROMPT_BYTES, "prompt"), f"prompt {path}"))


def token_ids_from_file(path: str | os.PathLike[str]) -> PromptInput:
    """Read token ids from a file (see `parse_token_ids`); the prompt is named after the file's stem.

    Raises:
        InputError: the file is missing, a folder, unreadable, empty, or does not hold token ids.
    """
    path = Path(path)
    return PromptInput(
        path.stem, token_ids=parse_token_ids(read_stream(path, MAX_PROMPT_BYTES, "token ids"), f"token ids {path}")
    )


def parse_token_ids(raw: bytes, where: str) -> tuple[int, ...]:
    """Parse token ids: a JSON list, or decimal numbers separated by spaces, line ends or commas.

    Raises:
        InputError: the text is empty, or something else.
    """
    words = re.split(r"[\s,]+", decode(raw, where).strip().removeprefix("[").removesuffix("]").strip())
    for word in words:
        if re.fullmatch(r"\d{1,9}", word, re.ASCII) is None:
            raise InputError(
                f"{where} must hold whole numbers, as a JSON list or with spaces between; not {word[:40]!r}"
            )
    return tuple(map(int, words))


def decode(raw: bytes, where: str) -> str:
    """Decode the bytes of a prompt; a byte order mark is dropped.

    Raises:
        InputError: they are empty, binary, or not UTF-8.
    """
    if b"\0" in raw:
        raise InputError(f"{where} is binary (it holds zero bytes): give a UTF-8 text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError(f"{where} is empty")
    return text


def unique_names(prompts: Sequence[PromptInput]) -> list[PromptInput]:
    """Return the prompts with distinct names: repeated ones get "-2", "-3", ...; unprintable characters become "_"."""
    taken: set[str] = set()
    result = []
    for prompt in prompts:
        base = "".join(c if c.isprintable() else "_" for c in prompt.name).strip()[:180] or "prompt"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name)
        result.append(replace(prompt, name=name))
    return result


def tokenize(
    prompt: PromptInput,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int | None,
    positions: Positions | None,
    vocabulary: int | None,
    chat: bool = False,
    special_tokens: bool = True,
    notify: Callable[[str], None],
) -> TokenizedPrompt:
    """Return the token ids of a prompt, cut to the first `tokens`.

    Args:
        prompt: a text or token ids.
        tokenizer: the model's tokenizer; it may be None if the prompt brings ids.
        tokens: the prompt length N; None means the whole prompt.
        positions: how many positions the model has, or None if that does not matter.
        vocabulary: the number of embeddings, or None if unknown.
        chat: make the text a user's message in the tokenizer's chat template, up to where the answer would begin.
        special_tokens: let the tokenizer add its special tokens (a template brings its own).
        notify: receives a warning where the prompt is cut, is shorter than `tokens` or longer than the model is made
            for, or begins with a special token twice.

    Raises:
        InputError: there are fewer than 2 tokens or more than the model's positions, an id lies outside the
            vocabulary, or the tokenizer or its chat template is missing.
        MissingBackendError: the template needs jinja2, which is missing.
    """
    encoded = _encoded(prompt, tokenizer, chat, special_tokens, notify)
    ids, text, whole = encoded.ids, encoded.text, len(encoded.ids)
    if tokens is not None:
        if whole < tokens:
            notify(
                f"warning: prompt {prompt.name} has {counted(whole, 'token')}, fewer than the {tokens} asked"
                f" for: it is used whole"
            )
        elif whole > tokens:
            notify(f"warning: prompt {prompt.name} has {counted(whole, 'token')} and is cut to the first {tokens}")
        ids = ids[:tokens]
    if len(ids) < 2:
        raise InputError(f"prompt {prompt.name} has {counted(len(ids), 'token')}: at least 2 are needed")
    if positions is not None:
        positions.check(prompt.name, len(ids), notify)
    bad = next((i for i in ids if not 0 <= i < (vocabulary or i + 1)), None)
    if bad is not None:
        raise InputError(f"prompt {prompt.name}: token id {bad} is outside the model's vocabulary of {vocabulary}")
    if text is not None and len(ids) < whole:
        if encoded.offsets is not None:
            text = text[: max(end for _, end in encoded.offsets[: len(ids)])]
        else:
            text = None if tokenizer is None else str(tokenizer.decode(ids))
    return TokenizedPrompt(prompt.name, tuple(ids), text)


class _Encoded(NamedTuple):
    """A whole prompt's ids, the text they came from, and each token's (start, end) in it; None if unknown."""

    ids: list[int]
    text: str | None
    offsets: list[tuple[int, int]] | None


def _encoded(
    prompt: PromptInput,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool,
    special_tokens: bool,
    notify: Callable[[str], None],
) -> _Encoded:
    """Encode the whole prompt; see `tokenize`."""
    text = prompt.text
    if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"prompt {prompt.name} holds half of a surrogate pair, which is no text")
    if prompt.token_ids is not None:
        return _Encoded(list(prompt.token_ids), text, None)
    if text is None:
        raise InputError(f"prompt {prompt.name} has neither text nor token ids")
    if tokenizer is None:
        raise InputError(f"prompt {prompt.name}: the model brings no tokenizer, so give token ids")
    options: dict[str, Any] = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    if chat:
        text, special_tokens = in_template(f"prompt {prompt.name}", text, tokenizer), False
    # `verbose` is off since long texts are normal here: `tokenize` cuts them
    found = tokenizer(text, verbose=False, add_special_tokens=special_tokens, **options)
    ids = list(found["input_ids"])
    if (token := _doubled(ids, text, tokenizer)) is not None:
        notify(
            f"warning: prompt {prompt.name} begins with {token} twice: its text has it and the tokenizer adds it;"
            " take it out of the text, or let the tokenizer add none (--no-special-tokens)"
        )
    return _Encoded(ids, text, found.get("offset_mapping"))


def _doubled(ids: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that the text begins with although the tokenizer adds it to every text, or None."""
    if not ids or ids[0] not in tokenizer.all_special_ids:
        return None
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    # some tokenizers make the blank before the text a token of its own
    return token if text.lstrip().startswith(token) and list(ids[:3]).count(ids[0]) > 1 else None


def in_template(where: str, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put the text as a user's message into the model's chat template, up to where the answer begins.

    Args:
        where: the name of the text, for messages.
        text: what the user says.
        tokenizer: the model's.

    Raises:
        InputError: there is no template, or it fails.
        MissingBackendError: the template needs jinja2, which is missing.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: the tokenizer has no chat template; drop --chat")
    try:
        message = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except ImportError as error:
        raise MissingBackendError(f"the chat template needs a package that is missing: {error}") from None
    except MemoryError:
        raise  # that is no fault of the template
    except Exception as error:  # a template is a program that came with the model and may fail in any way
        raise InputError(f"{where}: the model's chat template failed: {visible(error, 300)}") from None
