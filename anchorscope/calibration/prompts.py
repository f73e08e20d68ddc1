"""The prompts of a calibration: how they are called, which are one text at several lengths, which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from anchorscope.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One prompt of one dump.

    Attributes:
        dump: identity of the dump.
        name: its name there.
        tokens: its length.
        sha256: hash of its token ids, if the source says so.
        token_ids: the ids, if the source holds them.
    """

    dump: str
    name: str
    tokens: int
    sha256: str | None = None
    token_ids: tuple[int, ...] | None = field(default=None, repr=False, compare=False)


def labels(prompts: Sequence[Prompt]) -> list[str]:
    """A name for each prompt: its own, with its length or a number where several share it."""
    found: list[str] = []
    for p in prompts:
        same = [q for q in prompts if q.name == p.name]
        name = p.name
        if len(same) > 1:
            name += f" ({p.tokens:,})"
        twins = [q for q in same if q.tokens == p.tokens]
        if len(twins) > 1:
            name += f" #{twins.index(p) + 1}"
        found.append(name)
    return found


def same_text(prompts: Sequence[Prompt]) -> list[str]:
    """A key per prompt, equal where two prompts are one text at several lengths: same name, or one begins the other."""
    keys = [p.name for p in prompts]
    for i, p in enumerate(prompts):
        for j, q in enumerate(prompts):
            if keys[i] == keys[j] or p.token_ids is None or q.token_ids is None or p.tokens > q.tokens:
                continue
            if q.token_ids[: p.tokens] == p.token_ids:
                low, high = sorted((keys[i], keys[j]))
                keys = [low if k == high else k for k in keys]
    return keys


def hold_out(prompts: Sequence[Prompt], holdout: float | Sequence[str], seed: int) -> list[bool]:
    """Which prompts are held out: a share of the texts, drawn by a hash of their names, or those named.

    A text is never split: all its lengths are on one side.

    Raises:
        InputError: a share outside [0, 1), an unknown name, fewer than two texts, nothing left to fit.
    """
    keys = same_text(prompts)
    texts = sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest())
    if isinstance(holdout, (int, float)):
        if not 0 <= holdout < 1:
            raise InputError(f"--holdout {holdout!r} must be a share from 0 to below 1, or names of prompts")
        if holdout == 0:
            return [False] * len(prompts)
        if len(texts) < 2:
            what = "is only one prompt" if len(prompts) == 1 else "are only lengths of one text"
            raise InputError(
                f"there {what}, so none can be held out to check the promise: give other prompts too, or --holdout 0"
            )
        held = set(texts[: min(max(round(holdout * len(texts)), 1), len(texts) - 1)])
    else:
        names = {p.name: k for p, k in zip(prompts, keys, strict=True)}
        if unknown := [name for name in holdout if name not in names]:
            raise InputError(f"--holdout: there is no prompt {unknown[0]!r}; there are {', '.join(names)}")
        held = {names[name] for name in holdout}
        if len(held) == len(texts):
            raise InputError("--holdout names every prompt: leave at least one to fit")
    return [k in held for k in keys]


# ----------------------------------------------------------------------------------------------------------------
