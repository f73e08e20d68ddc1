"""Stage 1 for Hopper: the pass of anchor.py, warp-specialized, in Gluon.

A persistent program per multiprocessor takes its share of query tiles. One producer warp loads Q, K and V tiles by
TMA; two consumer warpgroups own 64 queries each and share the key tiles. A consumer's PV GEMM runs beneath the softmax
of the next key tile, and the first QK GEMM of the next query tile beneath the epilogue of the current one. Scheduling
after Shah et al., FlashAttention-3 (NeurIPS 2024), section 3. Queries are pooled by the tensor cores.

Head dimensions 64, 128 and 256, 16-bit, no window, no soft-cap, groups that are a multiple of 128 queries and blocks
that are a multiple of 64; everything else runs the portable kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
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
    PARTS,
    PIECE,
    coordinate_steps,
    coordinates,
    items_of_program,
    next_coordinates,
    next_stage,
    reinterpret,
    shared_layout,
    softmax,
    start_qk,
    tma_load,
    tma_view,
    wait_full,
)

FOLDING = {"SHARE": 4, "num_warps": 1}


@gluon.jit
def _rows(tile, g, n, group, tiles):
    """First query of the group, first query of the tile, and the query after the group's last."""
    base = g * group
    here = gl.minimum(tiles, (n - base + 127) // 128)  # the last group may be short
    return base, base + (here - 1 - tile) * 128, gl.minimum(base + group, n)  # the longest tile of a group first


@gluon.jit
def _keys(base, row0, row_end, offset, init, lookback, BN: gl.constexpr):
    """Keys of a work item: start of the local range, end of the initial range and its pieces, and number of key tiles.

    Keys are loaded in pieces of 64: the first `init_pieces` from key 0 on, the others from `start` on. A key tile is
    BN // 64 pieces, so that the two ranges share a tile where they meet.
    """
    start = gl.maximum(offset + base - lookback, 0)
    init_end = gl.minimum(init, start)
    init_pieces = (init_end + 63) // 64
    pieces = init_pieces + (offset + gl.minimum(row0 + 128, row_end) - start + 63) // 64
    return start, init_end, init_pieces, (pieces * 64 + BN - 1) // BN


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items, step_h, step_t, step_g,
    qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    """The producer warp: it loads two query tiles [64, D] a work item, and its K and V tiles [BN, D], by TMA."""
    number = 0  # key tiles so far
    bh, tile, g = coordinates(gl.program_id(0), batch_heads, tiles)
    for work in range(items_of_program(items)):
        base, row0, row_end = _rows(tile, g, n, group, tiles)
        start, _init, init_pieces, key_tiles = _keys(base, row0, row_end, offset, init, lookback, BN)
        b = bh // heads
        h = bh % heads
        hk = h // repeats
        q_stage = work % QUEUE
        mbarrier.wait(q_empty.index(q_stage), ((work // QUEUE) & 1) ^ 1)
        mbarrier.expect(q_full.index(q_stage), 2 * q_desc.block_type.nbytes)
        y = b * qy_b + h * qy_h + row0
        x = b * qx_b + h * qx_h
        # Two query tiles [64, D], one for each consumer.
        tma_load(q_desc, [y, x], q_full.index(q_stage), q_s.index(2 * q_stage))
        tma_load(q_desc, [y + 64, x], q_full.index(q_stage), q_s.index(2 * q_stage + 1))
        ky = b * ky_b + hk * ky_h
        kx = b * kx_b + hk * kx_h
        vy = b * vy_b + hk * vy_h
        vx = b * vx_b + hk * vx_h
        for it in range(key_tiles):
            stage = number % STAGES
            mbarrier.wait(k_empty.index(stage), ((number // STAGES) & 1) ^ 1)
            _load(k_desc, k_s, k_full, stage, it, ky, kx, start, init_pieces, D, BN)
            mbarrier.wait(v_empty.index(stage), ((number // STAGES) & 1) ^ 1)
            _load(v_desc, v_s, v_full, stage, it, vy, vx, start, init_pieces, D, BN)
            number += 1
        bh, tile, g = next_coordinates(bh, tile, g, step_h, step_t, step_g, batch_heads, tiles)
    # The consumers start one QK GEMM beyond the last key tile and drop its result.
    mbarrier.wait(k_empty.index(number % STAGES), ((number // STAGES) & 1) ^ 1)
    mbarrier.arrive(k_full.index(number % STAGES), count=1)
    q_stage = items_of_program(items) % QUEUE
    mbarrier.wait(q_empty.index(q_stage), ((items_of_program(items) // QUEUE) & 1) ^ 1)
    mbarrier.arrive(q_full.index(q_stage), count=1)


@gluon.jit
def _load(desc, tiles_s, full, stage, it, y, x, start, init_pieces, D: gl.constexpr, BN: gl.constexpr):
    """Load a key tile [BN, D] as boxes [64, 64]: pieces of 64 keys in panels of 64 columns, as WGMMA reads them."""
    rows: gl.constexpr = BN // 64
    panels: gl.constexpr = D // 64
    mbarrier.expect(full.index(stage), rows * panels * desc.block_type.nbytes)
    for u in gl.static_range(rows):
        piece = it * rows + u
        j = gl.where(piece < init_pieces, piece * 64, start + (piece - init_pieces) * 64)
        for c in gl.static_range(panels):
            tma_load(desc, [y + j, x + c * 64], full.index(stage), tiles_s.index((stage * panels + c) * rows + u))


@gluon.jit
def _masked(s, it, start, init_end, init_pieces, first, BN: gl.constexpr, S_L: gl.constexpr):
    """Mask keys after the query and padding after the initial range; `first` is the position of the first query.

    Every query sees a key of the first tile, so its maximum is finite from there on.
    """
    c = gl.arange(0, BN, gl.SliceLayout(0, S_L))
    edge = first - start + init_pieces * 64 - it * BN  # query i sees columns up to i + edge
    if edge < BN - 1:
        i = gl.arange(0, 64, gl.SliceLayout(1, S_L))
        s = gl.where(c[None, :] <= i[:, None] + edge, s, float("-inf"))
    if (init_end % 64 != 0) & (it == (init_pieces - 1) // (BN // 64)):
        there = (c < init_end - it * BN) | (c >= init_pieces * 64 - it * BN)
        s = gl.where(there[None, :], s, float("-inf"))
    return s


@gluon.jit
def _sum_queries(panels_s, at, live, to, dtype: gl.constexpr, D: gl.constexpr):
    """Store the sum (D,) of the first `live` of 64 queries: a GEMM of ones with the panels from `at` on."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    i = gl.arange(0, 64, gl.SliceLayout(0, P_L))
    ones = gl.where((i < live)[None, :], gl.full([64, 64], 1.0, gl.float32, P_L), 0.0).to(dtype)
    row = gl.arange(0, 64, gl.SliceLayout(1, L))
    column = gl.arange(0, 64, gl.SliceLayout(0, L))
    for panel in range(D // 64):
        zeros = gl.zeros([64, 64], gl.float32, L)
        token = warpgroup_mma(ones, panels_s.index(at + panel), zeros, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[token])  # the same in every row
        gl.store(to + panel * 64 + (row[:, None] * 0 + column[None, :]), sums, mask=(row == 0)[:, None] & (live > 0))


@gluon.jit
def _consume(
    half: gl.constexpr, q_s, panels_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    Out, Lse, RowMax, QSum, n, offset, init, lookback, group, tiles, batch_heads, items, step_h, step_t, step_g,
    scale_log2, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: it owns the 64 queries from 64 * half on of each query tile."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_ROW: gl.constexpr = gl.SliceLayout(1, A_L)
    P_L: gl.constexpr = gl.DotOperandLayout(0, A_L, 2)
    ROW_L: gl.constexpr = gl.SliceLayout(1, PARTS)
    OUT_L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = k_s.dtype
    stage = 0  # buffer of the current key tile, and the parity of its barriers
    phase = 0
    bh, tile, g = coordinates(gl.program_id(0), batch_heads, tiles)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[start_qk(q_s.index(half), k_s.index(0), BN, S_L)])
    for work in range(items_of_program(items)):
        base, row0, row_end = _rows(tile, g, n, group, tiles)
        start, init_end, init_pieces, key_tiles = _keys(base, row0, row_end, offset, init, lookback, BN)
        q = q_s.index(2 * (work % QUEUE) + half)
        my0 = row0 + half * 64
        first = offset + my0
        mine = key_tiles
        if BN == 64 and half == 0:  # the last tile may lie after all queries of the first half
            mine -= (start + (key_tiles - 1 - init_pieces) * 64 > first + 63).to(gl.int32)
        row_max = gl.full([64], float("-inf"), gl.float32, ROW_L)
        row_sum = gl.zeros([64, 8], gl.float32, PARTS)
        unit = bh * ((n + 63) // 64) + my0 // 64
        panel = (2 * (work % QUEUE) + half) * (D // 64)
        _sum_queries(panels_s, panel, row_end - my0, QSum + unit.to(gl.int64) * D, dtype, D)
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _masked(s, 0, start, init_end, init_pieces, first, BN, S_L)
        w, _rescale, row_max, row_sum = softmax(s, row_max, row_sum, scale_log2, BN)
        mbarrier.wait(v_full.index(stage), phase)
        p = gl.convert_layout(w.to(dtype), P_L, assert_trivial=True)
        acc = gl.zeros([64, D], gl.float32, A_L)
        for it in range(1, mine):
            old_stage = stage
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(k_full.index(stage), phase)
            s_token = start_qk(q, k_s.index(stage), BN, S_L)
            a_token = warpgroup_mma(p, v_s.index(old_stage), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = _masked(s, it, start, init_end, init_pieces, first, BN, S_L)
            w, rescale, row_max, row_sum = softmax(s, row_max, row_sum, scale_log2, BN)
            # A wait here keeps the assembler from moving the exponentials behind the PV GEMM.
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma_wait(0, deps=[a_token])
            mbarrier.arrive(v_empty.index(old_stage), count=1)
            acc = acc * gl.convert_layout(rescale, A_ROW, assert_trivial=True)[:, None]
            p = gl.convert_layout(w.to(dtype), P_L, assert_trivial=True)
        a_token = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
        mbarrier.arrive(q_empty.index(work % QUEUE), count=1)
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
        if mine < key_tiles:
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        # The next item's first QK GEMM runs while this one is stored; after the last item its result is dropped.
        wait_full(q_full, work + 1, True, QUEUE)
        mbarrier.wait(k_full.index(stage), phase)
        s_token = start_qk(q_s.index(2 * ((work + 1) % QUEUE) + half), k_s.index(stage), BN, S_L)

        at = bh * n + my0
        rows = gl.arange(0, 64, ROW_L)
        live = my0 + rows < row_end
        denominator = gl.sum(row_sum, 1)
        gl.store(Lse + at + rows, (row_max + gl.log2(denominator)) * LN2, mask=live)
        gl.store(RowMax + at + rows, row_max * LN2, mask=live)
        share = gl.convert_layout(1.0 / denominator, A_ROW, assert_trivial=True)
        acc = warpgroup_mma_wait(1, deps=[a_token])
        mbarrier.arrive(v_empty.index(last), count=1)
        o = gl.convert_layout((acc * share[:, None]).to(dtype), OUT_L)
        o_rows = gl.arange(0, 64, gl.SliceLayout(1, OUT_L))
        o_at = Out + at.to(gl.int64) * D + (o_rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, OUT_L))[None, :])
        gl.store(o_at, o, mask=(my0 + o_rows < row_end)[:, None])
        s = warpgroup_mma_wait(0, deps=[s_token])
        bh, tile, g = next_coordinates(bh, tile, g, step_h, step_t, step_g, batch_heads, tiles)


@gluon.jit(
    do_not_specialize=[
        "n", "offset", "init", "lookback", "heads", "repeats", "group", "tiles", "batch_heads", "items",
        "step_h", "step_t", "step_g",
        "qy_b", "qy_h", "qx_b", "qx_h", "ky_b", "ky_h", "kx_b", "kx_h", "vy_b", "vy_h", "vx_b", "vx_h",
    ]
)  # fmt: skip
def anchor_hopper_kernel(
    q_desc, k_desc, v_desc, Out, Lse, RowMax, QSum,
    n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items, step_h, step_t, step_g, scale_log2,
    qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, QUEUE: gl.constexpr, CONSUMER_REGS: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor, 4 + 4 + 1 warps.

    Out: (B, H, n, D); Lse, RowMax: (B, H, n); QSum: (B, H, ceil(n / 64), D), sums over units of 64 queries.
    """
    dtype: gl.constexpr = k_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2 * QUEUE, 64, D], q_desc.layout)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], tile)
    panels_s = reinterpret(q_s, dtype, [2 * QUEUE * D // 64, 64, 64], k_desc.layout)
    parts: gl.constexpr = [STAGES * BN // 64 * D // 64, 64, 64]
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(QUEUE):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, panels_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, Out, Lse, RowMax,
                QSum, n, offset, init, lookback, group, tiles, batch_heads, items, step_h, step_t, step_g, scale_log2,
                D, BN, STAGES, QUEUE,
            )),
            (_consume, (
                1, q_s, panels_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, Out, Lse, RowMax,
                QSum, n, offset, init, lookback, group, tiles, batch_heads, items, step_h, step_t, step_g, scale_log2,
                D, BN, STAGES, QUEUE,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_s,
                reinterpret(k_s, dtype, parts, k_desc.layout), reinterpret(v_s, dtype, parts, v_desc.layout),
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                n, offset, init, lookback, heads, repeats, group, tiles, batch_heads, items, step_h, step_t, step_g,
                qy_b, qy_h, qx_b, qx_h, ky_b, ky_h, kx_b, kx_h, vy_b, vy_h, vx_b, vx_h, D, BN, STAGES, QUEUE,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "units", "blocks", "parts"])
def fold_kernel(QSum, RowMax, QBar, ABar, n, units, blocks, parts, block, D: tl.constexpr, SHARE: tl.constexpr):
    """Means over blocks of sums over units of 64 queries, and of anchors. Grid: (ceil(blocks / SHARE), B * H)."""
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    i = tl.arange(0, 64)
    for t in tl.range(tl.program_id(0) * SHARE, tl.minimum(tl.program_id(0) * SHARE + SHARE, blocks)):
        q = tl.zeros([D], tl.float32)
        a = tl.zeros([64], tl.float32)
        for u in tl.range(t * parts, tl.minimum((t + 1) * parts, units)):
            q += tl.load(QSum + (bh * units + u) * D + d)  # [D]
            a += tl.load(RowMax + bh * n + u * 64 + i, mask=u * 64 + i < n, other=0.0)  # [64]
        share = 1.0 / tl.minimum(block, n - t * block).to(tl.float32)
        at = bh * blocks + t
        tl.store(QBar + at * D + d, (q * share).to(QBar.dtype.element_ty))
        tl.store(ABar + at, tl.sum(a, 0) * share)


def suits(q: Tensor, k: Tensor, v: Tensor | None, geo: Geometry, precise: bool) -> bool:
    """Whether `anchor_hopper` can run a call, on a Hopper GPU."""
    return (
        v is not None
        and not precise
        and q.dtype != torch.float32
        and geo.dim in (64, 128, 256)
        and geo.window is None
        and geo.cap == 0
        and geo.group % BM == 0
        and geo.block % HALF == 0
        and all(tma_view(x) is not None for x in (q, k, v))
    )


def anchor_hopper(q: Tensor, k: Tensor, v: Tensor, geo: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of `anchor` (out, lse, q_bar, a_bar) for a call that `suits`."""
    c = launch("anchor_hopper", q.device, 2, geo.dim)
    units = triton.cdiv(geo.queries, HALF)
    f32 = torch.float32
    out = q.new_empty(geo.batch, geo.heads, geo.queries, geo.dim)
    lse = q.new_empty(geo.batch, geo.heads, geo.queries, dtype=f32)
    row_max = torch.empty_like(lse)
    q_sum = q.new_empty(geo.batch, geo.heads, units, geo.dim, dtype=f32)
    q_bar = q.new_empty(geo.batch, geo.heads, geo.blocks, geo.dim)
    a_bar = q.new_empty(geo.batch, geo.heads, geo.blocks, dtype=f32)
    descriptors = []
    steps: list[int] = []
    for x, columns in ((q, geo.dim), (k, PIECE), (v, PIECE)):
        found = tma_view(x)
        assert found is not None, "ask suits() first"
        shape, strides, step = found
        descriptors.append(TensorDescriptor(x, shape, strides, [HALF, columns], shared_layout(HALF, columns, x.dtype)))
        steps += step
    tiles = geo.group // BM
    items = triton.cdiv(geo.queries, BM) * geo.batch * geo.heads
    with torch.cuda.device_of(q):
        programs = min(items, processors(q.device))
        anchor_hopper_kernel[(programs,)](
            *descriptors, out, lse, row_max, q_sum,
            geo.queries, geo.offset, geo.init, geo.lookback, geo.heads, geo.repeats, geo.group, tiles,
            geo.batch * geo.heads, items, *coordinate_steps(programs, geo.batch * geo.heads, tiles),
            geo.scale * 1.4426950408889634, *steps,
            D=geo.dim, BN=c["BN"], STAGES=c["STAGES"], QUEUE=c["QUEUE"], CONSUMER_REGS=c["CONSUMER_REGS"],
            num_warps=4, maxnreg=c["MAXNREG"],
        )  # fmt: skip
        fold_kernel[(triton.cdiv(geo.blocks, FOLDING["SHARE"]), geo.batch * geo.heads)](
            q_sum,
            row_max,
            q_bar,
            a_bar,
            geo.queries,
            units,
            geo.blocks,
            geo.block // HALF,
            geo.block,
            D=geo.dim,
            **FOLDING,
        )
    return out, lse, q_bar, a_bar
