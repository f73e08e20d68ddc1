"""The stripes of several thetas in one walk."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INF, MARK, PROFILE, Case, close, float32_slack, middle

from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.sweep import bin_columns, sweep

pytestmark = MARK


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_specification(case: Case) -> None:
    """LSE and output error of every theta against the specification's mask of that theta."""
    q, k, v = case.tensors(1)
    geo = case.geo
    s = reference.scores(q, k, scale=geo.scale, softcap=geo.softcap)
    near = float32_slack(s)
    exact_out, _ = reference.masked_attention(s, v, reference.visible_mask(geo, q.device))
    state, margin = torch_backend.anchor(q, k, v, **case.params), reference.margins(q, k, geo).float()
    some = middle(margin)
    thetas = torch.tensor([-INF, some, some + 0.5, INF])
    columns, bins = bin_columns(margin, thetas)
    for values in (v, None):
        result = sweep(q, k, values, state, exact_out.float(), columns, bins, thetas=len(thetas), **case.params)
        for t, theta in enumerate(thetas.tolist()):
            kept = reference.keep_mask(margin.double(), theta, geo)
            o, want = reference.masked_attention(s, v, kept)
            close(result.lse[:, :, t], want, near, f"sweep LSE at {theta}")
            if values is None:
                assert result.squares.numel() == 0
                continue
            gap = o - exact_out
            squares = gap.square().sum((-1, -2)).sqrt()
            close(result.squares[..., t].sqrt(), squares, 0.01 + 50 * near, f"squares at {theta}")
            for got, tol in ((result.close_01, 0.01), (result.close_005, 0.005)):
                edge = 50 * near * (1 + o.abs())
                low = (gap.abs() < tol - edge).sum((-1, -2))
                high = (gap.abs() < tol + edge).sum((-1, -2))
                assert bool(((got[..., t] >= low) & (got[..., t] <= high)).all())
