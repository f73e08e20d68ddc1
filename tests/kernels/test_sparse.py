"""Stage 3: the softmax of the anchor region continued over the stripes."""

from __future__ import annotations

import pytest
from kernel_cases import CASES, EPS, MARK, Case, close, float32_slack, keep_of, middle

from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.sparse import sparse
from anchorscope.kernels.types import AnchorState

pytestmark = MARK


@pytest.mark.parametrize("case", CASES, ids=str)
def test_specification(case: Case) -> None:
    """Output and LSE over everything kept, from a state and a selection of plain torch."""
    q, k, v = case.tensors()
    geo = case.geo
    s = reference.scores(q, k, scale=geo.scale, softcap=geo.softcap)
    near = float32_slack(s)
    theta = middle(reference.margins(q, k, geo)) if case.theta is None else case.theta
    exact = torch_backend.anchor(q, k, v, **case.params)
    stripes = torch_backend.identify(exact, k, theta=theta, queries=case.n, **case.params)
    state = AnchorState(exact.out.to(case.dtype), exact.lse, exact.q_bar, exact.a_bar)
    result, all_lse = sparse(q, k, v, state, stripes, **case.params)
    out, lse = reference.masked_attention(s, v, keep_of(stripes, geo, q))
    big = case.size > 10  # the softmax of large logits hangs on their rounding
    close(result, out, (4 if big else 3) * EPS[case.dtype] + (20 * near if big else near), "output")
    close(all_lse, lse, near, "LSE")
