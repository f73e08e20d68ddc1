"""This module reads the positions of a call off its mask: that of the first query, and each prompt's own keys.

Prompts of a batch may be padded on either side, and a static cache may hand over keys that do not exist yet. A mask
that hides (or adds) anything else is refused: the kernels could not reproduce it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorscope.models.calls import AttentionInputs
from anchorscope.models.check import Unrepresentable, causal_mask, refuse, visible
from anchorscope.shown import counted

CHUNK = 1 << 24  # elements of a mask that are compared at a time, which bounds the extra memory


@dataclass(frozen=True)
class CallPositions:
    """The positions of one call, counted from the first key of the row.

    Attributes:
        offset: the position of the first query.
        spans: the prompt's keys [start, stop) in each row of the batch; padding and unfilled cache lie outside.
    """

    offset: int
    spans: tuple[tuple[int, int], ...]


class PositionCache:
    """This cache reads a mask once for all layers of a forward that share it.

    A layer index that does not rise shows that another forward has begun, and a mask may have been changed in place in
    between: it is read again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int | None], tuple[weakref.ref[Tensor], CallPositions | str, int]] = {}
        self._rising: tuple[weakref.ref[Tensor], int] | None = None  # position ids last checked, and their layer

    def __call__(self, call: AttentionInputs, window: int | None) -> CallPositions:
        """Return the call's positions; `window` is its sliding window.

        Raises:
            Unrepresentable: the mask is not causal with padding and at most that window.
        """
        if call.mask_tensor is None:
            self._refuse_packed(call)
            return _unmasked(call)
        key = id(call.mask), window
        layer = -1 if call.layer is None else call.layer
        mask, found, before = self._known.get(key, (None, None, -1))
        if found is None or mask is None or mask() is not call.mask or layer <= before:
            try:
                found = _masked(call, call.mask, window)
            except Unrepresentable as error:
                found = error.reason
            self._known = {k: known for k, known in self._known.items() if known[0]() is not None}
        self._known[key] = weakref.ref(call.mask), found, layer
        if isinstance(found, str):
            raise refuse(call, found)
        return found

    def _refuse_packed(self, call: AttentionInputs) -> None:
        """Refuse several prompts packed into one row, where the position ids (1, n) for FlashAttention start over."""
        positions = call.options.get("position_ids")
        if "flash" not in call.implementation or call.mask is not None:
            return
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            return
        layer = -1 if call.layer is None else call.layer
        if self._rising is not None and self._rising[0]() is positions and self._rising[1] < layer:
            return
        if len(positions) == 1 and bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise refuse(call, "several prompts are packed into one row")
        self._rising = weakref.ref(positions), layer


def window_of(call: AttentionInputs) -> int | None:
    """Return the sliding window of the call, or None without one or where the missing mask shows it has no effect."""
    window = call.window
    if window and call.mask is None and "flash" not in call.implementation and window < call.k.shape[2]:
        return None
    return window


def assumed(call: AttentionInputs) -> CallPositions:
    """Derive the positions from shapes alone: no padding, the queries at the end of the keys."""
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if call.implementation == "sdpa" and call.mask is None:
        keys = n  # with more keys it is the first call with a static cache: sdpa's is_causal begins at the first key
    return CallPositions(keys - n, ((0, keys),) * batch)


def _unmasked(call: AttentionInputs) -> CallPositions:
    """Read a call without a mask, or with FlashAttention's substitute: a (B, keys) tensor that marks real tokens."""
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if call.bidirectional:
        raise refuse(call, "it is bidirectional (no causal mask)")
    if "flash" in call.implementation and isinstance(call.mask, Tensor) and call.mask.shape == (batch, keys):
        return CallPositions(keys - n, _runs(call, call.mask.bool()))
    if call.mask is not None:
        raise refuse(call, f"its mask is a {type(call.mask).__name__}, which is not read (use sdpa)")
    if keys != n and "flash" not in call.implementation and call.implementation != "sdpa":
        raise refuse(call, f"{counted(keys, 'key')} for {counted(n, 'query', 'queries')} come without a mask")
    return assumed(call)


