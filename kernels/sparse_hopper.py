"""Stage 3 for Hopper: the pass of sparse.py, warp-specialized, in Gluon.

The kernel is built like anchor_hopper.py, but keys are gathered: a producer warpgroup copies the scattered rows of K
and V that a group's list names into shared-memory tiles by asynchronous copies (cp.async), and runs ahead of the two
consumer warpgroups across work items. A consumer starts from an empty softmax state and merges that of stage 1 at the
end, so that its first GEMM need not wait for it.
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

from .common import launch, processors
from .geometry import Geometry
from .hopper import (
    BM,
    HALF,
    LN2,
    LOG2E,
    PARTS,
    coordinate_steps,
    coordinates,
    gather,
    next_coordinates,
    next_stage,
    shared_layout,
    softmax,
    start_qk,
    tma_load,
    tma_view,
    wait_full,
)


@gluon.jit
def _listed(bh, g, row0, Offsets, n, groups, there, capacity):
    """Where the column list of a work item begins, and its length: 0 beyond the last item or query."""
    at = bh.to(gl.int64) * groups + g
    there = there & (row0 < n)
    begin = gl.minimum(gl.load(Offsets + at, mask=there, other=0), capacity)
    return begin, (gl.minimum(gl.load(Offsets + at + 1, mask=there, other=0), capacity) - begin).to(gl.int32)


@gluon.jit
def _produce(
    q_desc, K, V, Columns, Offsets, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items, step_t, step_h,
    step_o, capacity, qy_b, qy_h, qx_b, qx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: it hands work items that have stripes to the consumers, together with their queries.

    It loads two query tiles [64, D] a work item by TMA, and gathers its K and V tiles [BN, D]. Work items are ordered
    by group, then head, then query tile; late groups, which have most stripes, come first.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    c = gl.arange(0, BN, gl.SliceLayout(1, L))
    d = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    number = 0  # key tiles so far
    work = 0  # work items so far
    tile, bh, order = coordinates(gl.program_id(0), tiles, batch_heads)
    g = groups - 1 - order
    row0 = g * group + tile * 128
    begin, count = _listed(bh, g, row0, Offsets, n, groups, True, capacity)
    cols = gl.load(Columns + begin + c, mask=c < count, other=0)  # [BN]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        next_tile, next_bh, order = next_coordinates(tile, bh, order, step_t, step_h, step_o, tiles, batch_heads)
        next_g = groups - 1 - order
        next_row0 = next_g * group + next_tile * 128
        next_begin, next_count = _listed(
            next_bh, next_g, next_row0, Offsets, n, groups, item + gl.num_programs(0) < items, capacity
        )
        key_tiles = (count + BN - 1) // BN
        if key_tiles > 0:
            b = bh // heads
            h = bh % heads
            hk = (h // repeats).to(gl.int64)
            q_stage = work % QUEUE
            mbarrier.wait(q_empty.index(q_stage), ((work // QUEUE) & 1) ^ 1)
            left = gl.minimum(g * group + group, n) - row0
            _hand_over(work_s, q_stage, count, bh, row0, left)
            mbarrier.expect(q_full.index(q_stage), 2 * q_desc.block_type.nbytes)
            y = b * qy_b + h * qy_h + row0
            x = b * qx_b + h * qx_h
            # Two query tiles [64, D], one for each consumer.
            tma_load(q_desc, [y, x], q_full.index(q_stage), q_s.index(2 * q_stage))
            tma_load(q_desc, [y + 64, x], q_full.index(q_stage), q_s.index(2 * q_stage + 1))
            work += 1
            k_base = K + b.to(gl.int64) * skb + hk * skh
            v_base = V + b.to(gl.int64) * svb + hk * svh
            for it in range(key_tiles):
                stage = number % STAGES
                # The columns of the next tile are loaded early; after the last tile they are the next item's.
                done = (it + 1) * BN
                ahead = gl.where(it + 1 < key_tiles, begin + done, next_begin)
                left_over = gl.where(it + 1 < key_tiles, count - done, next_count)
                later = gl.load(Columns + ahead + c, mask=c < left_over, other=0)
                mbarrier.wait(k_empty.index(stage), ((number // STAGES) & 1) ^ 1)
                # K and V tiles [BN, D], row by row
                gather(k_s.index(stage), k_base + ((cols.to(gl.int64) * skn)[:, None] + d))
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), ((number // STAGES) & 1) ^ 1)
                gather(v_s.index(stage), v_base + ((cols.to(gl.int64) * svn)[:, None] + d))
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                cols = later
                number += 1
        else:
            cols = gl.load(Columns + next_begin + c, mask=c < next_count, other=0)
        begin = next_begin
        count = next_count
        tile = next_tile
        bh = next_bh
        g = next_g
        row0 = next_row0
    # The consumers start one QK GEMM beyond the last key tile and drop its result.
    mbarrier.wait(k_empty.index(number % STAGES), ((number // STAGES) & 1) ^ 1)
    async_copy.mbarrier_arrive(k_full.index(number % STAGES), increment_count=False)
    q_stage = work % QUEUE
    mbarrier.wait(q_empty.index(q_stage), ((work // QUEUE) & 1) ^ 1)
    _hand_over(work_s, q_stage, 0, 0, 0, 0)
    mbarrier.arrive(q_full.index(q_stage), count=1)


@gluon.jit
def _hand_over(work_s, q_stage, count, bh, row0, left):
    """Tell the consumers the next work item: length of its list (0: no more items), head, first query and queries left.

    All threads write the same values, so the thread that arrives at the barrier has written them before.
    """
    _write(work_s, 4 * q_stage, count)
    _write(work_s, 4 * q_stage + 1, bh)
    _write(work_s, 4 * q_stage + 2, row0)
    _write(work_s, 4 * q_stage + 3, left)


@gluon.jit
def _write(work_s, at, x):
    work_s.index(at).store(gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + x)


@gluon.jit
def _read(work_s, at):
    return gl.sum(work_s.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _cut(s, rest, BN: gl.constexpr, S_L: gl.constexpr):
    """Mask columns beyond the end of the list, which has `rest` columns from this tile on."""
    if rest < BN:
        c = gl.arange(0, BN, gl.SliceLayout(0, S_L))
        s = gl.where((c < rest)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _fetch(out_desc, row, q, full, last):
    """Load the output of stage 1 [64, D] into the buffer of the queries once the last QK GEMM has read them."""
    if last:
        mbarrier.expect(full, out_desc.block_type.nbytes)
        tma_load(out_desc, [row, 0], full, q)


@gluon.jit
def _consume(
    half: gl.constexpr, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, old_full, pingpong,
    out_desc, Out, Lse, n, scale_log2,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: it owns the 64 queries from 64 * half on of each query tile.

    With PINGPONG (ping-pong scheduling) the GEMMs of one consumer overlap the softmax of the other; without, its own.
    """
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_ROW: gl.constexpr = gl.SliceLayout(1, A_L)
    P_L: gl.constexpr = gl.DotOperandLayout(0, A_L, 2)
    ROW_L: gl.constexpr = gl.SliceLayout(1, PARTS)
    OUT_L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    stage = 0  # buffer of the current key tile, and the parity of its barriers
    phase = 0
    work = 0  # work items so far
    due = 1 - half  # phase of the ping-pong barrier at which this consumer may issue its GEMMs
    wait_full(q_full, 0, True, QUEUE)
    count = _read(work_s, 0)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    s = warpgroup_mma_wait(0, deps=[start_qk(q_s.index(half), k_s.index(0), BN, S_L)])
    while count > 0:
        q_stage = work % QUEUE
        q = q_s.index(2 * q_stage + half)
        flat = _read(work_s, 4 * q_stage + 1) * n + _read(work_s, 4 * q_stage + 2) + half * 64
        left = _read(work_s, 4 * q_stage + 3) - half * 64  # queries from the first of this half on
        rows = gl.arange(0, 64, ROW_L)
        before = gl.load(Lse + flat + rows, mask=rows < left, other=0.0) * LOG2E
        row_max = gl.full([64], float("-inf"), gl.float32, ROW_L)
        row_sum = gl.zeros([64, 8], gl.float32, PARTS)
        mbarrier.arrive(k_empty.index(stage), count=1)
        _fetch(out_desc, flat, q, old_full.index(half), count <= BN)
        w, _rescale, row_max, row_sum = softmax(_cut(s, count, BN, S_L), row_max, row_sum, scale_log2, BN)
        p = gl.convert_layout(w.to(dtype), P_L, assert_trivial=True)
        acc = gl.zeros([64, D], gl.float32, A_L)
        mbarrier.wait(v_full.index(stage), phase)
        for rest in range(count - BN, 0, -BN):  # keys from this tile on
            old_stage = stage
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(k_full.index(stage), phase)
            fence_async_shared()
            if PINGPONG:
                mbarrier.wait(pingpong.index(half), due)
            s_token = start_qk(q, k_s.index(stage), BN, S_L)
            a_token = warpgroup_mma(p, v_s.index(old_stage), acc, is_async=True)
            if PINGPONG:
                mbarrier.arrive(pingpong.index(1 - half), count=1)
                due = due ^ 1
            s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            _fetch(out_desc, flat, q, old_full.index(half), rest <= BN)
            s = _cut(s, rest, BN, S_L)
            w, rescale, row_max, row_sum = softmax(s, row_max, row_sum, scale_log2, BN)
            # A wait here keeps the assembler from moving the exponentials behind the PV GEMM.
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma_wait(0, deps=[a_token])
            mbarrier.arrive(v_empty.index(old_stage), count=1)
            acc = acc * gl.convert_layout(rescale, A_ROW, assert_trivial=True)[:, None]
            p = gl.convert_layout(w.to(dtype), P_L, assert_trivial=True)
        fence_async_shared()
        a_token = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
        # Merge the anchor region's state: a normalized output has running sum 1 at its LSE.
        denominator = gl.sum(row_sum, 1)
        new = gl.maximum(row_max, before)
        mine = gl.exp2(row_max - new)
        theirs = gl.exp2(before - new)
        denominator = denominator * mine + theirs
        gl.store(Lse + flat + rows, (new + gl.log2(denominator)) * LN2, mask=rows < left)
        mine = gl.convert_layout(mine / denominator, A_ROW, assert_trivial=True)
        theirs = gl.convert_layout(theirs / denominator, A_ROW, assert_trivial=True)
        mbarrier.wait(old_full.index(half), work & 1)
        old = q.load(A_L)
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        acc = warpgroup_mma_wait(0, deps=[a_token])
        mbarrier.arrive(v_empty.index(stage), count=1)
        o = (acc * mine[:, None] + old.to(gl.float32) * theirs[:, None]).to(dtype)

        # The next item's first QK GEMM runs while this one is stored; after the last item its result is dropped.
        work += 1
        wait_full(q_full, work, True, QUEUE)
        count = _read(work_s, 4 * (work % QUEUE))
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        fence_async_shared()
        s_token = start_qk(q_s.index(2 * (work % QUEUE) + half), k_s.index(stage), BN, S_L)
        o_rows = gl.arange(0, 64, gl.SliceLayout(1, OUT_L))
        o_at = Out + flat.to(gl.int64) * D + (o_rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, OUT_L))[None, :])
        gl.store(o_at, gl.convert_layout(o, OUT_L), mask=(o_rows < left)[:, None])
        s = warpgroup_mma_wait(0, deps=[s_token])


