"""How the figures of prompts are called."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 64  # of a prompt's part of a file name; file systems take 255 for the whole


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """Prompt names, in order of appearance, as parts of file names: letters and digits of any script, `.`, `_`, `-`.

    Names that would be equal, also where a file system does not tell capitals, have a number behind. The same names in
    the same order always give the same files.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for prompt in prompts:
        if prompt in names:
            continue
        base = _cleaned(prompt)
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names[prompt] = name
    return names


def _cleaned(prompt: str) -> str:
    """A name that every file system takes, before another word and an ending."""
    text = unicodedata.normalize("NFC", Path(prompt).name.removesuffix(".txt"))
    text = re.sub(r"[^\w.-]+", "-", text).encode("utf-8", "ignore")[:MOST_BYTES].decode("utf-8", "ignore")
    return text.strip("-.") or "prompt"
