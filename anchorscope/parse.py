"""Small parsers for what users type: thetas, indices, tokens, words. Errors are sentences that name the option."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from anchorscope.errors import InputError

MAX_THETAS = 1000
MAX_TOKENS = 1 << 24  # beyond every model; what fits into memory is said when a run is planned
SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_thetas(text: str, option: str = "--theta") -> tuple[float, ...]:
    """Thetas in nats from a comma list of numbers and inclusive ranges `start:stop:step`; `inf` and `-inf` are legal.

    >>> parse_thetas("6,8,10"), parse_thetas("0:1:0.5"), parse_thetas("-inf,12")
    ((6.0, 8.0, 10.0), (0.0, 0.5, 1.0), (-inf, 12.0))

    Raises:
        InputError: not a number, NaN, empty, a range that runs backwards or holds infinities, over 1000 thetas.
    """
    thetas: list[float] = []
    for part in text.split(","):
        item = part.strip()
        if not item:
            raise InputError(f"{option} {text!r} has an empty element; write numbers separated by commas, like 6,8,10")
        if ":" not in item:
            thetas.append(_theta(item, option))
            continue
        bounds = [_theta(x, option) for x in item.split(":")]
        if len(bounds) != 3 or not all(map(math.isfinite, bounds)):
            raise InputError(f"{option} range {item!r} must be start:stop:step with finite numbers, like 0:20:0.5")
        start, stop, step = bounds
        if step == 0:
            raise InputError(f"{option} range {item!r} has step 0; write it as low:high:positive-step")
        if step < 0 or stop < start:
            raise InputError(f"{option} range {item!r} runs backwards; write it as low:high:positive-step")
        # Multiply, do not add up: 0:20:0.1 must end at 20 and hit 12 exactly.
        count = math.floor((stop - start) / step + 1e-9) + 1
        if count > MAX_THETAS:
            raise InputError(f"{option} range {item!r} holds {count} thetas; at most {MAX_THETAS} are allowed")
        thetas.extend(round(start + i * step, 12) for i in range(count))
    if len(thetas) > MAX_THETAS:
        raise InputError(f"{option} lists {len(thetas)} thetas; at most {MAX_THETAS} are allowed")
    return tuple(thetas)


def _theta(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise InputError(f"{option}: {text.strip()!r} is not a number of nats (use numbers like 12, or inf, -inf)")
    return value


def parse_indices(text: str, option: str, available: Sequence[int]) -> tuple[int, ...]:
    """Indices from `all` or a comma list of numbers and inclusive ranges (`0,5,10-15`), ascending, without repetition.

    Args:
        text: what the user wrote.
        option: the option's name, for errors.
        available: the indices that exist.

    Raises:
        InputError: malformed, a range that runs backwards, or an index that does not exist.
    """
    known = sorted(set(available))
    if text.strip() == "all":
        return tuple(known)
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if match is None:
            raise InputError(f"{option} {text!r} is malformed; write numbers and ranges like 0,5,10-15, or all")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"{option} range {part.strip()!r} runs backwards; write it as low-high")
        missing = [i for i in (first, last) if i not in known]
        if missing:
            raise InputError(f"{option}: {missing[0]} does not exist; there are {describe_indices(known)}")
        chosen.update(i for i in known if first <= i <= last)
    return tuple(sorted(chosen))


def describe_indices(indices: Sequence[int]) -> str:
    """Indices in the notation `parse_indices` reads: [0, 1, 2, 7] -> '0-2,7'."""
    runs: list[list[int]] = []
    for i in sorted(set(indices)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def parse_tokens(text: str, option: str, least: int = 1, most: int = MAX_TOKENS) -> int:
    """A number of tokens: whole, or with k (1,024) or m (1,048,576) behind it.

    >>> parse_tokens("300", "--tokens"), parse_tokens("4k", "--tokens"), parse_tokens("1M", "--tokens")
    (300, 4096, 1048576)

    Args:
        text: what the user wrote.
        option: the option's name, for errors.
        least, most: the smallest and the largest number that make sense.

    Raises:
        InputError: malformed, below `least`, or above `most`.
    """
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,15})([km]?)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise InputError(
            f"{option} {text!r} is no number of tokens; write a whole number like 4096, or 4k for 4,096 and 1m for"
            " 1,048,576"
        )
    value = int(match[1]) * SUFFIXES[match[2].lower()]
    if not least <= value <= most:
        raise InputError(f"{option} {text.strip()} is out of range; it takes {least:,} to {most:,} tokens")
    return value


def parse_lengths(text: str, option: str = "--lengths", least: int = 1, most: int = MAX_TOKENS) -> tuple[int, ...]:
    """Numbers of tokens from a comma list, in its order; see `parse_tokens`.

    >>> parse_lengths("4096,16k")
    (4096, 16384)

    Raises:
        InputError: an element that `parse_tokens` refuses, or the same length twice.
    """
    sizes: list[int] = []
    for part in text.split(","):
        size = parse_tokens(part, option, least, most)
        if size in sizes:
            raise InputError(f"{option} {text!r} names {size:,} tokens twice")
        sizes.append(size)
    return tuple(sizes)


def parse_shares(text: str, option: str) -> tuple[float, ...]:
    """Shares from 0 to 1 from a comma list, ascending, each once.

    Raises:
        InputError: not a number, or outside 0 to 1.
    """
    found = set()
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise InputError(f"{option}: {part.strip()!r} is not a share from 0 to 1; write shares like 0,0.5,1")
        found.add(value + 0.0)  # -0.0 is 0
    return tuple(sorted(found))


def closest(word: str, known: Iterable[str], alike: float = 0.5) -> str | None:
    """The known word that a misspelt one probably means, whatever its case and signs; None if none is close.

    Args:
        word: what was written.
        known: the words that there are.
        alike: share of the letters that must agree.
    """
    names = {_letters(name): name for name in known}
    found = difflib.get_close_matches(_letters(word), names, n=1, cutoff=alike)
    return names[found[0]] if found else None


def check_word(what: str, value: object, known: Iterable[str]) -> None:
    """Refuse a word that is not known, and say which one was probably meant.

    Args:
        what: the option, or what the word names: "--task".
        value: what the user wrote.
        known: all words that there are.

    Raises:
        InputError: it is none of them.
    """
    words = list(known)
    if value not in words:
        meant = closest(value, words) if isinstance(value, str) else None
        raise InputError(
            f"{what} {value!r} is unknown{f' (did you mean {meant}?)' if meant else ''}; use {listed(words)}"
        )


def listed(words: Sequence[str]) -> str:
    """Words to choose from: "bf16, fp16 or fp32"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _letters(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum())