def _masked(call: AttentionInputs, mask: Tensor, window: int | None) -> CallPositions:
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if mask.shape[1] != 1 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (n, keys):
        raise refuse(
            call,
            f"its mask {tuple(mask.shape)} is not one for all heads, of {counted(n, 'query', 'queries')} and"
            f" {counted(keys, 'key')}",
        )
    step = max(1, CHUNK // (len(mask) * keys))
    parts = [(begin, mask[:, 0, begin : begin + step]) for begin in range(0, n, step)]
    seen = torch.zeros(len(mask), keys, dtype=torch.bool, device=mask.device)
    for _, part in parts:
        seen |= visible(call, part).any(1)  # windows hide a prompt's beginning, so no single row shows all of it
    spans = _runs(call, seen)
    offset = 0 if n == keys else _first_position(call, mask, spans)
    bounds = torch.tensor(spans, device=mask.device)
    j = torch.arange(keys, device=mask.device)
    real = (j >= bounds[:, :1]) & (j < bounds[:, 1:])
    wrong = torch.zeros((), dtype=torch.bool, device=mask.device)
    for begin, part in parts:
        i = torch.arange(begin, begin + part.shape[1], device=mask.device) + offset
        expected = causal_mask(i, j, window) & real[:, None]
        wrong |= (visible(call, part) != expected).any()
    if offset < 0 or bool(wrong):
        kind = "(chunked, prefix or bidirectional attention, or several prompts in a row)"
        raise refuse(call, f"its mask is not causal with padding and at most a sliding window {kind}")
    return CallPositions(offset, spans * (batch // len(spans)))


def _first_position(call: AttentionInputs, mask: Tensor, spans: tuple[tuple[int, int], ...]) -> int:
    """Return the position of the first query among more keys than queries; a static cache has empty keys at its end.

    The first query that sees a prompt's last key is that key's own, unless it came in an earlier call.
    """
    found = [0]
    for row, (_, stop) in zip(mask[:, 0], spans, strict=True):
        if stop:
            found.append(stop - 1 - int(visible(call, row[:, stop - 1]).int().argmax()))
    return max(found)


def _runs(call: AttentionInputs, shown: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the range of shown keys [start, stop) in each row of a (B, keys) boolean, (0, 0) where none is."""
    runs = []
    for row in shown.cpu():
        at = row.nonzero()[:, 0]
        if not len(at):
            runs.append((0, 0))
        elif int(at[-1]) - int(at[0]) + 1 != len(at):
            raise refuse(call, "its mask hides tokens in the middle of a prompt")
        else:
            runs.append((int(at[0]), int(at[-1]) + 1))
    return tuple(runs)


def shown_pairs(call: AttentionInputs) -> tuple[int, int] | None:
    """Count the queries and the (query, key) pairs of one head that a mask (B or 1, 1 or H, n, keys) of any kind shows.

    A query counts if it sees its own key, which padding does not. None is returned for attention that is not causal at
    all: the first query sees later keys, and all that the last one sees. If heads see different keys, the first head is
    counted.
    """
    n, keys = call.q.shape[2], call.k.shape[2]
    if call.mask.shape[2:] != (n, keys):
        return None
    queries = pairs = 0
    for row in call.mask[:, 0]:
        shown = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        at = shown.any(1).nonzero()[:, 0]
        if not len(at):
            continue
        last = int(at[-1])  # the last query that sees anything; its own key is the last it sees
        offset = 0 if n == keys else max(0, int(shown[last].nonzero()[-1, 0]) - last)
        if n > 1 and bool(shown[0, offset + 1 :].any()) and not bool((shown[last] & ~shown[0]).any()):
            return None
        own = torch.arange(offset, offset + n, device=row.device).clamp(max=keys - 1)[:, None]
        real = shown.gather(1, own)
        queries += int(real.sum())
        pairs += int((shown & real).sum())
    repeat = call.q.shape[0] // len(call.mask)
    return queries * repeat, pairs * repeat
