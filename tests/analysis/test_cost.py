"""What measuring one head costs: operations, elements and bytes, counted. Times: tests/benchmarks/analysis.py."""

from __future__ import annotations

import pytest
import torch
from allocations import counted, peak_allocated

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head, workspace_bytes
from anchorscope.params import AnchorParams

D = 64


def head(n: int, thetas: int = 3, block: int = 64, step: int = 4):
    """A function that profiles one head of random structure, and the bytes that are stated for it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, D, generator=g) for _ in range(3))
    direction = torch.randn(D, generator=g)
    q += 0.5 * direction
    k[:4] += 1.5 * direction
    k[torch.randint(0, n, (n // 30,), generator=g)] += 0.8 * direction
    q, k, v = (x.bfloat16() for x in (q, k, v))
    params = AnchorParams(block, step)
    shape = HeadShape(n, D, params, tuple(20 * i / thetas for i in range(thetas)), D**-0.5, None, None)
    return lambda: profile_head(q, k, v, shape), workspace_bytes(n, D, thetas, params)


@pytest.mark.parametrize(("block", "step"), [(64, 4), (128, 16)])
def test_little_more_than_one_dense_pass(block, step):
    """Scores and outputs of the visible pairs take 2 n^2 d floating-point operations; more thetas take none."""
    n = 2048
    few, many = (counted(head(n, thetas, block, step)[0]) for thetas in (3, 41))
    assert 2 * n * n * D <= few.flops <= 3 * n * n * D
    assert many.flops == few.flops
    assert many.elements <= 1.7 * few.elements


def test_growth_is_at_most_quadratic():
    small, large = (counted(head(n)[0]) for n in (1024, 2048))
    assert large.operations <= 2.1 * small.operations
    assert large.elements <= 4 * small.elements
    assert large.flops <= 4 * small.flops


@pytest.mark.parametrize(("thetas", "block", "step"), [(3, 64, 4), (41, 64, 4), (41, 128, 16)])
def test_memory_is_stated_beforehand(thetas, block, step):
    (_, base), (small, _), (large, stated) = (head(n, thetas, block, step) for n in (1, 3072, 4096))
    used = peak_allocated(large)
    assert used <= stated
    assert stated - base <= 2.5 * used  # what is stated for a single token is the process' own
    assert used < 4096 * 4096 * 4 / 3  # nothing holds a number for each pair of positions
    assert used <= 1.4 * peak_allocated(small)  # a third more tokens; by their square it would be 1.78


def test_memory_of_one_long_head():
    assert workspace_bytes(131072, 128, 41, AnchorParams(128, 16)) < 1.5 * 2**30
