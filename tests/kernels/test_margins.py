"""The margin of every column in every group."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.margins import margins

pytestmark = MARK


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_specification(case: Case) -> None:
    """Margins against the float64 specification; infinite exactly where a column is no candidate or nobody sees it."""
    q, k, v = case.tensors(1)
    geo = case.geo
    margin = margins(torch_backend.anchor(q, k, v, **case.params), k, queries=case.n, **case.params)
    exact = reference.margins(q, k, geo)
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(margin), finite)
    if finite.any():
        near = float32_slack(reference.scores(q, k, scale=geo.scale, softcap=geo.softcap))
        close(margin[finite], exact[finite], near, "margins")
