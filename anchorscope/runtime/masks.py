"""Where the queries of a call stand, read off its mask: position of the first query, and each prompt's own keys.

Prompts of a batch may be padded on either side, and a static cache may hand over keys that do not exist yet. Whatever
else a mask hides (or adds) is refused: the kernels could not reproduce it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorscope.capture.check import refuse, visible
from anchorscope.capture.hook import AttentionInputs

CHUNK = 1 << 24  # elements of a mask compared at a time: bounds the extra memory


@dataclass(frozen=True)
class View:
    """Positions of one call, counted from the first key of the row.

    Attributes:
        offset: position of the first query.
        spans: per row of the batch, its prompt's keys [start, stop); padding and unfilled cache lie outside.
    """

    offset: int
    spans: tuple[tuple[int, int], ...]


class Views:
    """`view` with a memory: the layers of a forward share their masks, which are compared once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int | None], tuple[weakref.ref[Tensor], View]] = {}

    def __call__(self, call: AttentionInputs, window: int | None) -> View:
        """The call's positions; `window` is its sliding window.

        Raises:
            Unrepresentable: its mask is not causal with padding and at most that window.
        """
        if not isinstance(call.mask, Tensor) or call.mask.ndim != 4:
            return _unmasked(call)
        key = id(call.mask), window
        if key in self._known and self._known[key][0]() is call.mask:
            return self._known[key][1]
        found = _masked(call, call.mask, window)
        self._known = {k: known for k, known in self._known.items() if known[0]() is not None}
        self._known[key] = weakref.ref(call.mask), found
        return found


def window_of(call: AttentionInputs) -> int | None:
    """The sliding window that the call asks for; None without one or where the mask's absence says it has no effect."""
    window = call.options.get("sliding_window")
    if not window or (call.mask is None and "flash" not in call.implementation and window < call.k.shape[2]):
        return None
    return int(window)


def assumed(call: AttentionInputs) -> View:
    """Positions by shapes alone: no padding, the queries at the end of the keys."""
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if call.implementation == "sdpa" and call.mask is None:
        keys = n  # with more keys it is the first call with a static cache: sdpa's is_causal begins at the first key
    return View(keys - n, ((0, keys),) * batch)


def _unmasked(call: AttentionInputs) -> View:
    """A call without a mask, or with what FlashAttention takes instead: a (B, keys) tensor, one per real token."""
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if not causal or (call.implementation == "eager" and call.mask is None):
        raise refuse(call, "it is bidirectional (no causal mask)")
    if "flash" in call.implementation and isinstance(call.mask, Tensor) and call.mask.shape == (batch, keys):
        return View(keys - n, _runs(call, call.mask.bool()))
    if call.mask is not None:
        raise refuse(call, f"its mask is a {type(call.mask).__name__}, which is not read (use sdpa)")
    if keys != n and "flash" not in call.implementation and call.implementation != "sdpa":
        raise refuse(call, f"{keys} keys for {n} queries come without a mask")
    return assumed(call)


def _masked(call: AttentionInputs, mask: Tensor, window: int | None) -> View:
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if mask.shape[1] != 1 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (n, keys):
        raise refuse(call, f"its mask {tuple(mask.shape)} is not one for all heads, of {n} queries and {keys} keys")
    last = visible(call, mask[:, 0, -1])
    if window is not None:
        last = last.flip(-1).cummax(-1)[0].flip(-1)  # what the window hides of a prompt is no padding
    spans = _runs(call, last)
    # all keys belong to queries, except in a static cache, whose end is not filled yet
    offset = 0 if n == keys else max(stop for _, stop in spans) - n
    bounds = torch.tensor(spans, device=mask.device)
    j = torch.arange(keys, device=mask.device)
    real = (j >= bounds[:, :1]) & (j < bounds[:, 1:])
    wrong = torch.zeros((), dtype=torch.bool, device=mask.device)
    step = max(1, CHUNK // (len(mask) * keys))
    for begin in range(0, n, step):
        part = visible(call, mask[:, 0, begin : begin + step])
        i = torch.arange(begin, begin + part.shape[1], device=mask.device)[:, None] + offset
        expected = (j <= i) & real[:, None]
        if window is not None:
            expected &= i - j < window
        wrong |= (part != expected).any()
    if offset < 0 or bool(wrong):
        kind = "(chunked, prefix or bidirectional attention, or several prompts in a row)"
        raise refuse(call, f"its mask is not causal with padding and at most a sliding window {kind}")
    return View(offset, spans * (batch // len(spans)))


def _runs(call: AttentionInputs, shown: Tensor) -> tuple[tuple[int, int], ...]:
    """The stretch of shown keys [start, stop) in each row of a (B, keys) boolean."""
    runs = []
    for row in shown.cpu():
        at = row.nonzero()[:, 0]
        if not len(at) or int(at[-1]) - int(at[0]) + 1 != len(at):
            raise refuse(call, "its mask hides tokens in the middle of a prompt, or all of it")
        runs.append((int(at[0]), int(at[-1]) + 1))
    return tuple(runs)
