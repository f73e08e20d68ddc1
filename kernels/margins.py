"""Margin of every column in every group, from the pooled queries and anchors: identification for every theta at once.

The loops are those of `identify.score_kernel`; pooled queries are float32 and are not rounded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capped, checked_pooled, launch
from .geometry import Geometry, Placement
from .identify import stacking
from .types import AnchorState

if TYPE_CHECKING:
    from typing_extensions import Unpack


@triton.jit(do_not_specialize=["offset", "init", "lookback", "window", "heads", "repeats", "group", "groups", "block",
                               "blocks", "step", "chunks", "keys"])  # fmt: skip
def margin_kernel(
    QBar, ABar, K, Margin, sqb, sqh, sqn, skb, skh, skn, skd,
    keys, offset, init, lookback, window, heads, repeats, group, groups, block, blocks, step, chunks, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TG: tl.constexpr, RC: tl.constexpr, SP: tl.constexpr,
    SUB: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The grid is that of `score_kernel`. Margin: (B * H * groups, keys) float32, filled with +inf beforehand.

    EXACT: keys are float32. Otherwise the float32 pooled query is split into three terms in the dtype of the keys, each
    SHIFT bits below the one before, whose products with keys are exact.
    """
    part = tl.program_id(0)
    c0 = tl.program_id(1) * BC
    chunk = part % chunks
    kv = part // chunks
    kv_heads = heads // repeats
    b = kv // kv_heads
    hk = kv % kv_heads
    # Groups whose candidates [init, G - lookback) and windows reach into this tile.
    low = c0 + lookback - offset
    g0 = tl.where(low < 0, 0, low // group + 1)
    g1 = groups
    if WINDOW:
        g1 = tl.minimum(groups, tl.maximum(tl.cdiv(c0 + BC - 1 + window - offset, group), 0))
    c = tl.arange(0, BC)
    d = tl.arange(0, D)
    r = tl.arange(0, TG * RC * SP)
    t = r % SP
    head_in = chunk * RC + (r // SP) % RC
    head = b * heads + hk * repeats + head_in
    head_ok = head_in < repeats
    inner = d < DIM
    cols = c0 + c
    k_at = K + b.to(tl.int64) * skb + hk.to(tl.int64) * skh + c0.to(tl.int64) * skn
    # k: [BC, D], loaded once
    k = tl.load(k_at + c[:, None] * skn + d[None, :] * skd, mask=(cols < keys)[:, None] & inner[None, :], other=0.0)
    q_at = QBar + (head // heads).to(tl.int64) * sqb + (head % heads).to(tl.int64) * sqh
    wr = tl.arange(0, TG * RC)
    w_in = chunk * RC + wr % RC
    w_head = (b * heads + hk * repeats + w_in).to(tl.int64)
    down: tl.constexpr = 2.0**-SHIFT

    for g in tl.range(g0, g1, TG):
        gr = g + r // (RC * SP)
        least = tl.full([BC, TG * RC], float("inf"), tl.float32)
        subs = tl.cdiv(step, SP) if SUB else 1
        for s in tl.range(0, subs):
            tr = t + s * SP
            at = gr * step + tr
            ok = head_ok & (tr < step) & (gr < g1) & (at < blocks)
            q = tl.load(
                q_at[:, None] + at[:, None] * sqn + d[None, :], mask=ok[:, None] & inner[None, :], other=0.0
            ).to(tl.float32)  # [TG * RC * SP, D]
            a = tl.load(ABar + head.to(tl.int64) * blocks + at, mask=ok, other=0.0)  # [TG * RC * SP]
            if EXACT:  # qk: [BC, TG * RC * SP]
                qk = tl.dot(k, tl.trans(q), input_precision="ieee")
            else:
                q1 = q.to(k.dtype)
                rest = (q - q1.to(tl.float32)) * (1.0 / down)
                q2 = rest.to(k.dtype)
                q3 = ((rest - q2.to(tl.float32)) * (1.0 / down)).to(k.dtype)
                qk = tl.dot(k, tl.trans(q3)) * down
                qk = (tl.dot(k, tl.trans(q2)) + qk) * down
                qk = tl.dot(k, tl.trans(q1)) + qk
            delta = a[None, :] - capped(qk, scale, cap, SOFTCAP)  # [BC, TG * RC * SP]
            shown = ok[None, :] & (cols >= 0)[:, None]
            if WINDOW:
                shown = shown & ((offset + at * block)[None, :] - cols[:, None] < window)
            delta = tl.where(shown, delta, float("inf"))
            least = tl.minimum(least, tl.min(tl.reshape(delta, [BC, TG * RC, SP]), 2))
        wg = g + wr // RC
        ok = ((w_in < repeats) & (wg < g1))[None, :] & (cols >= init)[:, None]
        ok = ok & (cols[:, None] < (offset + wg * group - lookback)[None, :])
        tl.store(Margin + (w_head * groups + wg)[None, :] * keys + cols[:, None], least, mask=ok)


@torch.library.custom_op("anchorscope::margins", mutates_args=())
def margins_op(q_bar: Tensor, a_bar: Tensor, k: Tensor, sizes: Sequence[int], scale: float, cap: float) -> Tensor:
    """Launch `margin_kernel`; the geometry is flat (`Geometry.flat`). See `margins`."""
    geo = Geometry.unflat(sizes, scale, cap)
    margin = _output(q_bar, geo).fill_(float("inf"))
    c = launch("margins", k.device, k.element_size(), geo.dim_pad)
    tg, rc, sp, sub = stacking(geo, c["ROWS"])
    chunks = triton.cdiv(geo.repeats, rc)
    last = max(0, geo.offset + (geo.groups - 1) * geo.group - geo.lookback)
    if last > 0:
        with torch.cuda.device_of(k):
            margin_kernel[(geo.batch * geo.kv_heads * chunks, triton.cdiv(last, c["BC"]))](
                q_bar, a_bar, k, margin, *q_bar.stride()[:3], *k.stride(),
                geo.keys, geo.offset, geo.init, geo.lookback, geo.window or 0, geo.heads, geo.repeats, geo.group,
                geo.groups, geo.block, geo.blocks, geo.step, chunks, geo.scale, geo.cap,
                DIM=geo.dim, D=geo.dim_pad, BC=c["BC"], TG=tg, RC=rc, SP=sp, SUB=sub, WINDOW=geo.window is not None,
                SOFTCAP=geo.cap > 0, EXACT=k.dtype == torch.float32, SHIFT=8 if k.dtype == torch.bfloat16 else 11,
                num_warps=c["num_warps"], num_stages=c["num_stages"],
            )  # fmt: skip
    return margin


@margins_op.register_fake
def _(q_bar, a_bar, k, sizes, scale, cap):
    return _output(q_bar, Geometry.unflat(sizes, scale, cap))


def _output(q_bar: Tensor, geo: Geometry) -> Tensor:
    return q_bar.new_empty(geo.batch, geo.heads, geo.groups, geo.keys, dtype=torch.float32)


def margins(state: AnchorState, k: Tensor, *, queries: int, **place: Unpack[Placement]) -> Tensor:
    """Margin of every column in every group, (B, H, groups, N) float32 nats; +inf where it is no candidate or nobody
    sees it.

    `state` comes from `anchor(..., precise=True)`: float32 pooled queries. Column j is a stripe of group g at theta
    when its margin is finite and at most theta. Parameters as in `identify`.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    geo = checked_pooled(state.q_bar, k, queries, **place)
    return margins_op(state.q_bar.contiguous(), state.a_bar.contiguous(), k, *geo.flat())


def margins_apart(state: AnchorState, k: Tensor, *, queries: int, **place: Unpack[Placement]) -> Tensor:
    """`margins`, of one query head per kv head at a time: those of a head have the same bits whatever heads are beside
    it, since what else is stacked into a tile changes how its products are summed.

    Raises:
        ValueError: as `margins`.
    """
    repeats = state.a_bar.shape[1] // k.shape[1]
    if repeats == 1:
        return margins(state, k, queries=queries, **place)
    each = [state._replace(q_bar=state.q_bar[:, r::repeats], a_bar=state.a_bar[:, r::repeats]) for r in range(repeats)]
    return torch.stack([margins(one, k, queries=queries, **place) for one in each], 2).flatten(1, 2)
