"""Stage 1: the softmax over the anchor region, pooled queries and pooled anchors."""

from __future__ import annotations

import pytest
from kernel_cases import CASES, EPS, MARK, Case, close, float32_slack

from anchorscope.kernels import reference
from anchorscope.kernels.anchor import anchor

pytestmark = MARK


@pytest.mark.parametrize("case", CASES, ids=str)
def test_specification(case: Case) -> None:
    """Output, LSE, mean anchors and mean queries against the float64 specification."""
    q, k, v = case.tensors()
    geo, eps = case.geo, EPS[case.dtype]
    s = reference.scores(q, k, scale=geo.scale, softcap=geo.softcap)
    near = float32_slack(s)
    state = anchor(q, k, v, **case.params)
    out, lse = reference.masked_attention(s, v, reference.anchor_mask(geo, q.device))
    q_bar, a_bar = reference.pooled(q, s, geo)
    big = case.size > 10  # the softmax of large logits hangs on their rounding
    close(state.out, out, (4 if big else 2) * eps + (20 * near if big else near), "anchor output")
    close(state.lse, lse, near, "anchor LSE")
    close(state.a_bar, a_bar, near, "mean anchor")
    close(state.q_bar, q_bar, eps * max(1.0, 0.1 * case.size), "mean query")
