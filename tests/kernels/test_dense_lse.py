"""Dense causal attention and its LSE."""

from __future__ import annotations

import pytest
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import reference
from anchorscope.kernels.dense_lse import dense_lse

pytestmark = MARK


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_specification(case: Case) -> None:
    """Output and LSE against the float64 specification, with V and without."""
    q, k, v = case.tensors(1)
    geo = case.geo
    s = reference.scores(q, k, scale=geo.scale, softcap=geo.softcap)
    near = float32_slack(s)
    out, lse = dense_lse(q, k, v, **case.params)
    exact_out, exact_lse = reference.masked_attention(s, v, reference.visible_mask(geo, q.device))
    close(lse, exact_lse, near, "dense LSE")
    assert out is not None
    close(out, exact_out, 20 * near, "dense output")
    none, alone = dense_lse(q, k, None, **case.params)
    assert none is None
    close(alone, exact_lse, near, "dense LSE without V")
