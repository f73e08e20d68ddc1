"""Parameters of anchor attention: what is refused, what is recommended."""

from __future__ import annotations

import pytest

from anchorscope.errors import InputError
from anchorscope.params import (
    AnchorParams,
    anchor_pairs,
    candidate_range,
    recommend_groups,
    visible_pairs,
)


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


def test_candidates_at_their_old_place():
    params = AnchorParams(8, 4, 5, 3)
    with pytest.warns(DeprecationWarning, match="AnchorParams.at"):
        assert [candidate_range(g, params) for g in range(3)] == [(5, 5), (5, 29), (5, 61)]


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
