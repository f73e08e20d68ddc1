"""The Hopper kernels against the portable ones."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, GPU, INF, INTERPRET, MARK, Case, close

from anchorscope.kernels import anchor_hopper, common, hopper, identify_hopper, sparse_hopper
from anchorscope.kernels import identify as stage_two
from anchorscope.kernels.anchor import portable as portable_anchor
from anchorscope.kernels.identify import identify
from anchorscope.kernels.sparse import portable as portable_sparse

pytestmark = MARK


HOPPER = GPU and not INTERPRET and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n", "keys", "block", "step"),
    [(1, 0, 128, 16), (127, 0, 64, 2), (129, 0, 128, 1), (2049, 0, 128, 16), (4999, 0, 64, 8), (300, 5000, 128, 4)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_hopper_equals_portable(dim: int, n: int, keys: int, block: int, step: int, transposed: bool) -> None:
    """The Hopper kernels are used where they fit, and agree with the portable ones within rounding."""
    case = Case(n, keys, 6, 2, 2, dim, BF16, block, step, transposed=transposed)
    q, k, v = case.tensors()
    p = common.checked(q, k, v, block=block, step=step, init=block, lookback=block)
    assert p.group % 128 or anchor_hopper.suits(q, k, v, p, False)
    if p.group % 128:  # a short prompt shrinks its group
        p = p._replace(block=64, step=128 * p.queries // 64)
    ours, theirs = anchor_hopper.anchor_hopper(q, k, v, p), portable_anchor(q, k, v, p, False)
    for name, a, b, tol in zip(("out", "lse", "q_bar", "a_bar"), ours, theirs, (2e-2, 1e-5, 1e-2, 1e-5), strict=True):
        close(a, b.double(), tol, name)
    grid = {"block": p.block, "step": p.step}
    stripes = identify((ours[2], ours[3]), k, theta=10.0, queries=n, init=p.init, lookback=p.lookback, **grid)
    if p.step in (4, 8, 16, 32, 64):
        assert identify_hopper.suits(ours[2], k, p)
        theta = torch.full(q.shape[:2], 10.0, device=q.device)
        theta[0, 0], theta[1, 5] = -INF, INF
        masks = [torch.zeros_like(stage_two._outputs(ours[2], p)[0]) for _ in range(2)]
        stage_two.portable(ours[2], ours[3], k, theta, masks[0], p)
        identify_hopper.score_hopper(ours[2], ours[3], k, theta, masks[1], p)
        rows = [m.view(2, 6, p.groups, -1) for m in masks]  # beyond the candidates a mask is not defined
        limit = p.offset + torch.arange(p.groups, device=q.device) * p.group - p.lookback
        inside = torch.arange(32 * masks[0].shape[1], device=q.device) < limit[:, None]
        bits = [((m[..., None] >> torch.arange(32, device=q.device)) & 1).flatten(-2).bool() & inside for m in rows]
        assert torch.equal(bits[0][0, 0], bits[1][0, 0])
        assert torch.equal(bits[0][1, 5], bits[1][1, 5])
        assert (bits[0] != bits[1]).sum() <= 1e-4 * bits[0].sum() + 2  # sums of products in another order
    assert sparse_hopper.suits(ours[0], ours[1], q, k, v, p)
    mine, other = (ours[0].clone(), ours[1].clone()), (ours[0].clone(), ours[1].clone())
    sparse_hopper.sparse_hopper(*mine, q, k, v, stripes.columns, stripes.offsets, p)
    portable_sparse(*other, q, k, v, stripes.columns, stripes.offsets, p)
    close(mine[0], other[0].double(), 2e-2, "sparse out")
    close(mine[1], other[1].double(), 1e-5, "sparse lse")
    assert not anchor_hopper.suits(q, k, v, p._replace(window=5), False)
    assert hopper.tma_view(q[..., ::2]) is None
