"""The plain torch back end against the float64 specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from allocations import peak_allocated
from torch import Tensor

from anchorscope.kernels import reference, torch_backend
from anchorscope.kernels.types import AnchorState, Stripes

PLACE: dict[str, Any] = {"block": 4, "step": 3, "init": 5, "lookback": 2}


def qkv(
    n: int = 61,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 8,
    *,
    total: int | None = None,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    total = n if total is None else total
    q = torch.randn(batch, heads, n, d, generator=g) * 2
    k, v = (torch.randn(batch, kv_heads, total, d, generator=g) * s for s in (2, 1))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def kept(stripes: Stripes, geo: reference.Geometry) -> Tensor:
    """(B, H, n, N) bool mask from the lists; checks that each list ascends and matches its count."""
    batch, heads, groups = stripes.counts.shape
    mask = torch.zeros(batch * heads * groups, geo.keys, dtype=torch.bool)
    assert stripes.columns.dtype == torch.int32
    assert stripes.offsets.dtype == torch.int64
    assert stripes.offsets[0] == 0
    for row, count in enumerate(stripes.counts.flatten().tolist()):
        columns = stripes.columns[int(stripes.offsets[row]) : int(stripes.offsets[row + 1])].long()
        assert len(columns) == count
        assert (columns.diff() > 0).all()
        mask[row, columns] = True
    mask = mask.view(batch, heads, groups, geo.keys)
    rows = torch.arange(geo.queries) // geo.group
    return reference.visible_mask(geo) & (reference.anchor_mask(geo) | mask[:, :, rows])


def check(q: Tensor, k: Tensor, v: Tensor, theta: float | Tensor, **place: Any) -> None:
    """Every stage equals the specification; `q` etc. are float64, so selections must agree to the pair."""
    rule = {x: y for x, y in place.items() if x not in ("scale", "softcap")}
    geo = reference.geometry(q, k, **rule)
    scale = place.get("scale") or q.shape[-1] ** -0.5
    softcap = place.get("softcap")
    s = reference.scores(q, k, scale=scale, softcap=softcap)

    state = torch_backend.anchor(q, k, v, **place)
    out, lse = reference.masked_attention(s, v, reference.anchor_mask(geo))
    q_bar, a_bar = reference.pooled(q, s, geo)
    for got, want in zip(state, (out, lse, q_bar, a_bar), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    stripes = torch_backend.identify(state, k, theta=theta, queries=q.shape[-2], **place)
    out, lse, mask = reference.anchor_attention(q, k, v, theta=theta, **place)
    assert torch.equal(kept(stripes, geo), mask)
    for got, want in zip(torch_backend.sparse(q, k, v, state, stripes, **place), (out, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch_backend.anchor_attention(q, k, v, theta=theta, **place), (out, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("theta", [-math.inf, 2.0, 8.0, math.inf])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 11, 12, 13, 48, 61])
def test_lengths(n: int, theta: float) -> None:
    check(*qkv(n, dtype=torch.float64), theta, **PLACE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_heads_windows_and_caps(heads: int, kv_heads: int, window: int | None, softcap: float | None) -> None:
    q, k, v = qkv(61, heads, kv_heads, dtype=torch.float64)
    check(q, k, v, 5.0, window=window, softcap=softcap, scale=0.3, **PLACE)
    check(q, k, v, math.inf, window=window, softcap=softcap, scale=0.3, **PLACE)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("n", "total", "offset"), [(25, 61, None), (25, 61, 24), (25, 61, 30), (1, 50, None), (13, 61, 0)]
)
def test_chunk_of_a_longer_sequence(n: int, total: int, offset: int | None, window: int | None) -> None:
    q, k, v = qkv(n, total=total, dtype=torch.float64)
    check(q, k, v, 4.0, offset=offset, window=window, **PLACE)


@pytest.mark.parametrize(("init", "lookback"), [(0, 0), (0, 9), (9, 0), (40, 40), (200, 0), (None, None)])
@pytest.mark.parametrize(("block", "step"), [(1, 1), (7, 1), (2, 5), (100, 2), (128, 16)])
def test_regions(block: int, step: int, init: int | None, lookback: int | None) -> None:
    check(*qkv(61, dtype=torch.float64), 4.0, block=block, step=step, init=init, lookback=lookback)


def test_theta_per_head_and_batch() -> None:
    q, k, v = qkv(61, batch=2, dtype=torch.float64)
    theta = torch.tensor([[-math.inf, 2.0, 5.0, math.inf], [3.0, 9.0, 0.0, 6.0]], dtype=torch.float64)
    check(q, k, v, theta, **PLACE)


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(61, dtype=torch.float64)
    whole = torch_backend.anchor_attention(q, k, v, theta=5.0, **PLACE)
    monkeypatch.setattr(torch_backend, "_CHUNK_SCORES", {"cpu": 40, "cuda": 40})
    chunks = list(torch_backend._chunks(0, 12, 20, torch.device("cpu")))
    assert chunks == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    check(q, k, v, 5.0, **PLACE)
    for got, want in zip(torch_backend.anchor_attention(q, k, v, theta=5.0, **PLACE), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_strided_inputs() -> None:
    q, k, v = qkv(61, dtype=torch.float64)
    want = torch_backend.anchor_attention(q, k, v, theta=5.0, **PLACE)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    for got, expected in zip(torch_backend.anchor_attention(q, k, v, theta=5.0, **PLACE), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 30.0])  # 30: scores in the thousands
def test_dense_limit_in_every_dtype(dtype: torch.dtype, size: float) -> None:
    q, k, v = qkv(257, 4, 2, 64, dtype=dtype)
    q, k = q * size, k * size
    out, lse = torch_backend.anchor_attention(q, k, v, theta=math.inf, block=16, step=2)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    geo = reference.geometry(q, k)
    s = reference.scores(q, k, scale=64**-0.5)
    want, want_lse = reference.masked_attention(s, v, reference.visible_mask(geo))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    limit = 2 * (sdpa.double() - want).norm()
    assert (out.double() - want).norm() <= limit
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-4 + 1e-6 * float(s.abs().max()))


def test_window_hides_columns_at_any_theta() -> None:
    """At theta = +inf a margin of +inf must not pass as selected: the column has no visible pair."""
    q, k, v = qkv(60, 1, 1, dtype=torch.float64)
    place = {"block": 4, "step": 1, "init": 0, "lookback": 0, "window": 6}
    state = torch_backend.anchor(q, k, v, **place)
    stripes = torch_backend.identify(state, k, theta=math.inf, queries=60, **place)
    assert stripes.counts.flatten().tolist() == [0, 4] + [5] * 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"step": 0}, "step must be at least 1"),
        ({"init": -1}, "must not be negative"),
        ({"window": 0}, "window must be at least 1"),
        ({"offset": 1}, "do not lie within"),
        ({"offset": -1}, "do not lie within"),
        ({"theta": math.nan}, "must not be NaN"),
        ({"theta": torch.zeros(4)}, "must be a number or have shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_backend.anchor_attention(*qkv(61), **{**PLACE, **change})


def test_bad_shapes() -> None:
    q, k, v = qkv(61)
    with pytest.raises(ValueError, match="must be a multiple of"):
        torch_backend.anchor(q, k[:, :1].expand(1, 3, -1, -1), v, **PLACE)
    with pytest.raises(ValueError, match="same batch and head_dim"):
        torch_backend.anchor(q, k[..., :4], v, **PLACE)
    with pytest.raises(ValueError, match="must be"):
        torch_backend.anchor(q[0], k, v, **PLACE)
    state = torch_backend.anchor(q, k, v, **PLACE)
    with pytest.raises(ValueError, match="blocks of 4 make 10"):
        torch_backend.identify(state, k, theta=1.0, queries=40, **PLACE)
    stripes = torch_backend.identify(state, k, theta=1.0, queries=61, **PLACE)
    with pytest.raises(ValueError, match="stripes are for"):
        torch_backend.sparse(q[:, :, :40], k, v, AnchorState(*state), stripes, **PLACE)


def test_never_holds_n_by_n() -> None:
    q, k, v = qkv(4096, 2, 1, 32)
    peak = peak_allocated(lambda: torch_backend.anchor_attention(q, k, v, theta=math.inf, block=64, step=4))
    assert peak < 4096 * 4096 * 4 / 4
