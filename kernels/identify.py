"""Stage 2: which key columns are stripes of each group, from the pooled queries and anchors.

`score_kernel` loads a tile of keys once and iterates over the groups that have it among their candidates. The pooled
queries of several groups, heads (of one kv head) and blocks are stacked into one GEMM operand, so that keys are read
once per kv head. Its result is a bit mask over (head, group, column). `count_kernel` counts the bits, `scan_kernel`
sums the counts up to offsets, and `list_kernel` writes ascending column lists.
Source: Zhang et al., AnchorAttention (EMNLP 2025), step 2, with the candidates of docs/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, checked_pooled, launch, theta_tensor, traced
from .geometry import Geometry, Placement, geometry
from .types import AnchorState, Stripes

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAD = 256  # columns of the bit mask are a multiple of this, which every BC of `score_kernel` divides
SHARE = 512  # words of the bit mask that one program lists
# How count_kernel, scan_kernel and list_kernel are launched, on any GPU.
COUNTING = {"BS": 2, "num_warps": 4}
SCANNING = {"BW": 2048, "num_warps": 8}
LISTING = {"FEW": 8, "BC": 512, "num_warps": 1}


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["offset", "init", "lookback", "window", "heads", "repeats", "group", "groups", "block",
                               "blocks", "step", "chunks", "words"])  # fmt: skip
def score_kernel(
    QBar, ABar, K, Theta, Bits,
    sqb, sqh, sqn, skb, skh, skn, skd,
    keys, offset, init, lookback, window, heads, repeats, group, groups, block, blocks, step, chunks, words,
    scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, TG: tl.constexpr, RC: tl.constexpr, SP: tl.constexpr,
    SUB: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hkv * chunks of RC heads, key tiles). Bits: (B * H * groups, words) int16, 16 columns each.

    One step scores TG groups x RC heads x SP blocks, stacked in that order. SUB: a group has more than SP blocks.
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
    if c0 + BC <= init:
        g1 = 0

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
    theta = tl.load(Theta + head, mask=head_ok, other=float("-inf"))  # [TG * RC * SP]
    bit = (1 << (c % 16)).to(tl.int32)
    q_at = QBar + (head // heads).to(tl.int64) * sqb + (head % heads).to(tl.int64) * sqh

    wr = tl.arange(0, TG * RC)  # one word row per (group, head)
    w_in = chunk * RC + wr % RC
    w_head = (b * heads + hk * repeats + w_in).to(tl.int64)
    w = tl.arange(0, BC // 16)
    w_cols = c0 + w * 16

    for g in tl.range(g0, g1, TG):
        gr = g + r // (RC * SP)
        word = tl.zeros([BC // 16, TG * RC], tl.int32)
        subs = tl.cdiv(step, SP) if SUB else 1
        for s in tl.range(0, subs):
            tr = t + s * SP
            at = gr * step + tr
            ok = head_ok & (tr < step) & (gr < g1) & (at < blocks)
            q = tl.load(
                q_at[:, None] + at[:, None] * sqn + d[None, :], mask=ok[:, None] & inner[None, :], other=0.0
            )  # [TG * RC * SP, D]
            a = tl.load(ABar + head.to(tl.int64) * blocks + at, mask=ok, other=0.0)  # [TG * RC * SP]
            need = tl.where(ok, a - theta, float("inf"))  # least score that makes a stripe
            qk = tl.dot(k, tl.trans(q.to(k.dtype)), input_precision=PRECISION)  # [BC, TG * RC * SP]
            if SOFTCAP:  # cap * tanh(x / cap) >= need, solved for the raw product
                x = tl.minimum(tl.maximum(need / cap, -1.0), 1.0)
                inverse = 0.5 * tl.log((1.0 + x) / (1.0 - x)) * cap
                need = tl.where(x >= 1.0, float("inf"), tl.where(x <= -1.0, float("-inf"), inverse))
            hit = qk >= (need / scale)[None, :]
            if WINDOW:
                hit = hit & ((offset + at * block)[None, :] - cols[:, None] < window)
            # A column has its bit if any block of the group hits: an OR over 16 columns and SP blocks.
            bits = tl.where(hit & ok[None, :], bit[:, None], 0)
            bits = tl.reshape(bits, [BC // 16, 16, TG * RC, SP])
            if SP < 8:
                # Not in one go: Triton 3.6 miscompiles reductions over lanes that are not next to each other.
                some = tl.reduce(tl.reduce(bits, 3, _either), 1, _either)
            else:
                bits = tl.reshape(tl.permute(bits, [0, 2, 1, 3]), [BC // 16, TG * RC, 16 * SP])
                some = tl.reduce(bits, 2, _either)
            word = word | some
        # Clear the bits of columns that are no candidates of the group.
        wg = g + wr // RC
        limit = (offset + wg * group - lookback)[None, :] - w_cols[:, None]
        least = init - w_cols[:, None]
        word = word & ((1 << tl.minimum(tl.maximum(limit, 0), 16)) - 1)
        word = word & (0xFFFF << tl.minimum(tl.maximum(least, 0), 16))
        to = Bits + (w_head * groups + wg)[None, :] * words + (c0 // 16 + w)[:, None]
        tl.store(to, word.to(tl.int16), mask=((w_in < repeats) & (wg < g1))[None, :])


@triton.jit
def _ones(x):
    """Number of bits set in each int32 (a population count)."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _span(g, offset, init, lookback, window, group, WINDOW: tl.constexpr):
    """First and past-the-last 32-column word of the candidates of group g that `score_kernel` wrote."""
    limit = tl.maximum(offset + g * group - lookback, 0)
    low = init
    if WINDOW:
        low = tl.maximum(low, offset + g * group - window + 1)
    low = tl.minimum(tl.maximum(low, 0), limit)
    return low // 32, tl.where(low < limit, tl.cdiv(limit, 32), low // 32)


