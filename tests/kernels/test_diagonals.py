"""Attention mass by distance and by block."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import common, reference
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.diagonals import BLOCK, diagonals

pytestmark = MARK
WHOLE = [case for case in PROFILE if not case.keys]


def weights(case: Case) -> tuple[torch.Tensor, torch.Tensor, float, tuple[torch.Tensor, torch.Tensor]]:
    """Exact weights, their LSE as float32, what rounding may do, and queries and keys."""
    q, k, _ = case.tensors(1)
    s = reference.scores(q, k, scale=case.geo.scale, softcap=case.geo.softcap)
    s = s.masked_fill(~reference.visible_mask(case.geo, q.device), -torch.inf)
    return s.softmax(-1), s.logsumexp(-1).float(), 10 * float32_slack(s[s.isfinite()]), (q, k)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_specification(case: Case) -> None:
    """Every distance and every block against the float64 weights."""
    p, lse, near, (q, k) = weights(case)
    got = diagonals(q, k, lse, **case.params)
    n = case.n
    exact = torch.stack([p.diagonal(-distance, -2, -1).sum(-1) for distance in range(n)], -1)
    close(got.distance, exact, near, "mass by distance")
    side = -(-n // BLOCK) * BLOCK
    blocks = torch.nn.functional.pad(p, (0, side - n, 0, side - n))
    blocks = blocks.unflatten(-1, (-1, BLOCK)).sum(-1).unflatten(-2, (-1, BLOCK)).sum(-2)
    close(got.blocks, blocks, near, "mass of blocks")


@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 40, 90])
def test_any_tile(side: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles smaller and larger than the blocks, a short last one, and a window that ends within one."""
    case = Case(n=200, heads=3, window=window)
    monkeypatch.setattr("anchorscope.kernels.diagonals.launch", lambda *_: {"T": side, "num_warps": 4, "num_stages": 1})
    test_specification(case)


def test_a_head_does_not_depend_on_others() -> None:
    """The same bits for a head alone and beside others."""
    case = Case(n=190, heads=6, kv_heads=2)
    q, k, _ = case.tensors(3)
    _, lse = dense_lse(q, k, None, **case.params)
    together = diagonals(q, k, lse, **case.params)
    for head in range(6):
        alone = diagonals(q[:, head : head + 1], k[:, head // 3 : head // 3 + 1], lse[:, head : head + 1])
        assert torch.equal(together.distance[:, head], alone.distance[:, 0])
        assert torch.equal(together.blocks[:, head], alone.blocks[:, 0])


def test_refusals() -> None:
    """Fewer queries than keys, and an LSE of another shape."""
    q, k, _ = Case(n=20, keys=30).tensors()
    with pytest.raises(ValueError, match="whole prompt"):
        diagonals(q, k, torch.zeros(q.shape[:3], device=q.device))
    with pytest.raises(ValueError, match="lse must have shape"):
        diagonals(q, k[:, :, :20], torch.zeros(1, device=q.device))
    assert "diagonals" in common.launch_table()
