"""Stage 1 for Hopper: the pass of anchor.py, warp-specialised, in Gluon.

A persistent program per multiprocessor walks its share of query tiles. One producer warp brings Q, K and V tiles by the
bulk copy engine; two consumer warpgroups own 64 queries each and share the key tiles. Each consumer starts the next
tile's QK product before the softmax of the current one, and the PV product runs beneath that softmax, so that tensor
cores and exponentials overlap within a warpgroup and between the two. Scheduling after Shah et al., FlashAttention-3
(NeurIPS 2024), section 3.

Head dimensions 64, 128 and 256, 16-bit, no window, no soft-cap, groups that are a multiple of 128 queries and blocks
that are a multiple of 64; everything else runs the portable kernel.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import Problem, launch, processors

# Triton 3.9 knows only the new name, 3.6 only the old one.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

HALF = 64  # queries of one consumer warpgroup
BM = 2 * HALF
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _plan(item, n, offset, init, lookback, group, tiles, batch_heads, BN: gl.constexpr):
    """Head, rows and key tiles of a work item. Tiles from `init_tiles` on start at `start`, those before at 0."""
    bh = item % batch_heads
    order = item // batch_heads
    g = order // tiles
    row0 = g * group + (tiles - 1 - order % tiles) * 128  # the longest tile of a group first
    row_end = gl.minimum(g * group + group, n)
    start = gl.maximum(offset + g * group - lookback, 0)
    init_end = gl.minimum(init, start)
    stop = offset + gl.minimum(row0 + 128, row_end)
    init_tiles = (init_end + BN - 1) // BN
    total = gl.where(row0 < row_end, init_tiles + (stop - start + BN - 1) // BN, 0)
    return bh, row0, row_end, start, stop, init_end, init_tiles, total


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items,
    qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    count = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, row0, _end, start, _stop, _init, init_tiles, total = _plan(
            item, n, offset, init, lookback, group, tiles, batch_heads, BN
        )
        if total > 0:
            b = bh // heads
            h = bh % heads
            hk = h // repeats
            mbarrier.wait(q_empty, (turn & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
            y = b * qy_b + h * qy_h + row0
            x = b * qx_b + h * qx_h
            tma_load(q_desc, [y, x], q_full, q_s.index(0))
            tma_load(q_desc, [y + 64, x], q_full, q_s.index(1))
            turn += 1
            for it in range(total):
                j = gl.where(it < init_tiles, it * BN, start + (it - init_tiles) * BN)
                slot = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
                tma_load(k_desc, [b * ky_b + hk * ky_h + j, b * kx_b + hk * kx_h], k_full.index(slot), k_s.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
                tma_load(v_desc, [b * vy_b + hk * vy_h + j, b * vx_b + hk * vx_h], v_full.index(slot), v_s.index(slot))
                count += 1


@gluon.jit
def _masked(s, it, init_tiles, start, stop, init_end, first, BN: gl.constexpr, S_L: gl.constexpr):
    """Hide what lies beyond the key range or after a query; `first` is the position of the consumer's first query."""
    j = gl.where(it < init_tiles, it * BN, start + (it - init_tiles) * BN)
    limit = gl.where(it < init_tiles, init_end, stop)
    if (j + BN > limit) | (j + BN - 1 > first):
        cols = j + gl.arange(0, BN, gl.SliceLayout(0, S_L))
        pos = first + gl.arange(0, 64, gl.SliceLayout(1, S_L))
        seen = (cols < limit)[None, :] & (cols[None, :] <= pos[:, None])
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def _consume(
    half: gl.constexpr, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse, QSum, ASum,
    n, offset, init, lookback, heads, group, tiles, batch_heads, items, units, scale_log2,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: queries 64 * half ... of each tile."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, A_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    OUT_L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    q = q_s.index(half)
    count = 0
    turn = 0
    passed = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, row0, row_end, start, stop, init_end, init_tiles, total_tiles = _plan(
            item, n, offset, init, lookback, group, tiles, batch_heads, BN
        )
        if total_tiles > 0:
            my0 = row0 + half * 64
            first = offset + my0
            live = my0 + gl.arange(0, 64, ROW) < row_end
            unit = bh.to(gl.int64) * units + my0 // 64
            mbarrier.wait(q_full, turn & 1)

            slot = count % STAGES
            mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
            s = warpgroup_mma(
                q, k_s.index(slot).permute((1, 0)), gl.zeros([64, BN], gl.float32, S_L), use_acc=False, is_async=True
            )
            # Pool the queries while the first product runs.
            rows = my0 + gl.arange(0, 64, gl.SliceLayout(1, OUT_L))
            q_sum = gl.sum(gl.where((rows < row_end)[:, None], q.load(OUT_L).to(gl.float32), 0.0), 0)
            d_at = gl.arange(0, D, gl.SliceLayout(0, OUT_L))
            gl.store(QSum + unit * D + d_at, q_sum, mask=(d_at >= 0) & (my0 < row_end))
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            s = _masked(s, 0, init_tiles, start, stop, init_end, first, BN, S_L)
            top = gl.max(s, 1) * scale_log2
            w = gl.exp2(s * scale_log2 - gl.where(top == float("-inf"), 0.0, top)[:, None])
            total = gl.sum(w, 1)
            p = gl.convert_layout(w.to(dtype), P_L)
            acc = gl.zeros([64, D], gl.float32, A_L)
            for it in range(1, total_tiles):
                next_slot = (count + 1) % STAGES
                mbarrier.wait(k_full.index(next_slot), ((count + 1) // STAGES) & 1)
                if TURNS:  # one consumer's products run while the other is at its exponentials
                    mbarrier.wait(turns.index(half), (passed & 1) ^ (1 - half))
                    passed += 1
                s_token = warpgroup_mma(
                    q, k_s.index(next_slot).permute((1, 0)), gl.zeros([64, BN], gl.float32, S_L),
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
                a_token = warpgroup_mma(p, v_s.index(slot), acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turns.index(1 - half), count=1)
                s = warpgroup_mma_wait(1, deps=[s_token])
                mbarrier.arrive(k_empty.index(next_slot), count=1)
                s = _masked(s, it, init_tiles, start, stop, init_end, first, BN, S_L)
                new = gl.maximum(top, gl.max(s, 1) * scale_log2)
                shift = gl.where(new == float("-inf"), 0.0, new)
                fade = gl.exp2(top - shift)
                w = gl.exp2(s * scale_log2 - shift[:, None])
                total = total * fade + gl.sum(w, 1)
                top = new
                acc = warpgroup_mma_wait(0, deps=[a_token])
                mbarrier.arrive(v_empty.index(slot), count=1)
                acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, A_L))[:, None]
                p = gl.convert_layout(w.to(dtype), P_L)
                slot = next_slot
                count += 1
            mbarrier.arrive(q_empty, count=1)
            mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
            a_token = warpgroup_mma(p, v_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[a_token])
            mbarrier.arrive(v_empty.index(slot), count=1)
            count += 1
            turn += 1

            whole = gl.where(total > 0, total, 1.0)
            at = bh.to(gl.int64) * n + my0
            rows = gl.arange(0, 64, ROW)
            gl.store(Lse + at + rows, gl.where(total > 0, (top + gl.log2(total)) * LN2, float("-inf")), mask=live)
            gl.store(ASum + unit, gl.sum(gl.where(live, top * LN2, 0.0), 0), mask=my0 < row_end)
            acc = acc * gl.convert_layout(1.0 / whole, gl.SliceLayout(1, A_L))[:, None]
            o = gl.convert_layout(acc.to(dtype), OUT_L)
            o_rows = gl.arange(0, 64, gl.SliceLayout(1, OUT_L))
            o_at = Out + at * D + (o_rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, OUT_L))[None, :])
            gl.store(o_at, o, mask=(my0 + o_rows < row_end)[:, None])


