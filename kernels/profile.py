"""Exact profile of a head for every theta at once, without an N x N tensor: dense LSE, margins, column masses, sweep.

How they fit together, for (B, H) as many heads as memory allows (one kv head at a time is plenty to fill a GPU):

    state = anchor(q, k, v, precise=True, **params)
    out, lse = dense_lse(q, k, v, ...)                         # full causal attention
    margin = margins(state, k, queries=n, **params)            # (B, H, groups, N)
    mass = column_mass(q, k, lse, ...)                         # (B, H, groups, N)
    columns, bins = bin_columns(margin, thetas)
    result = sweep(q, k, v, state, lse, out, columns, bins, thetas=len(thetas), **params)

Products of 16-bit inputs are exact in float32 and accumulate in float32; float32 inputs are multiplied in IEEE float32.
Each function's memory is its result, so callers bound it by the number of heads they pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, accumulate, capped, launch, pooled_problem, problem
from .identify import stacking
from .types import AnchorState


class Sweep(NamedTuple):
    """Attention over the anchor region and the stripes of every theta, against dense attention.

    Attributes:
        lse: (B, H, T, n) float32, LSE in nats over the keys kept at each theta.
        squares: (B, H, T) float64, sum over queries and head dimensions of (sparse - dense output) ** 2; empty without
            V.
        close_01: (B, H, T) int64, output elements with |sparse - dense| < 0.01; empty without V.
        close_005: the same below 0.005.
    """

    lse: Tensor
    squares: Tensor
    close_01: Tensor
    close_005: Tensor


@triton.jit(do_not_specialize=["n", "offset", "window", "heads", "repeats", "tiles", "batch_heads"])
def dense_kernel(
    Q, K, V, Out, Lse,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    n, offset, window, heads, repeats, tiles, batch_heads, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * B * H,), longest first. Out: (B, H, n, DIM) float32 contiguous."""
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

    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, D], tl.float32) if HAS_V else total
    for it in tl.range(0, full):
        j = tl.cast(it * BN, tl.int64)
        if D == DIM:
            k = tl.load(k_at + j * skn)  # [BN, D]
        else:
            k = tl.load(k_at + j * skn, mask=inner[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = k
        if HAS_V:
            v = tl.load(v_at + j * svn, mask=inner[None, :], other=0.0)
        acc, total, top = accumulate(acc, total, top, qk, v, scale, cap, SOFTCAP, False, HAS_V, SPLIT, PRECISION)
    for j in tl.range(begin + full * BN, stop, BN):
        cols = j + c
        there = (cols < stop)[:, None] & inner[None, :]
        k = tl.load(k_at + tl.cast(j, tl.int64) * skn, mask=there, other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = cols[None, :] <= (offset + rows)[:, None]
        if WINDOW:
            seen = seen & ((offset + rows)[:, None] - cols[None, :] < window)
        qk = tl.where(seen, qk, float("-inf"))
        v = k
        if HAS_V:
            v = tl.load(v_at + tl.cast(j, tl.int64) * svn, mask=there, other=0.0)
        acc, total, top = accumulate(acc, total, top, qk, v, scale, cap, SOFTCAP, True, HAS_V, SPLIT, PRECISION)

    flat = bh.to(tl.int64) * n + rows
    tl.store(Lse + flat, (top + tl.log2(total)) * LN2, mask=live)
    if HAS_V:
        to = Out + flat[:, None] * DIM + d[None, :]
        tl.store(to, acc / total[:, None], mask=live[:, None] & inner[None, :])


@triton.jit(do_not_specialize=["n", "offset", "window", "heads", "repeats", "group", "groups", "keys", "tiles"])
def mass_kernel(
    Q, K, Lse, Mass, sqb, sqh, sqn, sqd, skb, skh, skn, skd,
    n, offset, window, heads, repeats, group, groups, keys, tiles, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (key tiles * groups * B * H,). A tile of keys stays on the chip; the group's queries stream past."""
    c0 = tl.program_id(0) % tiles * BC
    row = tl.program_id(0) // tiles
    g = groups - 1 - row % groups
    bh = row // groups
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    c = tl.arange(0, BC)
    i = tl.arange(0, BQ)
    d = tl.arange(0, D)
    inner = d < DIM
    cols = c0 + c
    to = Mass + (bh.to(tl.int64) * groups + g) * keys + cols
    begin = g * group
    stop = tl.minimum(begin + group, n)
    if WINDOW:
        stop = tl.minimum(stop, c0 + BC - 1 + window - offset)
    begin = tl.maximum(begin, c0 - offset)  # earlier queries see none of these keys
    mass = tl.zeros([BC], tl.float32)
    if begin < stop:
        k_at = K + b * skb + (h // repeats).to(tl.int64) * skh + c0.to(tl.int64) * skn
        k = tl.load(k_at + c[:, None] * skn + d[None, :] * skd, mask=(cols < keys)[:, None] & inner[None, :], other=0.0)
        q_base = Q + b * sqb + h.to(tl.int64) * sqh + i[:, None] * sqn + d[None, :] * sqd
        l_base = Lse + bh.to(tl.int64) * n + i
        if WINDOW:
            edge = begin
        else:
            # Queries from `edge` on see every key of the tile.
            edge = tl.minimum(tl.maximum(begin, c0 + BC - 1 - offset), stop)
        full = 0 if WINDOW else (stop - edge) // BQ
        for it in tl.range(0, full):
            r = edge + it * BQ
            if D == DIM:
                q = tl.load(q_base + tl.cast(r, tl.int64) * sqn)  # [BQ, D]
            else:
                q = tl.load(q_base + tl.cast(r, tl.int64) * sqn, mask=inner[None, :], other=0.0)
            ref = tl.load(l_base + r) * LOG2E
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BC, BQ]
            if SOFTCAP:
                mass += tl.sum(tl.exp2(capped(qk, scale, cap, SOFTCAP) * LOG2E - ref[None, :]), 1)
            else:
                mass += tl.sum(tl.exp2(qk * (scale * LOG2E) - ref[None, :]), 1)
        # The rest: queries before `edge`, where the diagonal cuts, and those after the last full tile.
        before = tl.cdiv(edge - begin, BQ)
        tail = edge + full * BQ
        for it in tl.range(0, before + tl.cdiv(stop - tail, BQ)):
            r = tl.where(it < before, begin + it * BQ, tail + (it - before) * BQ)
            limit = tl.where(it < before, edge, stop)
            live = r + i < limit
            q = tl.load(q_base + tl.cast(r, tl.int64) * sqn, mask=live[:, None] & inner[None, :], other=0.0)
            ref = tl.load(l_base + r, mask=live, other=0.0) * LOG2E
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            gap = (offset + r + i)[None, :] - cols[:, None]
            seen = (gap >= 0) & live[None, :]
            if WINDOW:
                seen = seen & (gap < window)
            w = tl.exp2(capped(qk, scale, cap, SOFTCAP) * LOG2E - ref[None, :])
            mass += tl.sum(tl.where(seen, w, 0.0), 1)
    tl.store(to, mass, mask=cols < keys)


@triton.jit(do_not_specialize=["offset", "init", "lookback", "window", "heads", "repeats", "group", "groups", "block",
                               "blocks", "step", "chunks", "keys"])  # fmt: skip
def margin_kernel(
    QBar, ABar, K, Margin, sqb, sqh, sqn, skb, skh, skn, skd,
    keys, offset, init, lookback, window, heads, repeats, group, groups, block, blocks, step, chunks, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TG: tl.constexpr, RC: tl.constexpr, SP: tl.constexpr,
    SUB: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Grid as `score_kernel`'s. Margin: (B * H * groups, keys) float32, +inf already where nothing is written.

    EXACT: keys are float32. Otherwise the float32 pooled query is cut into three parts in the dtype of the keys, each
    SHIFT bits below the one before, whose products are exact.
    """
    part = tl.program_id(0)
    c0 = tl.program_id(1) * BC
    chunk = part % chunks
    kv = part // chunks
    kv_heads = heads // repeats
    b = kv // kv_heads
    hk = kv % kv_heads
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
            ).to(tl.float32)
            a = tl.load(ABar + head.to(tl.int64) * blocks + at, mask=ok, other=0.0)
            if EXACT:
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


@triton.jit(
    do_not_specialize=["n", "offset", "window", "heads", "repeats", "group", "groups", "tiles", "batch_heads", "thetas"]
)
def sweep_kernel(
    Q, K, V, OutA, LseA, OutD, Columns, Bins, Lse, Sums,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    n, offset, window, heads, repeats, group, groups, tiles, batch_heads, thetas, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid as `sparse_kernel`'s. Lse: (B, H, T, n); Sums: (B * H, groups * tiles, T, 3) float32."""
    pid = tl.program_id(0)
    tile = pid % tiles
    bh = (pid // tiles) % batch_heads
    g = groups - 1 - pid // (tiles * batch_heads)
    row0 = g * group + tile * BM
    row_end = tl.minimum(g * group + group, n)
    if row0 >= row_end:
        return
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    hk = (h // repeats).to(tl.int64)
    i = tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    rows = row0 + i
    live = rows < row_end
    inner = d < DIM
    part = live[:, None] & inner[None, :]
    q_at = Q + b * sqb + h.to(tl.int64) * sqh + row0.to(tl.int64) * sqn + i[:, None] * sqn + d[None, :] * sqd
    q = tl.load(q_at, mask=part, other=0.0)
    k_base = K + b * skb + hk * skh + d[None, :] * skd
    v_base = V + b * svb + hk * svh + d[None, :] * svd
    flat = bh.to(tl.int64) * n + rows
    top = tl.load(LseA + flat, mask=live, other=0.0) * LOG2E
    total = tl.where(top > float("-inf"), 1.0, 0.0)
    if HAS_V:
        acc = tl.load(OutA + flat[:, None] * DIM + d[None, :], mask=part, other=0.0)
    else:
        acc = total
    edges = Bins + (bh.to(tl.int64) * groups + g) * thetas
    # The groups of all heads lie one after the other in Columns; bins are closed above by the next one's start.
    at = tl.load(edges)
    for t in tl.range(0, thetas):
        end = tl.load(edges + t + 1)
        for j in tl.range(0, (end - at).to(tl.int32), BN):
            there = j + c < end - at
            cols = tl.load(Columns + at + j + c, mask=there, other=0).to(tl.int64)
            k = tl.load(k_base + cols[:, None] * skn, mask=there[:, None] & inner[None, :], other=0.0)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = there[None, :] & (rows >= 0)[:, None]
            if WINDOW:
                seen = seen & ((offset + rows)[:, None] - cols[None, :] < window)
            qk = tl.where(seen, qk, float("-inf"))
            v = k
            if HAS_V:
                v = tl.load(v_base + cols[:, None] * svn, mask=there[:, None] & inner[None, :], other=0.0)
            acc, total, top = accumulate(acc, total, top, qk, v, scale, cap, SOFTCAP, True, HAS_V, SPLIT, PRECISION)
        at = end
        lse = tl.where(total > 0, (top + tl.log2(total)) * LN2, float("-inf"))
        tl.store(Lse + (bh.to(tl.int64) * thetas + t) * n + rows, lse, mask=live)
        if HAS_V:
            dense = tl.load(OutD + flat[:, None] * DIM + d[None, :], mask=part, other=0.0)
            off = tl.where(part, acc / tl.where(total > 0, total, 1.0)[:, None] - dense, float("inf"))
            to = Sums + ((bh.to(tl.int64) * groups * tiles + g * tiles + tile) * thetas + t) * 3
            tl.store(to, tl.sum(tl.sum(tl.where(part, off * off, 0.0), 1), 0))
            tl.store(to + 1, tl.sum(tl.sum(tl.where(tl.abs(off) < 0.01, 1.0, 0.0), 1), 0))
            tl.store(to + 2, tl.sum(tl.sum(tl.where(tl.abs(off) < 0.005, 1.0, 0.0), 1), 0))


@torch.library.custom_op("anchorscope::dense_lse", mutates_args=())
def dense_op(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None, softcap: float | None, offset: int
) -> tuple[Tensor, Tensor]:
    """Launcher of `dense_kernel`; see `dense_lse`."""
    p = problem(q, k, v, scale=scale, window=window, softcap=softcap, offset=offset)
    out = q.new_empty(p.batch, p.heads, p.queries, 0 if v is None else p.dim, dtype=torch.float32)
    lse = q.new_empty(p.batch, p.heads, p.queries, dtype=torch.float32)
    c = launch("dense_lse" if v is None else "anchor_precise", q.device, q.element_size(), p.dim_pad)
    keys_v = k if v is None else v
    tiles = triton.cdiv(p.queries, c["BM"])
    with torch.cuda.device_of(q):
        dense_kernel[(tiles * p.batch * p.heads,)](
            q, k, keys_v, out, lse, *q.stride(), *k.stride(), *keys_v.stride(),
            p.queries, p.offset, p.window or 0, p.heads, p.repeats, tiles, p.batch * p.heads, p.scale, p.cap,
            DIM=p.dim, D=p.dim_pad, BM=c["BM"], BN=c["BN"], HAS_V=v is not None, WINDOW=p.window is not None,
            SOFTCAP=p.cap > 0, SPLIT=q.dtype != torch.float32, PRECISION="ieee",
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return out, lse


@dense_op.register_fake
def _(q, k, v, scale, window, softcap, offset):
    batch, heads, n, dim = q.shape
    return (
        q.new_empty(batch, heads, n, 0 if v is None else dim, dtype=torch.float32),
        q.new_empty(batch, heads, n, dtype=torch.float32),
    )


def dense_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Dense causal attention: output (B, H, n, d) float32, or None without V, and LSE (B, H, n) float32 in nats.

    Shapes and parameters as in `anchor`. With V the weights reach the tensor cores unrounded (two halves), so that the
    output's error is that of float32 sums. Raises ValueError.
    """
    p = problem(q, k, v, scale=scale, window=window, softcap=softcap, offset=offset)
    out, lse = dense_op(q, k, v, p.scale, p.window, p.cap or None, p.offset)
    return (None if v is None else out), lse


@torch.library.custom_op("anchorscope::column_mass", mutates_args=())
def mass_op(
    q: Tensor, k: Tensor, lse: Tensor, block: int, step: int, scale: float, window: int | None, softcap: float | None,
    offset: int,
) -> Tensor:  # fmt: skip
    """Launcher of `mass_kernel`; see `column_mass`."""
    p = problem(q, k, block=block, step=step, scale=scale, window=window, softcap=softcap, offset=offset)
    mass = q.new_empty(p.batch, p.heads, p.groups, p.keys, dtype=torch.float32)
    c = launch("column_mass", q.device, q.element_size(), p.dim_pad)
    tiles = triton.cdiv(p.keys, c["BC"])
    with torch.cuda.device_of(q):
        mass_kernel[(tiles * p.groups * p.batch * p.heads,)](
            q, k, lse, mass, *q.stride(), *k.stride(),
            p.queries, p.offset, p.window or 0, p.heads, p.repeats, p.group, p.groups, p.keys, tiles, p.scale,
            p.cap,
            DIM=p.dim, D=p.dim_pad, BC=c["BC"], BQ=c["BQ"], WINDOW=p.window is not None, SOFTCAP=p.cap > 0,
            PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return mass


@mass_op.register_fake
def _(q, k, lse, block, step, scale, window, softcap, offset):
    batch, heads, n, _dim = q.shape
    groups = (n + block * step - 1) // (block * step)
    return q.new_empty(batch, heads, groups, k.shape[2], dtype=torch.float32)


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block: int = 128,
    step: int = 16,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
) -> Tensor:
    """Attention mass of every column in every group, (B, H, groups, N) float32.

    Entry (g, j) is the sum over the group's queries i of exp(s(i, j) - lse(i)), for all visible pairs, anchor region
    included; a head's entries sum to n. `lse` (B, H, n) float32 is that of `dense_lse`. Raises ValueError.
    """
    p = problem(q, k, block=block, step=step, scale=scale, window=window, softcap=softcap, offset=offset)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(q.shape[:3])}, not {tuple(lse.shape)}")
    return mass_op(q, k, lse.contiguous(), p.block, p.step, p.scale, p.window, p.cap or None, p.offset)


@torch.library.custom_op("anchorscope::margins", mutates_args=())
def margins_op(
    q_bar: Tensor, a_bar: Tensor, k: Tensor, queries: int, block: int, step: int, init: int, lookback: int,
    scale: float, window: int | None, softcap: float | None, offset: int,
) -> Tensor:  # fmt: skip
    """Launcher of `margin_kernel`; see `margins`."""
    p = pooled_problem(q_bar, k, queries, block, step, init, lookback, scale, window, softcap, offset)
    margin = torch.full((p.batch, p.heads, p.groups, p.keys), float("inf"), device=k.device, dtype=torch.float32)
    c = launch("margins", k.device, k.element_size(), p.dim_pad)
    tg, rc, sp, sub = stacking(p, c["ROWS"])
    chunks = triton.cdiv(p.repeats, rc)
    last = max(0, p.offset + (p.groups - 1) * p.group - p.lookback)
    if last > 0:
        with torch.cuda.device_of(k):
            margin_kernel[(p.batch * p.kv_heads * chunks, triton.cdiv(last, c["BC"]))](
                q_bar, a_bar, k, margin, *q_bar.stride()[:3], *k.stride(),
                p.keys, p.offset, p.init, p.lookback, p.window or 0, p.heads, p.repeats, p.group, p.groups, p.block,
                p.blocks, p.step, chunks, p.scale, p.cap,
                DIM=p.dim, D=p.dim_pad, BC=c["BC"], TG=tg, RC=rc, SP=sp, SUB=sub, WINDOW=p.window is not None,
                SOFTCAP=p.cap > 0, EXACT=k.dtype == torch.float32, SHIFT=8 if k.dtype == torch.bfloat16 else 11,
                num_warps=c["num_warps"], num_stages=c["num_stages"],
            )  # fmt: skip
    return margin


@margins_op.register_fake
def _(q_bar, a_bar, k, queries, block, step, init, lookback, scale, window, softcap, offset):
    batch, heads = q_bar.shape[:2]
    groups = (queries + block * step - 1) // (block * step)
    return q_bar.new_empty(batch, heads, groups, k.shape[2], dtype=torch.float32)


def margins(
    state: AnchorState,
    k: Tensor,
    *,
    queries: int,
    block: int = 128,
    step: int = 16,
    init: int | None = None,
    lookback: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
) -> Tensor:
    """Margin of every column in every group, (B, H, groups, N) float32 nats; +inf where it is no candidate or nobody
    sees it.

    `state` comes from `anchor(..., precise=True)`: float32 pooled queries, which are not rounded here. Column j is a
    stripe of group g at theta when its margin is finite and at most theta. Parameters as in `identify`. Raises
    ValueError.
    """
    p = pooled_problem(state.q_bar, k, queries, block, step, init, lookback, scale, window, softcap, offset)
    return margins_op(
        state.q_bar.contiguous(), state.a_bar.contiguous(), k, queries, p.block, p.step, p.init, p.lookback, p.scale,
        p.window, p.cap or None, p.offset,
    )  # fmt: skip


def bin_columns(margin: Tensor, thetas: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each group sorted by the first theta that selects them, ascending within a bin.

    Args:
        margin: (B, H, groups, N) float32, from `margins`.
        thetas: (T,) ascending, nats; -inf and +inf legal.

    Returns:
        columns (total,) int32 and bin_offsets (B * H * groups * T + 1,) int64: row (b, h, g) selects at thetas[t] the
        columns from bin_offsets[r * T] to bin_offsets[r * T + t + 1], r = (b * H + h) * groups + g. Columns that no
        theta selects are left out. Working memory is about 24 bytes per margin; the total is read from the GPU once.
    """
    keys = margin.shape[-1]
    rows = margin.reshape(-1, keys)
    count = len(thetas)
    bins = torch.bucketize(rows, thetas.to(rows.device, torch.float32).contiguous(), out_int32=True)
    bins[rows == float("inf")] = count
    row, col = (bins < count).nonzero(as_tuple=True)  # ascending rows, then columns
    key = row * count + bins[row, col]
    order = torch.sort(key, stable=True).indices
    offsets = torch.zeros(rows.shape[0] * count + 1, dtype=torch.int64, device=rows.device)
    offsets[1:] = torch.bincount(key, minlength=rows.shape[0] * count).cumsum(0)
    return col[order].int(), offsets


@torch.library.custom_op("anchorscope::sweep", mutates_args=())
def sweep_op(
    q: Tensor, k: Tensor, v: Tensor | None, out_anchor: Tensor, lse_anchor: Tensor, out_dense: Tensor, columns: Tensor,
    bins: Tensor, thetas: int, block: int, step: int, scale: float, window: int | None, softcap: float | None,
    offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of `sweep_kernel`: LSE (B, H, T, n) and sums (B, H, T, 3) float64; see `sweep`."""
    p = problem(q, k, v, block=block, step=step, scale=scale, window=window, softcap=softcap, offset=offset)
    c = launch("anchor_precise", q.device, q.element_size(), p.dim_pad)
    bm = min(c["BM"], max(16, triton.next_power_of_2(p.group)))
    tiles = triton.cdiv(p.group, bm)
    lse = q.new_empty(p.batch, p.heads, thetas, p.queries, dtype=torch.float32)
    parts = p.groups * tiles if v is not None else 0
    sums = q.new_zeros(p.batch, p.heads, parts, thetas, 3, dtype=torch.float32)
    keys_v = k if v is None else v
    with torch.cuda.device_of(q):
        sweep_kernel[(tiles * p.batch * p.heads * p.groups,)](
            q, k, keys_v, out_anchor, lse_anchor, out_dense, columns, bins, lse, sums,
            *q.stride(), *k.stride(), *keys_v.stride(),
            p.queries, p.offset, p.window or 0, p.heads, p.repeats, p.group, p.groups, tiles, p.batch * p.heads, thetas,
            p.scale, p.cap,
            DIM=p.dim, D=p.dim_pad, BM=bm, BN=c["BN"], HAS_V=v is not None, WINDOW=p.window is not None,
            SOFTCAP=p.cap > 0, SPLIT=q.dtype != torch.float32, PRECISION="ieee",
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return lse, sums.double().sum(2)


@sweep_op.register_fake
def _(q, k, v, out_anchor, lse_anchor, out_dense, columns, bins, thetas, block, step, scale, window, softcap, offset):
    batch, heads, n, _dim = q.shape
    return (
        q.new_empty(batch, heads, thetas, n, dtype=torch.float32),
        q.new_empty(batch, heads, thetas, 3, dtype=torch.float64),
    )


def sweep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    state: AnchorState,
    out_dense: Tensor | None,
    columns: Tensor,
    bin_offsets: Tensor,
    *,
    thetas: int,
    block: int = 128,
    step: int = 16,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
) -> Sweep:
    """LSE over the kept keys of every query at every theta, and each theta's output error sums, in one walk over the
    stripes.

    Args:
        q, k, v, and the parameters: as given to `anchor`; `v` may be None.
        state: from `anchor(..., precise=True)`.
        out_dense: (B, H, n, d) float32 from `dense_lse`, needed with `v`.
        columns, bin_offsets: from `bin_columns`.
        thetas: T, the number of thetas given to `bin_columns`.

    Returns:
        Sweep(lse (B, H, T, n), squares, close_01, close_005 (B, H, T)). The recall of a query at a theta is
        exp(lse - dense LSE).

    Raises:
        ValueError: shapes or parameters that do not fit.
    """
    p = problem(q, k, v, block=block, step=step, scale=scale, window=window, softcap=softcap, offset=offset)
    if bin_offsets.numel() != p.batch * p.heads * p.groups * thetas + 1:
        raise ValueError(
            f"bin_offsets has {bin_offsets.numel()} entries, but batch x heads x groups x thetas + 1 is "
            f"{p.batch * p.heads * p.groups * thetas + 1}"
        )
    if v is not None and (out_dense is None or out_dense.dtype != torch.float32 or out_dense.shape != q.shape):
        raise ValueError("with v, out_dense must be the float32 output of dense_lse")
    if v is not None and state.out.dtype != torch.float32:
        raise ValueError("with v, the anchor state must come from anchor(..., precise=True)")
    lse, sums = sweep_op(
        q, k, v, state.out.contiguous(), state.lse.contiguous(),
        state.lse if out_dense is None else out_dense.contiguous(), columns, bin_offsets, thetas,
        p.block, p.step, p.scale,
        p.window, p.cap or None, p.offset,
    )  # fmt: skip
    if v is None:
        sums = sums[:, :, :0]
    return Sweep(lse, sums[..., 0], sums[..., 1].long(), sums[..., 2].long())
