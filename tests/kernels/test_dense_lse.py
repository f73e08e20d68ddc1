"""Dense causal attention and its LSE."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import reference
from anchorscope.kernels.dense_lse import dense_entropy, dense_lse

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


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_entropy(case: Case) -> None:
    """The entropy of every query's weights, with V and without; it changes nothing else."""
    q, k, v = case.tensors(1)
    s = reference.scores(q, k, scale=case.geo.scale, softcap=case.geo.softcap)
    p = s.masked_fill(~reference.visible_mask(case.geo, q.device), -torch.inf).softmax(-1)
    exact = -torch.special.xlogy(p, p).sum(-1)
    for values in (v, None):
        out, lse, entropy = dense_entropy(q, k, values, **case.params)
        close(entropy, exact, 20 * float32_slack(s), "entropy")
        plain, alone = dense_lse(q, k, values, **case.params)
        assert torch.equal(lse, alone)
        assert (out is None) == (plain is None)
        if out is not None and plain is not None:
            assert torch.equal(out, plain)


@pytest.mark.parametrize("case", PROFILE[::2], ids=str)
def test_values_change_no_bit_of_the_lse(case: Case) -> None:
    """`analyze` takes LSE and entropy from the pass with V, `heads` from the one without: both save the same bytes."""
    q, k, v = case.tensors(1)
    for with_v, alone in zip(*(dense_entropy(q, k, x, **case.params)[1:] for x in (v, None)), strict=True):
        assert torch.equal(with_v, alone)
