"""Positions of one call are read off its mask; what FlashAttention hands over instead of a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anchorscope.kernels.geometry import visible_pairs
from anchorscope.models.calls import AttentionInputs
from anchorscope.models.check import Unrepresentable
from anchorscope.runtime.masks import CallPositions, PositionCache, shown_pairs, window_of
from anchorscope.runtime.pieces import pieces_of


def call(
    n: int, keys: int, mask: Any, *, implementation: str = "sdpa", batch: int = 2, **options: Any
) -> AttentionInputs:
    q, k = torch.zeros(batch, 4, n, 8), torch.zeros(batch, 2, keys, 8)
    return AttentionInputs(torch.nn.Identity(), 0, implementation, q, k, k, mask, 1.0, options)


def mask_of(positions: CallPositions, n: int, keys: int, window: int | None = None) -> torch.Tensor:
    i, j = torch.arange(n)[:, None] + positions.offset, torch.arange(keys)
    seen = (j <= i) & (i - j < (window or keys))
    return torch.stack([seen & (j >= start) & (j < stop) for start, stop in positions.spans])[:, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("positions", "n", "keys"),
    [
        (CallPositions(0, ((0, 20), (0, 20))), 20, 20),
        (CallPositions(0, ((0, 20), (6, 20))), 20, 20),  # padding on the left
        (CallPositions(0, ((0, 20), (0, 13))), 20, 20),  # on the right
        (CallPositions(12, ((0, 20), (5, 20))), 8, 20),  # a later chunk
        (CallPositions(0, ((0, 8), (3, 8))), 8, 20),  # a static cache
        (CallPositions(4, ((0, 12), (3, 12))), 8, 20),  # its second chunk
        (CallPositions(4, ((0, 12), (7, 12))), 8, 20),  # one that begins with padding
    ],
)
def test_positions_are_read_off_a_mask(positions: CallPositions, n: int, keys: int, additive: bool) -> None:
    def form(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask

    mask = mask_of(positions, n, keys)
    assert PositionCache()(call(n, keys, form(mask)), None) == positions
    for piece in pieces_of(positions, n):
        assert piece.offset + piece.size == piece.keys.stop - piece.keys.start
    assert sum(p.prompts * p.size for p in pieces_of(positions, n)) == sum(
        max(min(stop, positions.offset + n) - max(start, positions.offset), 0) for start, stop in positions.spans
    )
    for key in range(keys):  # one wrong element anywhere is seen
        wrong = mask.clone()
        wrong[1, 0, n - 2, key] ^= True
        with pytest.raises(Unrepresentable):
            PositionCache()(call(n, keys, form(wrong)), None)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [1, 4, 6, 13, 20, 40])
@pytest.mark.parametrize(
    ("positions", "n", "keys"),
    [
        (CallPositions(0, ((0, 20), (6, 20))), 20, 20),  # padding on the left
        (CallPositions(0, ((0, 20), (0, 13))), 20, 20),  # on the right
        (CallPositions(0, ((0, 20), (3, 13))), 20, 20),  # on both sides
        (CallPositions(0, ((5, 20), (19, 20))), 20, 20),  # all on the left; a prompt of one token
        (CallPositions(0, ((0, 15), (0, 1))), 20, 20),  # all on the right
        (CallPositions(0, ((0, 20), (0, 0))), 20, 20),  # a row that is all padding
        (CallPositions(0, ((0, 0), (0, 0))), 20, 20),
        (CallPositions(0, ((0, 12), (3, 9))), 12, 20),  # a static cache
        (CallPositions(0, ((0, 10), (0, 7))), 12, 20),  # all padded on the right
    ],
)
def test_padding_is_read_behind_windows(
    positions: CallPositions, n: int, keys: int, window: int, additive: bool
) -> None:
    """A window hides padding, and the beginning of prompts, from most rows; and it is no padding."""
    mask = mask_of(positions, n, keys, window)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert PositionCache()(call(n, keys, mask, sliding_window=window), window) == positions
    queries = sum(min(n, stop) - start for start, stop in positions.spans)
    lengths = [min(n, stop) - start for start, stop in positions.spans]
    if n == keys:  # the queries of a padded static cache cannot be told from its mask without knowing the window
        assert shown_pairs(call(n, keys, mask)) == (queries, sum(visible_pairs(x, window) for x in lengths))


def test_pairs_of_masks_that_cannot_be_read() -> None:
    i, j = torch.arange(12)[:, None], torch.arange(12)
    packed = (j <= i) & ((i < 5) == (j < 5))
    prefix = (j <= i) | (j < 4)
    chunks = (j <= i) & (i // 4 == j // 4)
    for mask, pairs in ((packed, 15 + 28), (prefix, 78 + 6), (chunks, 30)):
        assert shown_pairs(call(12, 12, mask.expand(2, 1, 12, 12))) == (24, 2 * pairs)
        assert shown_pairs(call(12, 12, mask[None, None])) == (24, 2 * pairs)
        padded = (mask & (i < 11) & (j < 11))[None, None]
        lost = int(mask[11].sum())
        assert shown_pairs(call(12, 12, padded)) == (22, 2 * (pairs - lost))
    assert shown_pairs(call(12, 12, torch.ones(2, 1, 12, 12, dtype=torch.bool))) is None


def test_windows() -> None:
    positions = CallPositions(0, ((0, 20), (0, 20)))
    mask = mask_of(positions, 20, 20, 6)
    windowed = call(20, 20, mask, sliding_window=6)
    assert window_of(windowed) == 6
    assert PositionCache()(windowed, 6) == positions
    with pytest.raises(Unrepresentable, match="not causal"):
        PositionCache()(windowed, 7)
    with pytest.raises(Unrepresentable, match="not causal"):
        PositionCache()(windowed, None)
    assert window_of(call(20, 20, None, sliding_window=6)) is None  # the option has no effect there
    assert window_of(call(20, 20, None, sliding_window=40)) == 40
    assert window_of(call(20, 20, None, sliding_window=6, implementation="flash_attention_2")) == 6


def test_masks_are_compared_once() -> None:
    views, mask = PositionCache(), mask_of(CallPositions(0, ((0, 20), (6, 20))), 20, 20)
    first = views(call(20, 20, mask), None)
    second_layer = replace(call(20, 20, mask), layer=1)
    assert views(second_layer, None) is first
    assert views(replace(second_layer, mask=mask.clone()), None) is not first
    mask[0, 0, :, :3] = False  # the same tensor, for the next forward
    assert views(call(20, 20, mask), None) == CallPositions(0, ((3, 20), (6, 20)))
    assert views(second_layer, None) == CallPositions(0, ((3, 20), (6, 20)))


def test_calls_without_a_mask() -> None:
    views, positions = PositionCache(), CallPositions(0, ((0, 20), (0, 20)))
    rising = torch.arange(5, 25)[None]
    one = call(20, 20, None, implementation="flash_attention_2", batch=1, position_ids=rising)
    assert views(one, None) == CallPositions(0, ((0, 20),))
    assert views(call(20, 20, None), None) == CallPositions(0, ((0, 20), (0, 20)))
    assert views(call(8, 20, None), None) == CallPositions(0, ((0, 8), (0, 8)))  # sdpa's is_causal: from the first key
    assert views(call(8, 20, None, implementation="flash_attention_2"), None) == CallPositions(12, ((0, 20), (0, 20)))
    flash = torch.ones(2, 20, dtype=torch.long)
    flash[1, :5] = 0
    padded = call(8, 20, flash, implementation="flash_attention_2")
    assert views(padded, None) == CallPositions(12, ((0, 20), (5, 20)))
    for bad, message in (
        (call(20, 20, None, implementation="eager"), "bidirectional"),
        (call(20, 20, None, is_causal=False), "bidirectional"),
        (call(8, 20, None, implementation="custom"), "20 keys for 8 queries come without a mask"),
        (call(20, 20, object(), implementation="flex_attention"), "its mask is a object"),
        (call(20, 20, torch.ones(2, 4, 20, 20, dtype=torch.bool)), "not one for all heads"),
        (call(20, 20, torch.ones(2, 1, 20, 20)), "holds a bias"),
        (call(20, 20, mask_of(positions, 20, 20)[..., torch.arange(20) != 7, :]), "is not one for all heads, of 20"),
        (call(20, 20, mask_of(positions, 20, 20) & (torch.arange(20) != 7)), "hides tokens in the middle of a prompt;"),
        (
            call(20, 20, None, implementation="flash_attention_2", batch=1, position_ids=torch.arange(20)[None] % 12),
            "several prompts are packed into one row",
        ),
        (call(20, 20, torch.ones(2, 1, 20, 20, dtype=torch.bool)), "not causal"),
    ):
        with pytest.raises(Unrepresentable, match=message):
            views(bad, None)
