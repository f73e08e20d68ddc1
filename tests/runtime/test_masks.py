"""Positions of one call are read off its mask; what FlashAttention hands over instead of a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anchorscope.kernels.geometry import visible_pairs
from anchorscope.models.check import Unrepresentable
from anchorscope.models.hook import AttentionInputs
from anchorscope.runtime.masks import View, Views, shown_pairs, window_of
from anchorscope.runtime.pieces import pieces_of


def call(
    n: int, keys: int, mask: Any, *, implementation: str = "sdpa", batch: int = 2, **options: Any
) -> AttentionInputs:
    q, k = torch.zeros(batch, 4, n, 8), torch.zeros(batch, 2, keys, 8)
    return AttentionInputs(torch.nn.Identity(), 0, implementation, q, k, k, mask, 1.0, options)


def mask_of(view: View, n: int, keys: int, window: int | None = None) -> torch.Tensor:
    i, j = torch.arange(n)[:, None] + view.offset, torch.arange(keys)
    seen = (j <= i) & (i - j < (window or keys))
    return torch.stack([seen & (j >= start) & (j < stop) for start, stop in view.spans])[:, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("view", "n", "keys"),
    [
        (View(0, ((0, 20), (0, 20))), 20, 20),
        (View(0, ((0, 20), (6, 20))), 20, 20),  # padding on the left
        (View(0, ((0, 20), (0, 13))), 20, 20),  # on the right
        (View(12, ((0, 20), (5, 20))), 8, 20),  # a later chunk
        (View(0, ((0, 8), (3, 8))), 8, 20),  # a static cache
        (View(4, ((0, 12), (3, 12))), 8, 20),  # its second chunk
        (View(4, ((0, 12), (7, 12))), 8, 20),  # one that begins with padding
    ],
)
def test_positions_are_read_off_a_mask(view: View, n: int, keys: int, additive: bool) -> None:
    def form(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask

    mask = mask_of(view, n, keys)
    assert Views()(call(n, keys, form(mask)), None) == view
    for piece in pieces_of(view, n):
        assert piece.offset + piece.size == piece.keys.stop - piece.keys.start
    assert sum(p.prompts * p.size for p in pieces_of(view, n)) == sum(
        max(min(stop, view.offset + n) - max(start, view.offset), 0) for start, stop in view.spans
    )
    for key in range(keys):  # one wrong element anywhere is seen
        wrong = mask.clone()
        wrong[1, 0, n - 2, key] ^= True
        with pytest.raises(Unrepresentable):
            Views()(call(n, keys, form(wrong)), None)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [1, 4, 6, 13, 20, 40])
@pytest.mark.parametrize(
    ("view", "n", "keys"),
    [
        (View(0, ((0, 20), (6, 20))), 20, 20),  # padding on the left
        (View(0, ((0, 20), (0, 13))), 20, 20),  # on the right
        (View(0, ((0, 20), (3, 13))), 20, 20),  # on both sides
        (View(0, ((5, 20), (19, 20))), 20, 20),  # all on the left; a prompt of one token
        (View(0, ((0, 15), (0, 1))), 20, 20),  # all on the right
        (View(0, ((0, 20), (0, 0))), 20, 20),  # a row that is all padding
        (View(0, ((0, 0), (0, 0))), 20, 20),
        (View(0, ((0, 12), (3, 9))), 12, 20),  # a static cache
        (View(0, ((0, 10), (0, 7))), 12, 20),  # all padded on the right
    ],
)
def test_padding_is_read_behind_windows(view: View, n: int, keys: int, window: int, additive: bool) -> None:
    """A window hides padding, and the beginning of prompts, from most rows; and it is no padding."""
    mask = mask_of(view, n, keys, window)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert Views()(call(n, keys, mask, sliding_window=window), window) == view
    queries = sum(min(n, stop) - start for start, stop in view.spans)
    lengths = [min(n, stop) - start for start, stop in view.spans]
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
    view = View(0, ((0, 20), (0, 20)))
    mask = mask_of(view, 20, 20, 6)
    windowed = call(20, 20, mask, sliding_window=6)
    assert window_of(windowed) == 6
    assert Views()(windowed, 6) == view
    with pytest.raises(Unrepresentable, match="not causal"):
        Views()(windowed, 7)
    with pytest.raises(Unrepresentable, match="not causal"):
        Views()(windowed, None)
    assert window_of(call(20, 20, None, sliding_window=6)) is None  # the option has no effect there
    assert window_of(call(20, 20, None, sliding_window=40)) == 40
    assert window_of(call(20, 20, None, sliding_window=6, implementation="flash_attention_2")) == 6


def test_masks_are_compared_once() -> None:
    views, mask = Views(), mask_of(View(0, ((0, 20), (6, 20))), 20, 20)
    first = views(call(20, 20, mask), None)
    second_layer = replace(call(20, 20, mask), layer=1)
    assert views(second_layer, None) is first
    assert views(replace(second_layer, mask=mask.clone()), None) is not first
    mask[0, 0, :, :3] = False  # the same tensor, for the next forward
    assert views(call(20, 20, mask), None) == View(0, ((3, 20), (6, 20)))
    assert views(second_layer, None) == View(0, ((3, 20), (6, 20)))


def test_calls_without_a_mask() -> None:
    views, view = Views(), View(0, ((0, 20), (0, 20)))
    rising = torch.arange(5, 25)[None]
    one = call(20, 20, None, implementation="flash_attention_2", batch=1, position_ids=rising)
    assert views(one, None) == View(0, ((0, 20),))
    assert views(call(20, 20, None), None) == View(0, ((0, 20), (0, 20)))
    assert views(call(8, 20, None), None) == View(0, ((0, 8), (0, 8)))  # sdpa's is_causal begins at the first key
    assert views(call(8, 20, None, implementation="flash_attention_2"), None) == View(12, ((0, 20), (0, 20)))
    flash = torch.ones(2, 20, dtype=torch.long)
    flash[1, :5] = 0
    padded = call(8, 20, flash, implementation="flash_attention_2")
    assert views(padded, None) == View(12, ((0, 20), (5, 20)))
    for bad, message in (
        (call(20, 20, None, implementation="eager"), "bidirectional"),
        (call(20, 20, None, is_causal=False), "bidirectional"),
        (call(8, 20, None, implementation="custom"), "20 keys for 8 queries come without a mask"),
        (call(20, 20, object(), implementation="flex_attention"), "its mask is a object"),
        (call(20, 20, torch.ones(2, 4, 20, 20, dtype=torch.bool)), "not one for all heads"),
        (call(20, 20, torch.ones(2, 1, 20, 20)), "holds a bias"),
        (call(20, 20, mask_of(view, 20, 20)[..., torch.arange(20) != 7, :]), "is not one for all heads, of 20"),
        (call(20, 20, mask_of(view, 20, 20) & (torch.arange(20) != 7)), "hides tokens in the middle of a prompt;"),
        (
            call(20, 20, None, implementation="flash_attention_2", batch=1, position_ids=torch.arange(20)[None] % 12),
            "several prompts are packed into one row",
        ),
        (call(20, 20, torch.ones(2, 1, 20, 20, dtype=torch.bool)), "not causal"),
    ):
        with pytest.raises(Unrepresentable, match=message):
            views(bad, None)
