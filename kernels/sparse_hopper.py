"""Stage 3 for Hopper: the pass of sparse.py, warp-specialised, in Gluon.

As anchor_hopper.py, but keys are gathered: a producer warpgroup copies the scattered rows of K and V that a group's
list names into the tiles the tensor cores read, running ahead of the two consumer warpgroups across work items. A
consumer starts from an empty softmax state and joins that of stage 1 at the end, so that nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .anchor_hopper import BM, HALF, LN2, LOG2E, await_tile, shared_layout, tma_load, walk
from .common import Problem, launch, processors

# Triton 3.9 knows only the new name, 3.6 only the old one.
gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _place(item, group, groups, tiles, batch_heads):
    """Head, group and first row of a work item. Late groups, which have most stripes, come first."""
    g = groups - 1 - item // (tiles * batch_heads)
    return (item // tiles) % batch_heads, g, g * group + item % tiles * 128


@gluon.jit
def _listed(item, Offsets, n, group, groups, tiles, batch_heads, items, capacity):
    """Where a work item's list begins, and its length; 0 beyond the last item or query."""
    bh, g, row0 = _place(item, group, groups, tiles, batch_heads)
    at = bh.to(gl.int64) * groups + g
    there = (item < items) & (row0 < n)
    begin = gl.minimum(gl.load(Offsets + at, mask=there, other=0), capacity)
    return begin, (gl.minimum(gl.load(Offsets + at + 1, mask=there, other=0), capacity) - begin).to(gl.int32)


