"""Stage 2: which columns are stripes, in which order, and how many there can be."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import CASES, F32, INF, MARK, Case, float32_slack, keep_of, middle

from anchorscope.kernels import identify as stage
from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.anchor import anchor
from anchorscope.kernels.identify import candidates, identify

pytestmark = MARK


def pooled_state(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled queries and anchors as stage 1 hands them over, from plain torch."""
    state = torch_backend.anchor(q, k, k, **case.params)
    return state.q_bar.to(case.dtype), state.a_bar


@pytest.mark.parametrize("case", CASES, ids=str)
def test_specification(case: Case) -> None:
    """Every column whose margin is not within rounding of theta is selected, or not, as the specification says."""
    q, k, _ = case.tensors()
    geo = case.geo
    exact = reference.margins(q, k, geo)
    theta = middle(exact) if case.theta is None else case.theta
    q_bar, a_bar = pooled_state(case, q, k)
    stripes = identify((q_bar, a_bar), k, theta=theta, queries=case.n, **case.params)
    kept, wanted = keep_of(stripes, geo, q), reference.keep_mask(exact, theta, geo)
    if case.theta is None and bool(torch.isfinite(exact).any()):
        assert stripes.columns.numel() > 0
    slack = float32_slack(reference.scores(q, k, scale=geo.scale, softcap=geo.softcap))
    if case.dtype != F32:
        slack += 2.0**-7 * geo.scale * q_bar.double().norm(dim=-1).max().item() * k.double().norm(dim=-1).max().item()
    possible = reference.candidate_mask(geo).sum().item() * case.batch * case.heads
    assert candidates(q.shape, k.shape[2], **case.params) == possible
    if abs(theta) == INF:
        assert torch.equal(kept, wanted)
    else:
        certain = ((exact - theta).abs() > slack)[:, :, torch.arange(geo.queries, device=q.device) // geo.group]
        assert torch.equal(kept & certain, wanted & certain)


def test_theta_per_head_and_monotone() -> None:
    """A theta per head selects what that theta alone selects; more theta never selects less."""
    case = Case(heads=4, kv_heads=2, batch=2, n=70)
    q, k, v = case.tensors()
    state = anchor(q, k, v, **case.params)
    theta = torch.tensor([[-INF, 3.0, 4.0, INF], [5.0, 3.5, -INF, 4.0]])
    mixed = identify(state, k, theta=theta, queries=case.n, **case.params).counts
    for b, h in itertools.product(range(2), range(4)):
        alone = identify(state, k, theta=theta[b, h].item(), queries=case.n, **case.params).counts
        assert torch.equal(mixed[b, h], alone[b, h])
    geo = reference.geometry(q, k, block=case.block, step=case.step)
    last = None
    for t in (-INF, 3.0, 4.5, INF):
        kept = keep_of(identify(state, k, theta=t, queries=case.n, **case.params), geo, q)
        assert last is None or not bool((last & ~kept).any())
        last = kept
    assert last is not None
    assert torch.equal(last, reference.visible_mask(geo, q.device).expand_as(last))


@pytest.mark.parametrize("theta", [2.0, 4.0, INF])
def test_shares_of_the_mask(monkeypatch: pytest.MonkeyPatch, theta: float) -> None:
    """A long mask is listed in shares: few bits a word or many, the columns are those of one share."""
    case = Case(n=600, block=16, step=4)
    q, k, _ = case.tensors()
    state = anchor(q, k, None, **case.params)
    whole = identify(state, k, theta=theta, queries=case.n, **case.params)
    monkeypatch.setattr(stage, "SHARE", 4)
    parts = identify(state, k, theta=theta, queries=case.n, **case.params)
    assert whole.columns.numel() > 0
    assert torch.equal(whole.columns, parts.columns)
    assert torch.equal(whole.offsets, parts.offsets)


def test_misspelt_parameters_are_no_candidates():
    with pytest.raises(TypeError, match="'blok'"):
        candidates((1, 2, 64, 8), 64, blok=3)
