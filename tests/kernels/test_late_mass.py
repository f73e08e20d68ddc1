"""Attention mass of every column from late queries."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MARK, PROFILE, Case, close, float32_slack

from anchorscope.kernels import reference
from anchorscope.kernels.column_mass import column_mass
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.late_mass import late_mass

pytestmark = MARK
WHOLE = [case for case in PROFILE if not case.keys]


def check(case: Case, late: int, near: int, far: int) -> None:
    """All three sums against the float64 weights."""
    q, k, _ = case.tensors(1)
    s = reference.scores(q, k, scale=case.geo.scale, softcap=case.geo.softcap)
    s = s.masked_fill(~reference.visible_mask(case.geo, q.device), -torch.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1).float()
    mass = column_mass(q, k, lse, **case.params)
    found = late_mass(q, k, lse, mass, late, (near, far), **case.params)
    at = torch.arange(case.n, device=q.device)
    gap = at[:, None] - at
    for got, chosen in zip(found, (gap >= 0, gap >= late, (gap >= near) & (gap <= far)), strict=True):
        close(got, torch.where(chosen, p, 0.0).sum(-2), 10 * float32_slack(s[s.isfinite()]), "mass")


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_specification(case: Case) -> None:
    """The distances of `heads`, which at short prompts few pairs have."""
    check(case, 256, 128, 1023)


@pytest.mark.parametrize(("late", "near", "far"), [(20, 10, 35), (1, 0, 0), (0, 5, 5), (64, 1, 130), (190, 180, 400)])
@pytest.mark.parametrize(("n", "block", "step"), [(200, 16, 2), (201, 16, 5), (64, 128, 1), (1, 16, 2)])
def test_any_distance(late: int, near: int, far: int, n: int, block: int, step: int) -> None:
    """Distances within a group, beyond it and beyond the prompt; a ragged last group."""
    check(Case(n=n, block=block, step=step, heads=3), late, near, far)


@pytest.mark.parametrize("window", [1, 15, 64])
def test_nothing_is_late_beyond_a_window(window: int) -> None:
    """Exactly nothing, not a rounded nothing."""
    case = Case(n=190, window=window)
    q, k, _ = case.tensors(2)
    _, lse = dense_lse(q, k, None, **case.params)
    mass = column_mass(q, k, lse, **case.params)
    _, late, _ = late_mass(q, k, lse, mass, window, (0, 5), **case.params)
    assert (late == 0).all()
