"""Stage 2 for Hopper: the scores of identify.py, warp-specialized, in Gluon.

A persistent program keeps 192 keys of one kv head in shared memory and iterates over the pooled queries of all groups.
A producer warp loads stacks of 128 pooled queries (several heads and groups, as in identify.py) by TMA; three consumer
warpgroups multiply them with 64 keys each by WGMMA and reduce hits to bits. One warpgroup's GEMM runs while the others
reduce.

Head dimensions 64, 128 and 256, 16-bit, no window, no soft-cap, groups of 4, 8, 16, 32 or 64 blocks; everything else
runs the portable kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import launch, processors
from .geometry import Geometry
from .hopper import HALF, PIECE, gather, items_of_program, reinterpret, shared_layout, tma_load, tma_view, wait_full

ROWS = 128  # pooled queries in a stack
CONSUMERS: gl.constexpr = gl.constexpr(3)
KEYS: gl.constexpr = gl.constexpr(64 * 3)  # keys of a work item


@triton.jit(do_not_specialize=["heads", "repeats", "groups", "step", "blocks", "chunks", "stacks"])
def need_kernel(
    ABar, Theta, Need, heads, repeats, groups, step, blocks, chunks, stacks, scale,
    RC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Least raw score q_bar . k that makes a stripe, in the order of the stacks. Grid: (stacks, B * Hkv * chunks).

    Need: (B * Hkv * chunks, stacks, ROWS) float32; +inf where the stack has no pooled query.
    """
    stack = tl.program_id(0)
    part = tl.program_id(1)
    r = tl.arange(0, ROWS)
    head_in = part % chunks * RC + r // (ROWS // RC)
    head = part // chunks * repeats + head_in
    at = stack * (ROWS // RC) + r % (ROWS // RC)
    ok = (head_in < repeats) & (at < blocks)
    a = tl.load(ABar + head.to(tl.int64) * blocks + at, mask=ok, other=0.0)  # [ROWS]
    need = (a - tl.load(Theta + head, mask=ok, other=0.0)) / scale
    tl.store(Need + (part.to(tl.int64) * stacks + stack) * ROWS + r, tl.where(ok, need, float("inf")))


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _plan(item, parts, first, offset, lookback, group, TG: gl.constexpr):
    """Part (kv head and chunk of its heads), first column and first stack of a work item; the longest come first."""
    c0 = (first + item // parts) * KEYS
    low = c0 + lookback - offset
    return item % parts, c0, gl.where(low < 0, 0, low // group + 1) // TG


@gluon.jit
def _produce(
    q_desc, k_desc, Need, q_s, k_s, need_s, q_full, q_empty, k_full, k_empty,
    offset, lookback, kv_heads, repeats, group, blocks, chunks, stacks, first, parts, items,
    ky_b, ky_h, kx_b, kx_h,
    D: gl.constexpr, TG: gl.constexpr, RC: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: it loads key tiles [64, D], stacks of pooled queries [128, D] and what they need [128]."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    panels: gl.constexpr = D // 64
    rows: gl.constexpr = 128 // RC
    number = 0  # stacks so far
    for work in range(items_of_program(items)):
        item = gl.program_id(0) + work * gl.num_programs(0)
        part, c0, begin = _plan(item, parts, first, offset, lookback, group, TG)
        kv = part // chunks
        b = kv // kv_heads
        hk = kv % kv_heads
        k_stage = work % KEEP
        mbarrier.wait(k_empty.index(k_stage), ((work // KEEP) & 1) ^ 1)
        mbarrier.expect(k_full.index(k_stage), CONSUMERS * k_desc.block_type.nbytes)
        for u in gl.static_range(CONSUMERS):  # a key tile [64, D] for each consumer
            tma_load(
                k_desc, [b * ky_b + hk * ky_h + c0 + u * 64, b * kx_b + hk * kx_h], k_full.index(k_stage),
                k_s.index(k_stage * CONSUMERS + u),
            )  # fmt: skip
        head0 = kv * repeats
        for stack in range(begin, stacks):
            stage = number % STAGES
            mbarrier.wait(q_empty.index(stage), ((number // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), RC * panels * q_desc.block_type.nbytes)
            for u in gl.static_range(RC):
                head = head0 + gl.minimum(part % chunks * RC + u, repeats - 1)
                for c in gl.static_range(panels):  # pooled queries of one head, [128 / RC, 64]
                    tma_load(
                        q_desc, [head * blocks + stack * rows, c * 64], q_full.index(stage),
                        q_s.index((stage * panels + c) * RC + u),
                    )  # fmt: skip
            gather(need_s.index(stage), Need + (part.to(gl.int64) * stacks + stack) * 128 + gl.arange(0, 128, L))
            async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
            number += 1


@gluon.jit
def _consume(
    third: gl.constexpr, q_s, k_s, need_s, q_full, q_empty, k_full, k_empty, Bits,
    offset, init, lookback, kv_heads, repeats, group, groups, chunks, stacks, first, parts, items, words,
    D: gl.constexpr, TG: gl.constexpr, RC: gl.constexpr, SP: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: it owns the 64 keys from 64 * third on of each work item."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    number = 0
    for work in range(items_of_program(items)):
        item = gl.program_id(0) + work * gl.num_programs(0)
        part, c0, begin = _plan(item, parts, first, offset, lookback, group, TG)
        base = (part // chunks * repeats + part % chunks * RC).to(gl.int64) * groups
        spare = repeats - part % chunks * RC  # heads of this chunk that exist
        wait_full(k_full, work, True, KEEP)
        keys = k_s.index(work % KEEP * CONSUMERS + third)
        for stack in range(begin, stacks):
            stage = number % STAGES
            wait_full(q_full, number, True, STAGES)
            token = warpgroup_mma(
                keys, q_s.index(stage).permute((1, 0)), gl.zeros([64, 128], gl.float32, S_L), use_acc=False,
                is_async=True,
            )  # fmt: skip
            need = need_s.index(stage).load(gl.SliceLayout(0, S_L))
            s = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(q_empty.index(stage), count=1)
            _mark(
                s, need, Bits, c0 + third * 64, stack * TG, base, spare, offset, init, lookback, group, groups, words,
                TG, RC, SP, S_L,
            )  # fmt: skip
            number += 1
        mbarrier.arrive(k_empty.index(work % KEEP), count=1)


@gluon.jit
def _mark(
    s, need, Bits, c0, g0, base, spare, offset, init, lookback, group, groups, words,
    TG: gl.constexpr, RC: gl.constexpr, SP: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Store the bits of 64 columns from c0 on for every unit (head and group) of a stack: does any block have a hit?

    A warp holds 16 columns of all units, 16 bits each, so two units share a 32-bit word in the reduction over the warp.
    Then each lane masks and stores the bits of one unit.
    """
    PAIRS: gl.constexpr = RC * TG // 2
    row = gl.arange(0, 64, gl.SliceLayout(1, S_L))
    n = gl.arange(0, 128, gl.SliceLayout(0, S_L))
    bit = (1 << (row % 16))[:, None] << (n // SP % 2 * 16)[None, :]
    bits = gl.reshape(gl.where(s >= need[None, :], bit, 0), [4, 16, PAIRS, 2 * SP])
    word = gl.reduce(gl.reshape(gl.permute(bits, [0, 2, 1, 3]), [4, PAIRS, 32 * SP]), 2, _either)
    L: gl.constexpr = gl.BlockedLayout([1, PAIRS, 1], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    unit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    mine = pair[None, :][:, :, None] == (unit // 2)[None, :][:, None, :]
    word = gl.reduce(gl.where(mine, gl.convert_layout(word, gl.SliceLayout(2, L))[:, :, None], 0), 1, _either)
    word = word >> (unit % 2 * 16)[None, :]
    col = c0 + 16 * gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(1, L)))
    g = g0 + unit % TG
    # Clear the bits of columns that are no candidates of the group.
    limit = (offset + g * group - lookback)[None, :] - col[:, None]
    word = word & ((1 << gl.minimum(gl.maximum(limit, 0), 16)) - 1)
    word = word & (0xFFFF << gl.minimum(gl.maximum(init - col, 0), 16))[:, None]
    to = Bits + (base + unit // TG * groups + g)[None, :] * words + (col // 16)[:, None]
    there = (unit < RC * TG) & (unit // TG < spare) & (g < groups)
    gl.store(to, word.to(gl.int16), mask=there[None, :] & (col < words * 16)[:, None])


@gluon.jit(
    do_not_specialize=[
        "offset", "init", "lookback", "kv_heads", "repeats", "group", "groups", "blocks", "chunks", "stacks", "first",
        "parts", "items", "words", "ky_b", "ky_h", "kx_b", "kx_h",
    ]
)  # fmt: skip
def score_hopper_kernel(
    q_desc, k_desc, Need, Bits,
    offset, init, lookback, kv_heads, repeats, group, groups, blocks, chunks, stacks, first, parts, items, words,
    ky_b, ky_h, kx_b, kx_h,
    D: gl.constexpr, TG: gl.constexpr, RC: gl.constexpr, SP: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor, 3 * 4 + 1 warps. Bits: (B * H * groups, words) int16, 16 columns each."""
    dtype: gl.constexpr = k_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 128, D], gl.NVMMASharedLayout.get_default_for([128, D], dtype))
    k_s = gl.allocate_shared_memory(dtype, [KEEP * CONSUMERS, 64, D], k_desc.layout)
    need_s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    boxes: gl.constexpr = [STAGES * D // 64 * RC, 128 // RC, 64]
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [KEEP, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [KEEP, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=33)  # TMA, and every lane of the producer for Need
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(KEEP):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, need_s, q_full, q_empty, k_full, k_empty, Bits,
                offset, init, lookback, kv_heads, repeats, group, groups, chunks, stacks, first, parts, items, words,
                D, TG, RC, SP, KEEP, STAGES,
            )),
            (_consume, (
                1, q_s, k_s, need_s, q_full, q_empty, k_full, k_empty, Bits,
                offset, init, lookback, kv_heads, repeats, group, groups, chunks, stacks, first, parts, items, words,
                D, TG, RC, SP, KEEP, STAGES,
            )),
            (_consume, (
                2, q_s, k_s, need_s, q_full, q_empty, k_full, k_empty, Bits,
                offset, init, lookback, kv_heads, repeats, group, groups, chunks, stacks, first, parts, items, words,
                D, TG, RC, SP, KEEP, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, Need, reinterpret(q_s, dtype, boxes, q_desc.layout), k_s, need_s,
                q_full, q_empty, k_full, k_empty,
                offset, lookback, kv_heads, repeats, group, blocks, chunks, stacks, first, parts, items,
                ky_b, ky_h, kx_b, kx_h, D, TG, RC, KEEP, STAGES,
            )),
        ],
        [4, 4, 1],
        [CONSUMER_REGS, CONSUMER_REGS, 24],
    )  # fmt: skip


def stacking(geo: Geometry) -> tuple[int, int, int]:
    """TG groups, RC heads and SP blocks of a stack of 128 pooled queries."""
    rc = min(triton.next_power_of_2(geo.repeats), ROWS // geo.step, 16)
    return ROWS // (rc * geo.step), rc, geo.step


def suits(q_bar: Tensor, k: Tensor, geo: Geometry) -> bool:
    """Whether `score_hopper` can run a call, on a Hopper GPU."""
    return (
        k.dtype != torch.float32
        and q_bar.dtype == k.dtype
        and geo.dim in (64, 128, 256)
        and geo.window is None
        and geo.cap == 0
        and geo.step in (4, 8, 16, 32, 64)
        and tma_view(k) is not None
    )


def score_hopper(q_bar: Tensor, a_bar: Tensor, k: Tensor, theta: Tensor, bits: Tensor, geo: Geometry) -> None:
    """Fill `bits` (B * H * groups, words) int32 for a call that `suits`."""
    c = launch("identify_hopper", k.device, 2, geo.dim)
    tg, rc, sp = stacking(geo)
    found = tma_view(k)
    assert found is not None, "ask suits() first"
    shape, strides, steps = found
    chunks = triton.cdiv(geo.repeats, rc)
    parts = geo.batch * geo.kv_heads * chunks
    stacks = triton.cdiv(geo.groups, tg)
    first = geo.init // KEYS.value
    # No group has candidates beyond the last one's.
    tiles = triton.cdiv(max(0, geo.offset + (geo.groups - 1) * geo.group - geo.lookback), KEYS.value) - first
    if tiles <= 0:
        return
    need = a_bar.new_empty(parts, stacks, ROWS)
    pooled = q_bar.view(-1, geo.dim)
    rows = ROWS // rc
    with torch.cuda.device_of(k):
        need_kernel[(stacks, parts)](
            a_bar, theta, need, geo.heads, geo.repeats, geo.groups, geo.step, geo.blocks, chunks, stacks, geo.scale,
            RC=rc, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        score_hopper_kernel[(min(parts * tiles, processors(k.device)),)](
            TensorDescriptor(
                pooled, list(pooled.shape), list(pooled.stride()), [rows, PIECE], shared_layout(rows, PIECE, k.dtype)
            ),
            TensorDescriptor(k, shape, strides, [HALF, geo.dim], shared_layout(HALF, geo.dim, k.dtype)),
            need, bits.view(torch.int16),
            geo.offset, geo.init, geo.lookback, geo.kv_heads, geo.repeats, geo.group, geo.groups, geo.blocks, chunks,
            stacks, first, parts, parts * tiles, bits.shape[1] * 2, *steps,
            D=geo.dim, TG=tg, RC=rc, SP=sp, KEEP=c["KEEP"], STAGES=c["STAGES"], CONSUMER_REGS=c["CONSUMER_REGS"],
            num_warps=4, maxnreg=c["MAXNREG"],
        )  # fmt: skip
