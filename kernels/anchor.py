"""Stage 1: softmax over the anchor region of every query, with pooled queries and pooled anchors from the same pass.

Each program owns a tile of BM queries of one head within one group. It iterates over key tiles of the group's two key
ranges: the first `init` keys, and the keys from `lookback` before the group up to the diagonal. Key tiles that every
query of the tile sees in full come first and need no mask. The online softmax keeps a running maximum, a running sum
and an output accumulator per query; the running maximum at the end is the query's anchor.
Source: Zhang et al., AnchorAttention (EMNLP 2025), step 1, with the partition of docs/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, accumulate, architecture, checked, launch, traced
from .geometry import Geometry, Placement
from .types import AnchorState

if TYPE_CHECKING:
    from typing_extensions import Unpack


@triton.jit(
    do_not_specialize=[
        "n",
        "offset",
        "init",
        "lookback",
        "window",
        "heads",
        "repeats",
        "group",
        "tiles",
        "blocks",
        "batch_heads",
    ]
)
def anchor_kernel(
    Q, K, V, Out, Lse, RowMax, QBar, ABar,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sob, soh, son, sod,
    n, offset, init, lookback, window, heads, repeats, group, tiles, blocks, batch_heads, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * tiles per group * B * H,). Heads vary fastest: those of one kv head share its keys in L2.

    Out: (B, H, n, DIM); Lse, RowMax: (B, H, n) float32; QBar: (B, H, blocks, DIM); ABar: (B, H, blocks) float32.
    SPLIT: see `accumulate`. POOL: blocks are pooled here, otherwise `pool_kernel` does it from RowMax.
    """
    pid = tl.program_id(0)
    bh = pid % batch_heads
    order = pid // batch_heads
    g = order // tiles
    tile = tiles - 1 - order % tiles  # the longest tile of a group first
    row0 = g * group + tile * BM
    row_end = tl.minimum(g * group + group, n)
    if row0 >= row_end:
        return
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    hk = h // repeats

    i = tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    rows = row0 + i
    live = rows < row_end
    inner = d < DIM
    q_at = Q + b * sqb + h.to(tl.int64) * sqh + row0.to(tl.int64) * sqn + i[:, None] * sqn + d[None, :] * sqd
    q = tl.load(q_at, mask=live[:, None] & inner[None, :], other=0.0)  # [BM, D]
    if POOL:  # the tile holds whole blocks, so their means are at hand
        parts: tl.constexpr = BM // BLOCK
        p = tl.arange(0, parts)
        count = tl.minimum(row_end - row0 - p * BLOCK, BLOCK)
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        pooled = bh.to(tl.int64) * blocks + row0 // BLOCK + p
        q_sum = tl.sum(tl.reshape(q.to(tl.float32), [parts, BLOCK, D]), 1)  # [parts, D]
        tl.store(
            QBar + pooled[:, None] * DIM + d[None, :],
            (q_sum * share[:, None]).to(QBar.dtype.element_ty),
            mask=(count > 0)[:, None] & inner[None, :],
        )
    k_base = K + b * skb + hk.to(tl.int64) * skh
    v_base = V + b * svb + hk.to(tl.int64) * svh
    k_off = c[:, None] * skn + d[None, :] * skd
    v_off = c[:, None] * svn + d[None, :] * svd

    pos = offset + rows
    first = offset + row0
    stop = offset + tl.minimum(row0 + BM, row_end)  # past the last query's own key
    start = tl.maximum(offset + g * group - lookback, 0)
    init_end = tl.minimum(init, start)
    init_from = 0
    local_from = start
    if WINDOW:
        lowest = tl.maximum(first - window + 1, 0)
        init_from = tl.minimum(lowest, init_end)
        local_from = tl.maximum(start, lowest)
        full_a = 0
        full_b = 0
    else:
        full_a = init_end // BN
        full_b = (first + 1 - start) // BN

    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, D], tl.float32) if HAS_V else row_sum

    for it in tl.range(0, full_a + full_b):  # key tiles that all queries of the tile see in full
        # j: first key of the tile, in int64 because j * skn may exceed 32 bits
        j = tl.where(it < full_a, it * BN, start + (it - full_a) * BN).to(tl.int64)
        if D == DIM:
            k = tl.load(k_base + j * skn + k_off)  # [BN, D]
        else:
            k = tl.load(k_base + j * skn + k_off, mask=inner[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN], raw scores
        if HAS_V:
            if D == DIM:
                v = tl.load(v_base + j * svn + v_off)  # [BN, D]
            else:
                v = tl.load(v_base + j * svn + v_off, mask=inner[None, :], other=0.0)
        else:
            v = k
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, False, HAS_V, SPLIT, PRECISION
        )

    # The other key tiles: the ends of both ranges, those on the diagonal, and all of them where there is a window.
    rest_a = init_from + full_a * BN
    rest_b = local_from + full_b * BN
    tiles_a = tl.cdiv(init_end - rest_a, BN)
    tiles_b = tl.cdiv(stop - rest_b, BN)
    for it in tl.range(0, tiles_a + tiles_b):
        j = tl.where(it < tiles_a, rest_a + it * BN, rest_b + (it - tiles_a) * BN)
        limit = tl.where(it < tiles_a, init_end, stop)
        cols = j + c
        there = cols < limit
        # k and v: [BN, D]; rows beyond the range are zero and masked below
        k = tl.load(k_base + j.to(tl.int64) * skn + k_off, mask=there[:, None] & inner[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = there[None, :] & (cols[None, :] <= pos[:, None])
        if WINDOW:
            seen = seen & (pos[:, None] - cols[None, :] < window)
        qk = tl.where(seen, qk, float("-inf"))
        if HAS_V:
            v = tl.load(v_base + j.to(tl.int64) * svn + v_off, mask=there[:, None] & inner[None, :], other=0.0)
        else:
            v = k
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, True, HAS_V, SPLIT, PRECISION
        )

    flat = bh.to(tl.int64) * n + rows
    tl.store(Lse + flat, tl.where(row_sum > 0, (row_max + tl.log2(row_sum)) * LN2, float("-inf")), mask=live)
    if HAS_V:
        acc = acc * (1.0 / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
        o_at = Out + b * sob + h.to(tl.int64) * soh + row0.to(tl.int64) * son + i[:, None] * son + d[None, :] * sod
        tl.store(o_at, acc.to(Out.dtype.element_ty), mask=live[:, None] & inner[None, :])
    if POOL:
        a_sum = tl.sum(tl.reshape(tl.where(live, row_max * LN2, 0.0), [parts, BLOCK]), 1)
        tl.store(ABar + pooled, a_sum * share, mask=count > 0)
    else:
        tl.store(RowMax + flat, row_max * LN2, mask=live)


@triton.jit(do_not_specialize=["n", "heads", "block", "blocks"])
def pool_kernel(
    Q, RowMax, QBar, ABar, sqb, sqh, sqn, sqd, n, heads, block, blocks,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Means over blocks whose size does not fit the tile of `anchor_kernel`. Grid: (blocks, B * H)."""
    t = tl.program_id(0)
    bh = tl.program_id(1)
    row0 = t * block
    row_end = tl.minimum(row0 + block, n)
    q_base = Q + (bh // heads).to(tl.int64) * sqb + (bh % heads).to(tl.int64) * sqh
    i = tl.arange(0, BM)
    d = tl.arange(0, D)
    q_sum = tl.zeros([D], tl.float32)
    a_sum = tl.zeros([BM], tl.float32)
    for r in tl.range(row0, row_end, BM):
        live = r + i < row_end
        at = q_base + tl.cast(r + i, tl.int64)[:, None] * sqn + d[None, :] * sqd  # [BM, D]
        q_sum += tl.sum(tl.load(at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32), 0)
        a_sum += tl.load(RowMax + bh.to(tl.int64) * n + r + i, mask=live, other=0.0)  # [BM]
    count = (row_end - row0).to(tl.float32)
    at = bh.to(tl.int64) * blocks + t
    tl.store(ABar + at, tl.sum(a_sum, 0) / count)
    tl.store(QBar + at * DIM + d, (q_sum / count).to(QBar.dtype.element_ty), mask=d < DIM)


@torch.library.custom_op("anchorscope::anchor", mutates_args=())
def anchor_op(
    q: Tensor, k: Tensor, v: Tensor | None, sizes: Sequence[int], scale: float, cap: float, precise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`anchor` for torch.compile and autograd; the geometry is flat (`Geometry.flat`)."""
    return _launch(q, k, v, Geometry.unflat(sizes, scale, cap), precise)


@anchor_op.register_fake
def _(q, k, v, sizes, scale, cap, precise):
    return _outputs(q, v, Geometry.unflat(sizes, scale, cap), precise)


def _outputs(q: Tensor, v: Tensor | None, geo: Geometry, precise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized results, in the order of `AnchorState`."""
    kind = torch.float32 if precise else q.dtype
    return (
        q.new_empty(geo.batch, geo.heads, geo.queries, 0 if v is None else geo.dim, dtype=kind),
        q.new_empty(geo.batch, geo.heads, geo.queries, dtype=torch.float32),
        q.new_empty(geo.batch, geo.heads, geo.blocks, geo.dim, dtype=kind),
        q.new_empty(geo.batch, geo.heads, geo.blocks, dtype=torch.float32),
    )


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, geo: Geometry, precise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if v is not None and architecture(q.device) == "sm90":
        try:
            from . import anchor_hopper
        except ImportError:  # Gluon came with Triton 3.4
            return portable(q, k, v, geo, precise)
        if anchor_hopper.suits(q, k, v, geo, precise):
            return anchor_hopper.anchor_hopper(q, k, v, geo)
    return portable(q, k, v, geo, precise)


def portable(
    q: Tensor, k: Tensor, v: Tensor | None, geo: Geometry, precise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `anchor_kernel`, which runs on every architecture."""
    out, lse, q_bar, a_bar = _outputs(q, v, geo, precise)
    c = launch("anchor_precise" if precise else "anchor", q.device, q.element_size(), geo.dim_pad)
    bm = min(c["BM"], max(16, triton.next_power_of_2(geo.group)))
    pool = bm % geo.block == 0
    row_max = lse if pool else torch.empty_like(lse)
    tiles = triton.cdiv(geo.group, bm)
    keys_v = k if v is None else v
    with torch.cuda.device_of(q):
        anchor_kernel[(geo.groups * tiles * geo.batch * geo.heads,)](
            q, k, keys_v, out, lse, row_max, q_bar, a_bar,
            *q.stride(), *k.stride(), *keys_v.stride(), *out.stride(),
            geo.queries, geo.offset, geo.init, geo.lookback, geo.window or 0, geo.heads, geo.repeats, geo.group, tiles,
            geo.blocks, geo.batch * geo.heads, geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BM=bm, BN=c["BN"], BLOCK=geo.block if pool else 1, HAS_V=v is not None,
            WINDOW=geo.window is not None, SOFTCAP=geo.cap > 0, SPLIT=precise and q.dtype != torch.float32, POOL=pool,
            PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
        if not pool:
            pool_kernel[(geo.blocks, geo.batch * geo.heads)](
                q, row_max, q_bar, a_bar, *q.stride(), geo.queries, geo.heads, geo.block, geo.blocks,
                DIM=geo.dim, D=geo.dim_pad, BM=32,
            )  # fmt: skip
    return out, lse, q_bar, a_bar


def anchor_at(q: Tensor, k: Tensor, v: Tensor | None, geo: Geometry, precise: bool = False) -> AnchorState:
    """`anchor` for a call that is checked already (`common.checked`)."""
    if traced(q, k, v):
        return AnchorState(*anchor_op(q, k, v, *geo.flat(), precise))
    return AnchorState(*_launch(q, k, v, geo, precise))


def anchor(q: Tensor, k: Tensor, v: Tensor | None, *, precise: bool = False, **place: Unpack[Placement]) -> AnchorState:
    """Softmax state over the anchor region A(i) = {j <= i : j < init or j >= G(g) - lookback} of every query.

    Args:
        q: (B, H, n, d) float16, bfloat16 or float32, any strides; the last n of the N positions unless `offset` says
            otherwise.
        k, v: (B, Hkv, N, d), not repeated; query head h reads kv head h // (H // Hkv). Without `v` no output is
            computed.
        precise: for measurements: `out` and `q_bar` in float32, weights not rounded to 16 bits.
        **place: see `Placement`.

    Returns:
        AnchorState(out (B, H, n, d) in q.dtype or float32 if precise, (B, H, n, 0) without v; lse (B, H, n) float32 in
        nats; q_bar (B, H, blocks, d) in the dtype of out; a_bar (B, H, blocks) float32 in nats).

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    return anchor_at(q, k, v, checked(q, k, v, **place), precise)
