"""Attention mass of every column in every group, from the dense LSE.

Each program keeps one tile of keys and iterates over the group's queries, so that the sum over queries stays in
registers and is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, capped, checked, launch
from .geometry import Geometry, Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack


@triton.jit(do_not_specialize=["n", "offset", "window", "heads", "repeats", "group", "groups", "keys", "tiles"])
def mass_kernel(
    Q, K, Lse, Mass, sqb, sqh, sqn, sqd, skb, skh, skn, skd,
    n, offset, window, heads, repeats, group, groups, keys, tiles, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (key tiles * groups * B * H,). Mass: (B, H, groups, keys) float32; Lse: (B, H, n) float32, of all keys."""
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
        # k: [BC, D], loaded once
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
            ref = tl.load(l_base + r) * LOG2E  # [BQ]
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
            # q: [BQ, D]
            q = tl.load(q_base + tl.cast(r, tl.int64) * sqn, mask=live[:, None] & inner[None, :], other=0.0)
            ref = tl.load(l_base + r, mask=live, other=0.0) * LOG2E  # [BQ]
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BC, BQ]
            gap = (offset + r + i)[None, :] - cols[:, None]
            seen = (gap >= 0) & live[None, :]
            if WINDOW:
                seen = seen & (gap < window)
            w = tl.exp2(capped(qk, scale, cap, SOFTCAP) * LOG2E - ref[None, :])
            mass += tl.sum(tl.where(seen, w, 0.0), 1)
    tl.store(to, mass, mask=cols < keys)


@torch.library.custom_op("anchorscope::column_mass", mutates_args=())
def mass_op(q: Tensor, k: Tensor, lse: Tensor, sizes: Sequence[int], scale: float, cap: float) -> Tensor:
    """Launch `mass_kernel`; the geometry is flat (`Geometry.flat`). See `column_mass`."""
    geo = Geometry.unflat(sizes, scale, cap)
    mass = _output(q, geo)
    c = launch("column_mass", q.device, q.element_size(), geo.dim_pad)
    tiles = triton.cdiv(geo.keys, c["BC"])
    with torch.cuda.device_of(q):
        mass_kernel[(tiles * geo.groups * geo.batch * geo.heads,)](
            q, k, lse, mass, *q.stride(), *k.stride(),
            geo.queries, geo.offset, geo.window or 0, geo.heads, geo.repeats, geo.group, geo.groups, geo.keys, tiles,
            geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BC=c["BC"], BQ=c["BQ"], WINDOW=geo.window is not None, SOFTCAP=geo.cap > 0,
            PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return mass


@mass_op.register_fake
def _(q, k, lse, sizes, scale, cap):
    return _output(q, Geometry.unflat(sizes, scale, cap))


def _output(q: Tensor, geo: Geometry) -> Tensor:
    return q.new_empty(geo.batch, geo.heads, geo.groups, geo.keys, dtype=torch.float32)


def column_mass(q: Tensor, k: Tensor, lse: Tensor, **place: Unpack[Placement]) -> Tensor:
    """Attention mass of every column in every group, (B, H, groups, N) float32.

    Entry (g, j) is the sum over the group's queries i of exp(s(i, j) - lse(i)), for all visible pairs, anchor region
    included; a head's entries sum to n. `lse` (B, H, n) float32 is that of `dense_lse`.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    geo = checked(q, k, **place)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(q.shape[:3])}, not {tuple(lse.shape)}")
    return mass_op(q, k, lse.contiguous(), *geo.flat())
