"""The attention mass of every column in every group."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import reference
from anchorscope.kernels.column_mass import column_mass

pytestmark = MARK


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_specification(case: Case) -> None:
    """Every entry against the float64 specification; a head's entries sum to its queries."""
    q, k, _ = case.tensors(1)
    geo = case.geo
    s = reference.scores(q, k, scale=geo.scale, softcap=geo.softcap)
    near = float32_slack(s)
    visible = reference.visible_mask(geo, q.device)
    lse = s.masked_fill(~visible, -float("inf")).logsumexp(-1)
    mass = column_mass(q, k, lse.float(), **case.params)
    weights = torch.exp(s - lse[..., None]).masked_fill(~visible, 0.0)
    close(mass, torch.stack([x.sum(-2) for x in weights.split(geo.group, -2)], -2), 10 * near, "column mass")
    close(mass.double().sum((-1, -2)) / case.n, torch.ones_like(lse[..., 0]), 10 * near, "total mass")