@triton.jit(do_not_specialize=["offset", "init", "lookback", "window", "group", "groups", "words", "shares"])
def count_kernel(Bits, Counts, Before, offset, init, lookback, window, group, groups, words, shares,
                 WINDOW: tl.constexpr, SHARE: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Grid: (B * H * groups,). Bits: (rows, words) int32; Before: (rows, shares) bits set before each share."""
    row = tl.program_id(0)
    lo, hi = _span(row % groups, offset, init, lookback, window, group, WINDOW)
    i = tl.arange(0, BS)
    w = i[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    base = tl.zeros([], tl.int32)
    for share in tl.range(lo // SHARE, tl.cdiv(hi, SHARE), BS):
        at = share * SHARE + w
        bits = tl.load(Bits + row.to(tl.int64) * words + at, mask=(at >= lo) & (at < hi), other=0)  # [BS, SHARE]
        ones = tl.sum(_ones(bits), 1)
        before = base + tl.cumsum(ones, 0) - ones
        tl.store(Before + row.to(tl.int64) * shares + share + i, before, mask=share + i < shares)
        base += tl.sum(ones, 0)
    tl.store(Counts + row, base)


@triton.jit(do_not_specialize=["rows"])
def scan_kernel(Counts, Offsets, rows, BW: tl.constexpr):
    """Offsets (rows + 1,) int64 are the running sum of Counts (rows,) int32. Grid: (1,)."""
    i = tl.arange(0, BW)
    base = tl.zeros([], tl.int64)
    tl.store(Offsets, base)
    for at in tl.range(0, rows, BW):
        counts = tl.load(Counts + at + i, mask=at + i < rows, other=0).to(tl.int64)  # [BW]
        tl.store(Offsets + 1 + at + i, base + tl.cumsum(counts, 0), mask=at + i < rows)
        base += tl.sum(counts, 0)


@triton.jit(
    do_not_specialize=["offset", "init", "lookback", "window", "group", "groups", "words", "shares", "capacity"]
)
def list_kernel(Bits, Before, Offsets, Columns, offset, init, lookback, window, group, groups, words, shares, capacity,
                WINDOW: tl.constexpr, SHARE: tl.constexpr, FEW: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Grid: (B * H * groups, shares). Writes a share of a row's columns, ascending, none beyond the capacity."""
    row = tl.program_id(0)
    share = tl.program_id(1)
    lo, hi = _span(row % groups, offset, init, lookback, window, group, WINDOW)
    if (share * SHARE >= hi) | ((share + 1) * SHARE <= lo):
        return
    word = share * SHARE + tl.arange(0, SHARE)
    row_bits = Bits + row.to(tl.int64) * words
    bits = tl.load(row_bits + word, mask=(word >= lo) & (word < hi), other=0)  # [SHARE]
    ones = _ones(bits)
    base = tl.load(Offsets + row) + tl.load(Before + row.to(tl.int64) * shares + share)
    most = tl.max(ones, 0)
    if most <= FEW:  # few bits a word: in each round, every word lists its lowest bit and clears it
        to = base + tl.cumsum(ones, 0) - ones
        for _ in tl.range(0, most):
            tl.store(Columns + to, word * 32 + _ones((bits & -bits) - 1), mask=(bits != 0) & (to < capacity))
            bits = bits & (bits - 1)
            to += 1
    else:  # many bits: BC columns at a time, so that stores are contiguous
        end = tl.minimum((share + 1) * SHARE, hi)
        for c0 in tl.range(share * SHARE * 32, end * 32, BC):
            c = c0 + tl.arange(0, BC)
            wide = c // 32
            # got: [BC], 1 where the column is a stripe
            got = (tl.load(row_bits + wide, mask=(wide >= lo) & (wide < end), other=0) >> (c % 32)) & 1
            at = base + tl.cumsum(got, 0) - 1
            tl.store(Columns + at, c, mask=(got == 1) & (at < capacity))
            base += tl.sum(got, 0)


def stacking(geo: Geometry, rows: int) -> tuple[int, int, int, bool]:
    """TG groups, RC heads and SP blocks of a stack of about `rows` pooled queries; whether a group has more blocks."""
    sp = min(triton.next_power_of_2(geo.step), rows)
    rc = min(triton.next_power_of_2(geo.repeats), rows // sp)
    return rows // (sp * rc), rc, sp, geo.step > sp


def _bits(
    q_bar: Tensor, a_bar: Tensor, k: Tensor, theta: Tensor, geo: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bit mask, counts, offsets and counts before each share; see `bits_op`."""
    bits, counts, offsets, before = _outputs(q_bar, geo)
    _score(q_bar, a_bar, k, theta, bits, geo)
    with torch.cuda.device_of(k):
        count_kernel[(bits.shape[0],)](
            bits, counts, before, geo.offset, geo.init, geo.lookback, geo.window or 0, geo.group, geo.groups,
            bits.shape[1], before.shape[1], WINDOW=geo.window is not None, SHARE=SHARE, **COUNTING,
        )  # fmt: skip
        scan_kernel[(1,)](counts, offsets, bits.shape[0], **SCANNING)
    return bits, counts, offsets, before


def _score(q_bar: Tensor, a_bar: Tensor, k: Tensor, theta: Tensor, bits: Tensor, geo: Geometry) -> None:
    if architecture(k.device) == "sm90":
        try:
            from . import identify_hopper
        except ImportError:  # Gluon came with Triton 3.4, the portable kernel does the same
            pass
        else:
            if identify_hopper.suits(q_bar, k, geo):
                identify_hopper.score_hopper(q_bar, a_bar, k, theta, bits, geo)
                return
    portable(q_bar, a_bar, k, theta, bits, geo)


def portable(q_bar: Tensor, a_bar: Tensor, k: Tensor, theta: Tensor, bits: Tensor, geo: Geometry) -> None:
    """Launch `score_kernel`, which runs on every architecture: it fills `bits` (B * H * groups, words) int32."""
    c = launch("identify", k.device, k.element_size(), geo.dim_pad)
    tg, rc, sp, sub = stacking(geo, c["ROWS"])
    chunks = triton.cdiv(geo.repeats, rc)
    # No group has candidates beyond this column.
    last = max(0, geo.offset + (geo.groups - 1) * geo.group - geo.lookback)
    if last == 0:
        return
    with torch.cuda.device_of(k):
        score_kernel[(geo.batch * geo.kv_heads * chunks, triton.cdiv(last, c["BC"]))](
            q_bar, a_bar, k, theta, bits.view(torch.int16),
            *q_bar.stride()[:3], *k.stride(),
            geo.keys, geo.offset, geo.init, geo.lookback, geo.window or 0, geo.heads, geo.repeats, geo.group,
            geo.groups, geo.block, geo.blocks, geo.step, chunks, bits.shape[1] * 2, geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BC=c["BC"], TG=tg, RC=rc, SP=sp, SUB=sub, WINDOW=geo.window is not None,
            SOFTCAP=geo.cap > 0, PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip


@torch.library.custom_op("anchorscope::stripe_bits", mutates_args=())
def bits_op(
    q_bar: Tensor, a_bar: Tensor, k: Tensor, theta: Tensor, sizes: Sequence[int], scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bit mask (B * H * groups, words) int32 over columns, counts (B, H, groups) int32, offsets, and bits set before
    each share of a row (B * H * groups, shares) int32; see `identify`.

    Words outside a group's candidates, and shares without any, are not written.
    """
    return _bits(q_bar, a_bar, k, theta, Geometry.unflat(sizes, scale, cap))


@bits_op.register_fake
def _(q_bar, a_bar, k, theta, sizes, scale, cap):
    return _outputs(q_bar, Geometry.unflat(sizes, scale, cap))


def _outputs(q_bar: Tensor, geo: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words = (geo.keys + PAD - 1) // PAD * (PAD // 32)
    rows = geo.batch * geo.heads * geo.groups
    return (
        q_bar.new_empty(rows, words, dtype=torch.int32),
        q_bar.new_empty(geo.batch, geo.heads, geo.groups, dtype=torch.int32),
        q_bar.new_empty(rows + 1, dtype=torch.int64),
        q_bar.new_empty(rows, (words + SHARE - 1) // SHARE, dtype=torch.int32),
    )


def _list(bits: Tensor, before: Tensor, offsets: Tensor, capacity: int, geo: Geometry) -> Tensor:
    """Columns (capacity,) int32 of the bit mask of `bits_op`, row r starting at offsets[r]; see `identify`."""
    columns = bits.new_empty(capacity)
    if capacity:
        with torch.cuda.device_of(bits):
            list_kernel[before.shape](
                bits, before, offsets, columns, geo.offset, geo.init, geo.lookback, geo.window or 0, geo.group,
                geo.groups, bits.shape[1], before.shape[1], capacity, WINDOW=geo.window is not None, SHARE=SHARE,
                **LISTING,
            )  # fmt: skip
    return columns


@torch.library.custom_op("anchorscope::stripe_list", mutates_args=())
def list_op(
    bits: Tensor, before: Tensor, offsets: Tensor, capacity: int, sizes: Sequence[int], scale: float, cap: float
) -> Tensor:
    """`_list` for torch.compile and autograd; the geometry is flat (`Geometry.flat`)."""
    return _list(bits, before, offsets, capacity, Geometry.unflat(sizes, scale, cap))


@list_op.register_fake
def _(bits, before, offsets, capacity, sizes, scale, cap):
    return bits.new_empty(capacity)


def candidates(q_shape: Sequence[int], keys: int, **place: Unpack[Placement]) -> int:
    """Candidate columns over all groups and heads: no selection is larger.

    Args:
        q_shape: (B, H, n, d), the shape of the queries.
        keys: N.
        **place: see `Placement`.
    """
    batch, heads, _, dim = q_shape
    return geometry(q_shape, (batch, heads, keys, dim), **place).most_stripes


def identify_at(
    state: AnchorState | tuple[Tensor, Tensor],
    k: Tensor,
    geo: Geometry,
    *,
    theta: float | Tensor,
    capacity: int | None = None,
) -> Stripes:
    """`identify` for a call that is checked already (`common.checked`)."""
    *_, q_bar, a_bar = state
    q_bar, a_bar, limit = q_bar.contiguous(), a_bar.contiguous(), theta_tensor(theta, geo, k.device)
    if traced(q_bar, k):
        bits, counts, offsets, before = bits_op(q_bar, a_bar, k, limit, *geo.flat())
        room = int(offsets[-1]) if capacity is None else capacity
        return Stripes(list_op(bits, before, offsets, room, *geo.flat()), offsets, counts)
    bits, counts, offsets, before = _bits(q_bar, a_bar, k, limit, geo)
    room = int(offsets[-1]) if capacity is None else capacity
    return Stripes(_list(bits, before, offsets, room, geo), offsets, counts)


def identify(
    state: AnchorState | tuple[Tensor, Tensor],
    k: Tensor,
    *,
    theta: float | Tensor,
    queries: int,
    capacity: int | None = None,
    **place: Unpack[Placement],
) -> Stripes:
    """Stripes of every group: candidate columns whose margin is at most theta.

    The margin of column j is the smallest of a_bar(t) - score(q_bar(t), k_j) over the group's blocks t that see j.
    Pooled queries are rounded to the dtype of `k` for the product (`margins.py` does not round them).

    Args:
        state: what `anchor` returned, or (q_bar (B, H, blocks, d), a_bar (B, H, blocks) float32).
        k: (B, Hkv, N, d), as given to `anchor`.
        theta: nats, a number or a (B, H) tensor; -inf selects nothing, +inf every candidate that some query sees.
        queries: n, the number of queries behind `state`.
        capacity: length of `columns`. Without it the total is read back from the GPU once, the only synchronization.
            With it nothing synchronizes; `offsets[-1] > capacity` then tells that columns were left out.
        **place: as given to `anchor`.

    Returns:
        Stripes(columns int32, offsets (B * H * groups + 1,) int64, counts (B, H, groups) int32).

    Raises:
        ValueError: shapes or parameters that do not fit.
    """
    geo = checked_pooled(state[-2], k, queries, **place)
    return identify_at(state, k, geo, theta=theta, capacity=capacity)