@gluon.jit(do_not_specialize=["n", "heads", "repeats", "group", "groups", "tiles", "batch_heads", "items", "step_t",
                              "step_h", "step_o", "capacity",
                              "qy_b", "qy_h", "qx_b", "qx_h"])  # fmt: skip
def sparse_hopper_kernel(
    q_desc, out_desc, K, V, Out, Lse, Columns, Offsets,
    skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items, step_t, step_h, step_o,
    capacity, scale_log2,
    qy_b, qy_h, qx_b, qx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor, 4 + 4 + 4 warps. Updates Out (B, H, n, D) and Lse (B, H, n) in place."""
    dtype: gl.constexpr = q_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * QUEUE, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    work_s = gl.allocate_shared_memory(gl.int32, [4 * QUEUE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    old_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    pingpong = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(old_full.index(i), count=1)
        mbarrier.init(pingpong.index(i), count=1)
    for i in gl.static_range(QUEUE):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)  # every producer thread arrives when its copies are done
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, old_full, pingpong,
                out_desc, Out, Lse, n, scale_log2, D, BN, STAGES, QUEUE, PINGPONG,
            )),
            (_consume, (
                1, q_s, k_s, v_s, work_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, old_full, pingpong,
                out_desc, Out, Lse, n, scale_log2, D, BN, STAGES, QUEUE, PINGPONG,
            )),
            (_produce, (
                q_desc, K, V, Columns, Offsets, q_s, k_s, v_s, work_s,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                skb, skh, skn, svb, svh, svn, n, heads, repeats, group, groups, tiles, batch_heads, items,
                step_t, step_h, step_o, capacity, qy_b, qy_h, qx_b, qx_h, D, BN, STAGES, QUEUE,
            )),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


def suits(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, geo: Geometry) -> bool:
    """Whether `sparse_hopper` can run a call, on a Hopper GPU."""
    return (
        q.dtype != torch.float32
        and out.dtype == q.dtype
        and geo.dim in (64, 128, 256)
        and geo.window is None
        and geo.cap == 0
        and geo.group % BM == 0
        and out.is_contiguous()
        and lse.is_contiguous()
        and all(tma_view(x) is not None for x in (out, q, k, v))
    )


def sparse_hopper(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, offsets: Tensor, geo: Geometry
) -> None:
    """Continue `out` and `lse` in place for a call that `suits`."""
    c = launch("sparse_hopper", q.device, 2, geo.dim)
    found = tma_view(q)
    assert found is not None, "ask suits() first"
    shape, strides, steps = found
    tiles = geo.group // BM
    items = geo.groups * tiles * geo.batch * geo.heads
    with torch.cuda.device_of(q):
        programs = min(items, processors(q.device))
        sparse_hopper_kernel[(programs,)](
            TensorDescriptor(q, shape, strides, [HALF, geo.dim], shared_layout(HALF, geo.dim, q.dtype)),
            TensorDescriptor(
                out, [out.numel() // geo.dim, geo.dim], [geo.dim, 1], [HALF, geo.dim],
                shared_layout(HALF, geo.dim, q.dtype),
            ),
            k, v, out, lse, columns, offsets,
            *k.stride()[:3], *v.stride()[:3],
            geo.queries, geo.heads, geo.repeats, geo.group, geo.groups, tiles, geo.batch * geo.heads, items,
            *coordinate_steps(programs, tiles, geo.batch * geo.heads), columns.numel(),
            geo.scale * 1.4426950408889634, *steps,
            D=geo.dim, BN=c["BN"], STAGES=c["STAGES"], QUEUE=c["QUEUE"], CONSUMER_REGS=c["CONSUMER_REGS"],
            PRODUCER_REGS=c["PRODUCER_REGS"], PINGPONG=bool(c["PINGPONG"]), num_warps=4, maxnreg=c["MAXNREG"],
        )  # fmt: skip
