"""Dense causal attention with its LSE: what every recall and every output error is measured against.

Products of 16-bit inputs are exact in float32 and accumulate in float32; float32 inputs are multiplied in IEEE float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, accumulate, capped, checked, launch
from .geometry import Geometry, Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack


@triton.jit
def spread(level, row_sum, row_max, qk, scale, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """`accumulate` for the entropy: level (M,) is the sum of w * (s - maximum) over the keys so far, s in log2 units.

    To be called before `accumulate`, with the same sums; the compiler computes what both need once.
    """
    if SOFTCAP:
        s = capped(qk, scale, cap, SOFTCAP) * LOG2E
        if MASKED:
            s = tl.where(qk == float("-inf"), float("-inf"), s)
        new = tl.maximum(row_max, tl.max(s, 1))
    else:
        s = qk * (scale * LOG2E)
        new = tl.maximum(row_max, tl.max(qk, 1) * (scale * LOG2E))
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    x = s - shift[:, None]
    if MASKED:
        x = tl.where(qk == float("-inf"), -200.0, x)  # weighs 2^-200
    down = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
    return tl.exp2(down) * (level + down * row_sum) + tl.sum(tl.exp2(x) * x, 1)


@triton.jit(do_not_specialize=["n", "offset", "window", "heads", "repeats", "tiles", "batch_heads"])
def dense_kernel(
    Q, K, V, Out, Lse, Entropy,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    n, offset, window, heads, repeats, tiles, batch_heads, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * B * H,); late query tiles, which have most keys, come first.

    Out: (B, H, n, DIM) float32, contiguous; Lse, Entropy: (B, H, n) float32.
    """
    pid = tl.program_id(0)
    bh = pid % batch_heads
    row0 = (tiles - 1 - pid // batch_heads) * BM
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    hk = (h // repeats).to(tl.int64)
    i = tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    rows = row0 + i
    live = rows < n
    inner = d < DIM
    q_at = Q + b * sqb + h.to(tl.int64) * sqh + row0.to(tl.int64) * sqn + i[:, None] * sqn + d[None, :] * sqd
    q = tl.load(q_at, mask=live[:, None] & inner[None, :], other=0.0)  # [BM, D]
    k_at = K + b * skb + hk * skh + c[:, None] * skn + d[None, :] * skd
    v_at = V + b * svb + hk * svh + c[:, None] * svn + d[None, :] * svd
    first = offset + row0
    stop = offset + tl.minimum(row0 + BM, n)
    begin = 0
    full = (first + 1) // BN
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0)
        full = 0

    row_sum = tl.zeros([BM], tl.float32)
    level = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, D], tl.float32) if HAS_V else row_sum
    for it in tl.range(0, full):  # key tiles that all queries of the tile see in full
        j = tl.cast(it * BN, tl.int64)
        if D == DIM:
            k = tl.load(k_at + j * skn)  # [BN, D]
        else:
            k = tl.load(k_at + j * skn, mask=inner[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        v = k
        if HAS_V:
            v = tl.load(v_at + j * svn, mask=inner[None, :], other=0.0)  # [BN, D]
        if ENTROPY:
            level = spread(level, row_sum, row_max, qk, scale, cap, SOFTCAP, False)
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, False, HAS_V, SPLIT, PRECISION
        )
    for j in tl.range(begin + full * BN, stop, BN):  # those on the diagonal, and all of them where there is a window
        cols = j + c
        there = (cols < stop)[:, None] & inner[None, :]
        # k and v: [BN, D]
        k = tl.load(k_at + tl.cast(j, tl.int64) * skn, mask=there, other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = cols[None, :] <= (offset + rows)[:, None]
        if WINDOW:
            seen = seen & ((offset + rows)[:, None] - cols[None, :] < window)
        qk = tl.where(seen, qk, float("-inf"))
        v = k
        if HAS_V:
            v = tl.load(v_at + tl.cast(j, tl.int64) * svn, mask=there, other=0.0)
        if ENTROPY:
            level = spread(level, row_sum, row_max, qk, scale, cap, SOFTCAP, True)
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, True, HAS_V, SPLIT, PRECISION
        )

    flat = bh.to(tl.int64) * n + rows
    tl.store(Lse + flat, (row_max + tl.log2(row_sum)) * LN2, mask=live)
    if ENTROPY:
        tl.store(Entropy + flat, (tl.log2(row_sum) - level / row_sum) * LN2, mask=live)
    if HAS_V:
        to = Out + flat[:, None] * DIM + d[None, :]
        tl.store(to, acc / row_sum[:, None], mask=live[:, None] & inner[None, :])


@torch.library.custom_op("anchorscope::dense_lse", mutates_args=())
def dense_op(
    q: Tensor, k: Tensor, v: Tensor | None, entropy: bool, sizes: Sequence[int], scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `dense_kernel`; the geometry is flat (`Geometry.flat`). See `dense_entropy`."""
    geo = Geometry.unflat(sizes, scale, cap)
    out, lse, spread_of = _outputs(q, v, entropy, geo)
    c = launch("dense_lse" if v is None and not entropy else "dense_precise", q.device, q.element_size(), geo.dim_pad)
    keys_v = k if v is None else v
    tiles = triton.cdiv(geo.queries, c["BM"])
    with torch.cuda.device_of(q):
        dense_kernel[(tiles * geo.batch * geo.heads,)](
            q, k, keys_v, out, lse, spread_of, *q.stride(), *k.stride(), *keys_v.stride(),
            geo.queries, geo.offset, geo.window or 0, geo.heads, geo.repeats, tiles, geo.batch * geo.heads, geo.scale,
            geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BM=c["BM"], BN=c["BN"], HAS_V=v is not None, WINDOW=geo.window is not None,
            SOFTCAP=geo.cap > 0, SPLIT=q.dtype != torch.float32, ENTROPY=entropy, PRECISION="ieee",
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return out, lse, spread_of


@dense_op.register_fake
def _(q, k, v, entropy, sizes, scale, cap):
    return _outputs(q, v, entropy, Geometry.unflat(sizes, scale, cap))


def _outputs(q: Tensor, v: Tensor | None, entropy: bool, geo: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    shape = geo.batch, geo.heads, geo.queries
    return (
        q.new_empty(*shape, 0 if v is None else geo.dim, dtype=torch.float32),
        q.new_empty(*shape, dtype=torch.float32),
        q.new_empty(*shape[:2], geo.queries if entropy else 0, dtype=torch.float32),
    )


def dense_lse(q: Tensor, k: Tensor, v: Tensor | None, **place: Unpack[Placement]) -> tuple[Tensor | None, Tensor]:
    """Dense causal attention: output (B, H, n, d) float32, or None without V, and LSE (B, H, n) float32 in nats.

    Shapes and parameters as in `anchor`; groups play no part. With V the weights reach the tensor cores unrounded (two
    halves), so that the output's error is that of float32 sums.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    out, lse, _ = dense_op(q, k, v, False, *checked(q, k, v, **place).flat())
    return (None if v is None else out), lse


def dense_entropy(
    q: Tensor, k: Tensor, v: Tensor | None, **place: Unpack[Placement]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`dense_lse`, and the entropy of every query's attention weights, (B, H, n) float32 in nats; LSE and entropy have
    the same bits with V and without.

    Raises:
        ValueError: as `dense_lse`.
    """
    out, lse, entropy = dense_op(q, k, v, True, *checked(q, k, v, **place).flat())
    return (None if v is None else out), lse, entropy
