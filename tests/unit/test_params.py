"""The integer geometry against masks that are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorscope.errors import InputError
from anchorscope.kernels import reference
from anchorscope.params import (
    AnchorParams,
    anchor_pairs,
    candidate_range,
    column_pairs,
    recommend_groups,
    row_anchor,
    row_visible,
    visible_pairs,
)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 120),
    block=st.integers(1, 20),
    step=st.integers(1, 6),
    init=st.none() | st.integers(0, 40),
    lookback=st.none() | st.integers(0, 40),
    window=st.none() | st.integers(1, 130),
)
def test_counts_equal_masks(n, block, step, init, lookback, window):
    params = AnchorParams(block, step, init, lookback)
    q = torch.zeros(1, 1, n, 1)
    geo = reference.geometry(q, q, block=block, step=step, init=init, lookback=lookback, window=window)
    visible, anchor = reference.visible_mask(geo), reference.anchor_mask(geo)
    assert visible_pairs(n, window) == int(visible.sum())
    assert (row_visible(n, window) == visible.sum(1).numpy()).all()
    assert (row_anchor(n, params, window) == anchor.sum(1).numpy()).all()
    assert anchor_pairs(n, params, window) == int(anchor.sum())
    candidates = reference.candidate_mask(geo)
    assert params.groups(n) == geo.groups
    for g in range(geo.groups):
        start, stop = candidate_range(g, params)
        assert set(np.flatnonzero(candidates[g].numpy())) == set(range(start, min(stop, n)))
        rows = visible[g * params.group : (g + 1) * params.group]
        assert (column_pairs(g, n, params, window) == rows[:, start:stop].sum(0).numpy()).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 90), block=st.integers(1, 12), step=st.integers(1, 4), window=st.none() | st.integers(1, 99))
def test_anchor_candidates_and_later_keys_partition(n, block, step, window):
    q = torch.zeros(1, 1, n, 1)
    geo = reference.geometry(q, q, block=block, step=step, window=window)
    rows = torch.arange(n) // geo.group
    candidates = reference.candidate_mask(geo)[rows] & reference.visible_mask(geo)
    total = reference.anchor_mask(geo).int() + candidates.int() + (~reference.visible_mask(geo)).int()
    assert (total == 1).all()


@pytest.mark.parametrize(
    ("bad", "word"),
    [({"block": 0}, "block"), ({"step": -1}, "step"), ({"init": -1}, "init"), ({"lookback": 1.5}, "lookback")],
)
def test_bad_parameters_are_named(bad, word):
    with pytest.raises(InputError, match=word):
        AnchorParams(**bad)


def test_defaults_follow_the_block():
    params = AnchorParams(64, 4)
    assert (params.init_tokens, params.lookback_tokens, params.group) == (64, 64, 256)


def test_recommendation_keeps_its_promise():
    for n in (1000, 4096, 8192, 32768):
        params = recommend_groups(n)
        assert params is not None
        assert anchor_pairs(n, params) <= 0.25 * visible_pairs(n)
    assert recommend_groups(20) is None


def test_published_anchor_densities():
    """docs/method.md's table: minimum density of the exact partition with 128 x 16 groups."""
    shares = [anchor_pairs(n, AnchorParams()) / visible_pairs(n) for n in (4096, 8192, 16384, 32768, 131072)]
    assert shares == pytest.approx([0.56, 0.30, 0.15, 0.077, 0.019], abs=0.005)