@gluon.jit
def _produce(
    q_desc, K, V, Columns, Offsets, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items, capacity,
    qy_b, qy_h, qx_b, qx_h, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup. Work items with stripes are handed to the consumers with their queries."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    c = gl.arange(0, BN, gl.SliceLayout(1, L))
    d = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    number = 0  # key tiles so far
    turn = 0  # items so far
    begin, count = _listed(gl.program_id(0), Offsets, n, group, groups, tiles, batch_heads, items, capacity)
    cols = gl.load(Columns + begin + c, mask=c < count, other=0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        next_begin, next_count = _listed(
            item + gl.num_programs(0), Offsets, n, group, groups, tiles, batch_heads, items, capacity
        )
        total = (count + BN - 1) // BN
        if total > 0:
            bh, _g, row0 = _place(item, group, groups, tiles, batch_heads)
            b = bh // heads
            h = bh % heads
            hk = (h // repeats).to(gl.int64)
            place = turn % QUEUE
            mbarrier.wait(q_empty.index(place), ((turn // QUEUE) & 1) ^ 1)
            _hand_over(work_s, place, item, count)
            mbarrier.expect(q_full.index(place), 2 * q_desc.block_type.nbytes)
            y = b * qy_b + h * qy_h + row0
            x = b * qx_b + h * qx_h
            tma_load(q_desc, [y, x], q_full.index(place), q_s.index(2 * place))
            tma_load(q_desc, [y + 64, x], q_full.index(place), q_s.index(2 * place + 1))
            turn += 1
            k_base = K + b.to(gl.int64) * skb + hk * skh
            v_base = V + b.to(gl.int64) * svb + hk * svh
            for it in range(total):
                slot = number % STAGES
                phase = ((number // STAGES) & 1) ^ 1
                done = (it + 1) * BN  # then the next item's list
                ahead = gl.where(it + 1 < total, begin + done, next_begin)
                left = gl.where(it + 1 < total, count - done, next_count)
                later = gl.load(Columns + ahead + c, mask=c < left, other=0)
                mbarrier.wait(k_empty.index(slot), phase)
                gather(k_s.index(slot), k_base + ((cols.to(gl.int64) * skn)[:, None] + d))
                async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
                mbarrier.wait(v_empty.index(slot), phase)
                gather(v_s.index(slot), v_base + ((cols.to(gl.int64) * svn)[:, None] + d))
                async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
                cols = later
                number += 1
        else:
            cols = gl.load(Columns + next_begin + c, mask=c < next_count, other=0)
        begin = next_begin
        count = next_count
    place = turn % QUEUE
    mbarrier.wait(q_empty.index(place), ((turn // QUEUE) & 1) ^ 1)
    _hand_over(work_s, place, 0, 0)
    mbarrier.arrive(q_full.index(place), count=1)


@gluon.jit
def _hand_over(work_s, place, item, count):
    """Tell the consumers the next work item, and the length of its list; 0 at the end.

    Every thread writes the same, the one that signals the barrier among them and before it does.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    work_s.index(2 * place).store(gl.zeros([1], gl.int32, L) + item)
    work_s.index(2 * place + 1).store(gl.zeros([1], gl.int32, L) + count)


@gluon.jit
def _take(work_s, place):
    """What `_hand_over` left: work item and count."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(work_s.index(2 * place).load(L), 0), gl.sum(work_s.index(2 * place + 1).load(L), 0)


@gluon.jit
def _cut(s, it, count, BN: gl.constexpr, S_L: gl.constexpr):
    """Hide what lies beyond the end of the list."""
    if (it + 1) * BN > count:
        c = it * BN + gl.arange(0, BN, gl.SliceLayout(0, S_L))
        s = gl.where((c < count)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _consume(
    half: gl.constexpr, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse,
    n, group, groups, tiles, batch_heads, scale_log2,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: queries 64 * half ... of each tile.

    With TURNS one consumer's products run while the other is at its exponentials; without, a consumer's own do.
    """
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, A_L, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    OUT_L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    number = 0  # key tiles so far
    turn = 0  # items so far
    await_tile(q_full, 0, True, QUEUE)
    item, count = _take(work_s, 0)
    await_tile(k_full, 0, count > 0, STAGES)
    fence_async_shared()
    s_token = warpgroup_mma(
        q_s.index(half), k_s.index(0).permute((1, 0)), gl.zeros([64, BN], gl.float32, S_L), use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=[s_token])
    while count > 0:
        bh, g, row0 = _place(item, group, groups, tiles, batch_heads)
        total_tiles = (count + BN - 1) // BN
        q = q_s.index(2 * (turn % QUEUE) + half)
        my0 = row0 + half * 64
        flat = bh.to(gl.int64) * n + my0
        left = gl.minimum(g * group + group, n) - my0  # queries from my0 on
        rows = gl.arange(0, 64, ROW)
        before = gl.load(Lse + flat + rows, mask=rows < left, other=0.0) * LOG2E
        mbarrier.arrive(k_empty.index(number % STAGES), count=1)
        s = _cut(s, 0, count, BN, S_L)
        top = gl.max(s, 1) * scale_log2
        w = gl.exp2(s * scale_log2 - top[:, None])
        total = gl.sum(w, 1)
        p = gl.convert_layout(w.to(dtype), P_L)
        acc = gl.zeros([64, D], gl.float32, A_L)
        await_tile(k_full, number + 1, total_tiles > 1, STAGES)
        for it in range(1, total_tiles):
            fence_async_shared()
            if TURNS:
                mbarrier.wait(turns.index(half), ((number - turn) & 1) ^ (1 - half))
            s_token = warpgroup_mma(
                q, k_s.index((number + 1) % STAGES).permute((1, 0)), gl.zeros([64, BN], gl.float32, S_L),
                use_acc=False, is_async=True,
            )  # fmt: skip
            await_tile(v_full, number, True, STAGES)
            fence_async_shared()
            a_token = warpgroup_mma(p, v_s.index(number % STAGES), acc, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - half), count=1)
            s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index((number + 1) % STAGES), count=1)
            s = _cut(s, it, count, BN, S_L)
            if TURNS:
                acc = warpgroup_mma_wait(0, deps=[a_token])
                mbarrier.arrive(v_empty.index(number % STAGES), count=1)
            new = gl.maximum(top, gl.max(s, 1) * scale_log2)
            fade = gl.exp2(top - new)
            w = gl.exp2(s * scale_log2 - new[:, None])
            total = total * fade + gl.sum(w, 1)
            top = new
            # Waiting for the next keys here keeps the assembler from moving the exponentials behind the product.
            await_tile(k_full, number + 2, it + 1 < total_tiles, STAGES)
            if not TURNS:
                acc = warpgroup_mma_wait(0, deps=[a_token])
                mbarrier.arrive(v_empty.index(number % STAGES), count=1)
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, A_L))[:, None]
            p = gl.convert_layout(w.to(dtype), P_L)
            number += 1
        mbarrier.arrive(q_empty.index(turn % QUEUE), count=1)
        await_tile(v_full, number, True, STAGES)
        fence_async_shared()
        a_token = warpgroup_mma(p, v_s.index(number % STAGES), acc, is_async=True)
        o_rows = gl.arange(0, 64, gl.SliceLayout(1, OUT_L))
        o_at = Out + flat * D + (o_rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, OUT_L))[None, :])
        old = gl.load(o_at, mask=(o_rows < left)[:, None], other=0.0)
        number += 1
        turn += 1
        acc = warpgroup_mma_wait(0, deps=[a_token])
        mbarrier.arrive(v_empty.index((number - 1) % STAGES), count=1)
        # Join the anchor region: a normalised output is one with total 1 at its LSE.
        new = gl.maximum(top, before)
        mine = gl.exp2(top - new)
        theirs = gl.exp2(before - new)
        total = total * mine + theirs
        gl.store(Lse + flat + rows, (new + gl.log2(total)) * LN2, mask=rows < left)
        mine = gl.convert_layout(mine / total, gl.SliceLayout(1, A_L))
        theirs = gl.convert_layout(theirs / total, gl.SliceLayout(1, A_L))
        acc = acc * mine[:, None] + gl.convert_layout(old, A_L).to(gl.float32) * theirs[:, None]
        o = acc.to(dtype)

        # The next item's first product runs while this one is stored. After the last item nobody uses it.
        await_tile(q_full, turn, True, QUEUE)
        item, count = _take(work_s, turn % QUEUE)
        await_tile(k_full, number, count > 0, STAGES)
        fence_async_shared()
        s_token = warpgroup_mma(
            q_s.index(2 * (turn % QUEUE) + half), k_s.index(number % STAGES).permute((1, 0)),
            gl.zeros([64, BN], gl.float32, S_L), use_acc=False, is_async=True,
        )  # fmt: skip
        gl.store(o_at, gl.convert_layout(o, OUT_L), mask=(o_rows < left)[:, None])
        s = warpgroup_mma_wait(0, deps=[s_token])


@gluon.jit(do_not_specialize=["n", "heads", "repeats", "group", "groups", "tiles", "batch_heads", "items", "capacity",
                              "qy_b", "qy_h", "qx_b", "qx_h"])  # fmt: skip
def sparse_hopper_kernel(
    q_desc, K, V, Out, Lse, Columns, Offsets,
    skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items, capacity, scale_log2,
    qy_b, qy_h, qx_b, qx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor, 4 + 4 + 4 warps. Updates Out (B, H, n, D), Lse (B, H, n)."""
    dtype: gl.constexpr = q_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * QUEUE, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    work_s = gl.allocate_shared_memory(gl.int32, [2 * QUEUE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for i in gl.static_range(QUEUE):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)  # every producer thread arrives when its copies are done
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse,
                n, group, groups, tiles, batch_heads, scale_log2, D, BN, STAGES, QUEUE, TURNS,
            )),
            (_consume, (
                1, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, Out, Lse,
                n, group, groups, tiles, batch_heads, scale_log2, D, BN, STAGES, QUEUE, TURNS,
            )),
            (_produce, (
                q_desc, K, V, Columns, Offsets, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty,
                skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items, capacity,
                qy_b, qy_h, qx_b, qx_h, D, BN, STAGES, QUEUE,
            )),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


def suits(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> bool:
    """Whether `sparse_hopper` can run a call, on a Hopper GPU."""
    return (
        q.dtype != torch.float32
        and out.dtype == q.dtype
        and p.dim in (64, 128, 256)
        and p.window is None
        and p.cap == 0
        and p.group % BM == 0
        and out.is_contiguous()
        and lse.is_contiguous()
        and all(walk(x) is not None for x in (q, k, v))
    )


def sparse_hopper(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, offsets: Tensor, p: Problem
) -> None:
    """Continue `out` and `lse` in place for a call that `suits`."""
    c = launch("sparse_hopper", q.device, 2, p.dim)
    found = walk(q)
    assert found is not None, "ask suits() first"
    shape, strides, steps = found
    tiles = p.group // BM
    items = p.groups * tiles * p.batch * p.heads
    with torch.cuda.device_of(q):
        programs = min(items, processors(q.device))
        sparse_hopper_kernel[(programs,)](
            TensorDescriptor(q, shape, strides, [HALF, p.dim], shared_layout(HALF, p.dim, q.dtype)),
            k, v, out, lse, columns, offsets,
            *k.stride()[:3], *v.stride()[:3],
            p.queries, p.heads, p.repeats, p.group, p.groups, tiles, p.batch * p.heads, items, columns.numel(),
            p.scale * 1.4426950408889634, *steps,
            D=p.dim, BN=c["BN"], STAGES=c["STAGES"], QUEUE=c["QUEUE"], CONSUMER_REGS=c["CONSUMER_REGS"],
            PRODUCER_REGS=c["PRODUCER_REGS"], TURNS=bool(c["TURNS"]), num_warps=4, maxnreg=c["MAXNREG"],
        )  # fmt: skip
