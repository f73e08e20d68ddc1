"""The integer geometry against masks that are counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anchorscope.kernels.types as types
from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.geometry import Geometry, geometry, visible_pairs


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    n, offset = draw(st.integers(1, 90)), draw(st.just(0) | st.integers(0, 60))
    tokens = st.none() | st.integers(0, 40)
    return geometry(
        (2, 4, n, 8),
        (2, 2, offset + n, 8),
        block=draw(st.integers(1, 20)),
        step=draw(st.integers(1, 6)),
        init=draw(tokens),
        lookback=draw(tokens),
        window=draw(st.none() | st.integers(1, 160)),
    )


@settings(max_examples=200, deadline=None)
@given(geometries())
def test_pairs_and_ranges_are_those_of_the_masks(geo: Geometry) -> None:
    visible, anchor = reference.visible_mask(geo), reference.anchor_mask(geo)
    assert geo.visible_pairs == visible_pairs(geo.queries, geo.window, geo.offset) == int(visible.sum())
    assert geo.anchor_pairs == int(anchor.sum())
    candidates = reference.candidate_mask(geo)
    assert geo.most_stripes == 8 * int(candidates.sum())
    assert len(candidates) == geo.groups
    total = 0
    for g, row in enumerate(candidates):
        start, stop = geo.candidates(g)
        first, last = geo.rows(g)
        seen = visible[first:last].any(0) & row
        assert set(range(start, stop)) == set(seen.nonzero()[:, 0].tolist())
        pairs = visible[first:last, start:stop].sum(0)
        assert geo.column_pairs(torch.arange(start, stop), first, last).tolist() == pairs.tolist()
        assert geo.column_pairs(np.arange(start, stop), first, last).tolist() == pairs.tolist()
        total += int(pairs.sum())
    assert geo.candidate_pairs == total


def test_misspelt_parameters_are_named() -> None:
    with pytest.raises(TypeError, match="no parameter 'look_back'; there are block, step, init, lookback,"):
        geometry((1, 1, 9, 8), (1, 1, 9, 8), look_back=3)  # type: ignore[call-arg]


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_anchor_candidates_and_later_keys_partition(geo: Geometry) -> None:
    rows = torch.arange(geo.queries) // geo.group
    visible = reference.visible_mask(geo)
    candidates = reference.candidate_mask(geo)[rows] & visible
    assert (reference.anchor_mask(geo).int() + candidates.int() + (~visible).int() == 1).all()


@settings(max_examples=60, deadline=None)
@given(geometries(), st.sampled_from([-math.inf, 1.0, math.inf]), st.sampled_from([7, 1 << 24]))
def test_pairs_of_stripes(geo: Geometry, theta: float, counted: int) -> None:
    generator = torch.Generator().manual_seed(geo.queries)
    q, k = (torch.randn(2, h, m, 8, generator=generator) * 2 for h, m in ((4, geo.queries), (2, geo.keys)))
    stripes = torch_backend.attention_at(q, k, k, geo, theta)[2]
    spare = torch.full((5,), 10**6, dtype=torch.int32)  # a capacity beyond what was found
    stripes = stripes._replace(columns=torch.cat([stripes.columns, spare]))
    keep = reference.keep_mask(reference.margins(q, k, geo), theta, geo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(types, "_COUNTED", counted)
        assert 8 * geo.anchor_pairs + int(stripes.pairs(geo)) == int(keep.sum())