@gluon.jit(
    do_not_specialize=[
        "n", "offset", "init", "lookback", "heads", "repeats", "group", "tiles", "batch_heads", "items", "units",
        "qy_b", "qy_h", "qx_b", "qx_h", "ky_b", "ky_h", "kx_b", "kx_h", "vy_b", "vy_h", "vx_b", "vx_h",
    ]
)  # fmt: skip
def anchor_hopper_kernel(
    q_desc, k_desc, v_desc, Out, Lse, QSum, ASum,
    n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items, units, scale_log2,
    qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor, 4 + 4 + 1 warps. Out: (B, H, n, D); QSum, ASum: units of 64 queries."""
    dtype: gl.constexpr = k_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse, QSum, ASum,
                n, offset, init, lookback, heads, group, tiles, batch_heads, items, units, scale_log2,
                D, BN, STAGES, TURNS,
            )),
            (_consume, (
                1, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse, QSum, ASum,
                n, offset, init, lookback, heads, group, tiles, batch_heads, items, units, scale_log2,
                D, BN, STAGES, TURNS,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items,
                qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h, BN, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "units", "blocks", "parts"])
def fold_kernel(QSum, ASum, QBar, ABar, n, units, blocks, parts, block, D: tl.constexpr):
    """Grid: (blocks, B * H). Means over blocks from sums over units of 64 queries."""
    t = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    q = tl.zeros([D], tl.float32)
    a = 0.0
    for u in tl.range(t * parts, tl.minimum((t + 1) * parts, units)):
        q += tl.load(QSum + (bh * units + u) * D + d)
        a += tl.load(ASum + bh * units + u)
    share = 1.0 / tl.minimum(block, n - t * block).to(tl.float32)
    at = bh * blocks + t
    tl.store(QBar + at * D + d, (q * share).to(QBar.dtype.element_ty))
    tl.store(ABar + at, a * share)


@lru_cache(maxsize=64)
def shared_layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Layout of a (rows, dim) tile that the tensor cores read from shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def walk(x: Tensor) -> tuple[list[int], list[int], tuple[int, int, int, int]] | None:
    """A (B, H, n, d) tensor as a matrix for the copy engine: shape, strides, and steps (y, x) per batch and head.

    None where the layout does not allow it: last dimension not contiguous, unaligned, or no common row length.
    """
    batch, heads, n, d = x.shape
    sb, sh, sn, sd = x.stride()
    size = x.element_size()
    if n == 1:
        sn = d
    if sd != 1 or x.data_ptr() % 16 or sn * size % 16 or sn < d:
        return None
    steps = []
    for count, stride in ((batch, sb), (heads, sh)):
        if count == 1:
            steps.append((0, 0))
        elif stride % sn == 0:
            steps.append((stride // sn, 0))
        elif stride + d <= sn:
            steps.append((0, stride))
        else:
            return None
    (yb, xb), (yh, xh) = steps
    rows = (batch - 1) * yb + (heads - 1) * yh + n
    columns = (batch - 1) * xb + (heads - 1) * xh + d
    if columns > sn or rows >= 2**31:
        return None
    return [rows, columns], [sn, 1], (yb, yh, xb, xh)


def suits(q: Tensor, k: Tensor, v: Tensor | None, p: Problem, precise: bool) -> bool:
    """Whether `anchor_hopper` can run a call, on a Hopper GPU."""
    return (
        v is not None
        and not precise
        and q.dtype != torch.float32
        and p.dim in (64, 128, 256)
        and p.window is None
        and p.cap == 0
        and p.group % BM == 0
        and p.block % HALF == 0
        and all(walk(x) is not None for x in (q, k, v))
    )


def anchor_hopper(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, q_bar, a_bar of `anchor` for a call that `suits`."""
    # Short groups have few keys a tile: narrower key tiles waste less at the edges of the two ranges.
    c = launch("anchor_hopper" if p.group >= 1024 else "anchor_hopper_short", q.device, 2, p.dim)
    units = triton.cdiv(p.queries, HALF)
    f32 = torch.float32
    out = q.new_empty(p.batch, p.heads, p.queries, p.dim)
    lse = q.new_empty(p.batch, p.heads, p.queries, dtype=f32)
    q_sum = q.new_empty(p.batch, p.heads, units, p.dim, dtype=f32)
    a_sum = q.new_empty(p.batch, p.heads, units, dtype=f32)
    q_bar = q.new_empty(p.batch, p.heads, p.blocks, p.dim)
    a_bar = q.new_empty(p.batch, p.heads, p.blocks, dtype=f32)
    descriptors = []
    steps: list[int] = []
    for x, rows in ((q, HALF), (k, c["BN"]), (v, c["BN"])):
        found = walk(x)
        assert found is not None, "ask suits() first"
        shape, strides, step = found
        descriptors.append(TensorDescriptor(x, shape, strides, [rows, p.dim], shared_layout(rows, p.dim, x.dtype)))
        steps += step
    tiles = p.group // BM
    items = p.groups * tiles * p.batch * p.heads
    with torch.cuda.device_of(q):
        programs = min(items, processors(q.device))
        anchor_hopper_kernel[(programs,)](
            *descriptors, out, lse, q_sum, a_sum,
            p.queries, p.offset, p.init, p.lookback, p.heads, p.repeats, p.group, tiles, p.batch * p.heads,
            items, units,
            p.scale * 1.4426950408889634, *steps,
            D=p.dim, BN=c["BN"], STAGES=c["STAGES"], CONSUMER_REGS=c["CONSUMER_REGS"], TURNS=bool(c["TURNS"]),
            num_warps=4, maxnreg=c["MAXNREG"],
        )  # fmt: skip
        fold_kernel[(p.blocks, p.batch * p.heads)](
            q_sum, a_sum, q_bar, a_bar, p.queries, units, p.blocks, p.block // HALF, p.block, D=p.dim, num_warps=1
        )
    return out, lse, q_bar, a_bar
