"""The stages in a row: exactness, selection, capacity, tracing and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import BF16, DEVICE, F16, F32, GPU, INF, INTERPRET, MARK, Case, close, listed

from anchorscope.kernels import reference
from anchorscope.kernels.anchor import anchor
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.geometry import geometry
from anchorscope.kernels.identify import identify
from anchorscope.kernels.pipeline import anchor_attention

pytestmark = MARK


@pytest.mark.parametrize("dtype", [F32, F16] if INTERPRET else [F32, F16, BF16])
def test_infinite_theta_is_dense(dtype: torch.dtype) -> None:
    """At theta = +inf the error is at most twice that of PyTorch's attention in the same dtype."""
    case = Case(
        n=140 if INTERPRET else 3001, heads=4, kv_heads=2, dim=32 if INTERPRET else 128, dtype=dtype, block=32, step=2
    )
    q, k, v = case.tensors()
    q = q * 0.5
    geo = reference.geometry(q, k)
    exact, _ = reference.masked_attention(
        reference.scores(q, k, scale=case.dim**-0.5), v, reference.visible_mask(geo, q.device)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = anchor_attention(q, k, v, theta=INF, **case.params).out
    error, allowed = (ours - exact).norm(), (theirs - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), f"{error:.3g} against {allowed:.3g}"
    # Without stripes the output is that of the anchor region.
    none = anchor_attention(q, k, v, theta=-INF, **case.params)
    assert int(none.stripes.offsets[-1]) == 0
    assert torch.equal(none.out, anchor(q, k, v, **case.params).out)


def test_groups_of_query_heads() -> None:
    """Grouped queries equal repeated keys and values, bit for bit."""
    case = Case(heads=4, kv_heads=2, dtype=F16, n=70)
    q, k, v = case.tensors()
    grouped = anchor_attention(q, k, v, theta=4.0, **case.params)
    repeated = anchor_attention(
        q, k.repeat_interleave(2, 1).contiguous(), v.repeat_interleave(2, 1).contiguous(), theta=4.0, **case.params
    )
    assert torch.equal(grouped.out, repeated.out)
    assert torch.equal(listed(grouped.stripes), listed(repeated.stripes))


def test_scorching_column_and_constant_keys() -> None:
    """One column with all the weight is found, and equal keys are all selected at theta = 0 (margin zero)."""
    case = Case(n=160, heads=1, dtype=F32)
    q, k, v = case.tensors()
    q, k = q * 0.01, k * 0.01
    q[..., 0] = 4.0
    k[:, :, 40, 0] = 10.0  # a score of 10 against almost 0
    result = anchor_attention(q, k, v, theta=-5.0, **case.params)
    counts = result.stripes.counts[0, 0].tolist()
    assert counts == [0, 0, 1, 1, 1]  # candidates end 16 before a group: groups from 2 on have column 40
    assert listed(result.stripes).tolist() == [40, 40, 40]
    close(result.out[0, 0, 64:], v[0, 0, 40].double().expand(96, -1), 0.02, "output of the scorching column")
    flat = anchor_attention(q, torch.ones_like(k), v, theta=1e-3, **case.params)
    assert flat.stripes.counts[0, 0].tolist() == [0, 0, 32, 64, 96]


def test_capacity_and_overflow() -> None:
    """Too small a capacity raises the flag and leaves columns out; enough changes nothing."""
    case = Case(n=150, dtype=F16)
    q, k, v = case.tensors()
    free = anchor_attention(q, k, v, theta=4.0, **case.params)
    total = int(free.stripes.offsets[-1])
    chosen = free.stripes.columns[:total]
    roomy = anchor_attention(q, k, v, theta=4.0, capacity=total + 9, **case.params)
    assert torch.equal(roomy.out, free.out)
    assert roomy.overflow is not None
    assert not roomy.overflow
    assert total > 10
    tight = anchor_attention(q, k, v, theta=4.0, capacity=total - 5, **case.params)
    assert tight.overflow
    assert torch.isfinite(tight.out).all()
    assert torch.equal(tight.stripes.columns, chosen[: total - 5])


def test_repeatable() -> None:
    """Two runs agree bit for bit."""
    case = Case(n=80 if INTERPRET else 3001, heads=4, kv_heads=2, dim=32 if INTERPRET else 128, dtype=F16, theta=4.0)
    q, k, v = case.tensors()
    one, two = (anchor_attention(q, k, v, theta=case.theta, **case.params) for _ in range(2))
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.lse, two.lse)
    assert torch.equal(listed(one.stripes), listed(two.stripes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 9, 8, device=DEVICE)}, "does not fit q"),
        ({"q": torch.zeros(4, 9, 16, device=DEVICE)}, "must be 4-d"),
        ({"v": torch.zeros(1, 2, 8, 16, device=DEVICE)}, "must have the shape of k"),
        ({"v": torch.zeros(1, 2, 9, 16, device=DEVICE, dtype=torch.float64)}, "float16, bfloat16 or float32"),
        ({"scale": -1.0}, "positive"),
        ({"softcap": 0.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"block": 0}, "block must be at least 1"),
        ({"init": -1}, "negative"),
        ({"offset": 3}, "offset 3"),
        ({"theta": math.nan}, "NaN"),
        ({"theta": torch.zeros(3)}, "theta must be"),
        ({"backend": "cuda"}, "there are"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """Each mistake is named."""
    args: dict[str, Any] = {
        "q": torch.zeros(1, 4, 9, 16, device=DEVICE),
        "k": torch.zeros(1, 2, 9, 16, device=DEVICE),
        "v": torch.zeros(1, 2, 9, 16, device=DEVICE),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        anchor_attention(**args)


@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be traced")
def test_custom_ops() -> None:
    """The ops' fakes agree with what they return, and the whole pipeline compiles."""
    case = Case(n=300, heads=4, kv_heads=2, dim=64, dtype=F16, block=32)
    q, k, v = case.tensors()
    flat = geometry(q.shape, k.shape, **case.params).flat()
    torch.library.opcheck(torch.ops.anchorscope.anchor, (q, k, v, *flat, False))
    state = anchor(q, k, v, **case.params)
    theta = torch.full((1, 4), 2.0, device=q.device)
    torch.library.opcheck(torch.ops.anchorscope.stripe_bits, (state.q_bar, state.a_bar, k, theta, *flat))
    stripes = identify(state, k, theta=4.0, queries=300, **case.params)
    args = (
        state.out.clone(),
        state.lse.clone(),
        q,
        k,
        v,
        stripes.columns,
        stripes.offsets,
        *flat,
    )
    torch.library.opcheck(torch.ops.anchorscope.sparse_, args)
    lse = dense_lse(q, k, None)[1]
    torch.library.opcheck(torch.ops.anchorscope.dense_lse, (q, k, v, True, *flat))
    torch.library.opcheck(torch.ops.anchorscope.column_mass, (q, k, lse, *flat))
    plain = anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    compiled = torch.compile(anchor_attention, fullgraph=True)(q, k, v, theta=4.0, capacity=100_000, **case.params)
    assert torch.equal(plain.out, compiled.out)


@pytest.mark.skipif(not GPU or INTERPRET, reason="needs a GPU")
def test_no_synchronisation() -> None:
    """With a capacity nothing waits for the GPU."""
    case = Case(n=3000, heads=4, kv_heads=2, dim=64, dtype=F16, block=32)
    q, k, v = case.tensors()
    anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
