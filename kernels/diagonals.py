"""Attention mass of every diagonal (distance between query and key) and of every block of 64 queries x 64 keys.

Tiles on one diagonal of tiles are added up element by element, so that a sum over a diagonal of the attention matrix
waits until its tiles have become one; the reduction then costs nothing and its order is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, capped, checked, launch
from .geometry import Geometry, Placement

if TYPE_CHECKING:
    from typing_extensions import Unpack

BLOCK = 64  # side of the blocks whose mass is kept
LINES = 16  # queries whose sums one warp makes without the others


class Diagonals(NamedTuple):
    """Sums of attention weights.

    Attributes:
        distance: (B, H, N) float64, over all pairs i - j = 0 ... N-1.
        blocks: (B, H, ceil(N / 64), ceil(N / 64)) float32, over 64 queries and 64 keys; zero where none is visible.
    """

    distance: Tensor
    blocks: Tensor


@triton.jit(do_not_specialize=["n", "window", "heads", "repeats", "batch_heads", "tiles", "lines", "blocks"])
def diagonal_kernel(
    Q, K, Lse, Sums, Blocks, sqb, sqh, sqn, sqd, skb, skh, skn, skd,
    n, window, heads, repeats, batch_heads, tiles, lines, blocks, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr, LINES: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (diagonals of tiles * B * H,); the longest, next to the main diagonal, come first.

    Sums: (B * H, diagonals, T, T) float32, over the tiles of a diagonal; Blocks: (B * H, lines, blocks) float32, of
    LINES queries x SUB keys, zeroed beforehand. A prompt of its own: query i is at position i.
    """
    apart = tl.program_id(0) // batch_heads
    bh = tl.program_id(0) % batch_heads
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    i = tl.arange(0, T)
    d = tl.arange(0, D)
    inner = (d < DIM)[None, :]
    q_at = Q + b * sqb + h.to(tl.int64) * sqh + i[:, None] * sqn + d[None, :] * sqd
    k_at = K + b * skb + (h // repeats).to(tl.int64) * skh + i[:, None] * skn + d[None, :] * skd
    l_at = Lse + bh.to(tl.int64) * n + i
    parts: tl.constexpr = T // SUB
    bands: tl.constexpr = T // LINES
    sub = tl.arange(0, parts)
    band = tl.arange(0, bands)
    to_blocks = Blocks + bh.to(tl.int64) * lines * blocks
    gap = apart * T + i[:, None] - i[None, :]
    seen = gap >= 0
    if WINDOW:
        seen = seen & (gap < window)
    total = tl.zeros([T, T], tl.float32)
    for tile in tl.range(apart, tiles):
        row0 = tile * T
        col0 = row0 - apart * T
        live = row0 + i < n
        q = tl.load(q_at + tl.cast(row0, tl.int64) * sqn, mask=live[:, None] & inner, other=0.0)  # [T, D]
        k = tl.load(k_at + tl.cast(col0, tl.int64) * skn, mask=(col0 + i < n)[:, None] & inner, other=0.0)  # [T, D]
        ref = tl.load(l_at + row0, mask=live, other=float("inf")) * LOG2E  # [T]; rows beyond the last weigh nothing
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [T, T]
        if SOFTCAP:
            w = tl.exp2(capped(qk, scale, cap, SOFTCAP) * LOG2E - ref[:, None])
        else:
            w = tl.exp2(qk * (scale * LOG2E) - ref[:, None])
        if WINDOW:
            w = tl.where(seen, w, 0.0)
        else:
            if apart == 0:
                w = tl.where(seen, w, 0.0)
        total += w
        # First over keys, then over few queries, which one warp holds: no warp waits for another.
        mass = tl.sum(tl.reshape(tl.sum(tl.reshape(w, [T, parts, SUB]), 2), [bands, LINES, parts]), 1)  # [bands, parts]
        at_row, at_col = row0 // LINES + band, col0 // SUB + sub
        inside = (at_row < lines)[:, None] & (at_col < blocks)[None, :]
        tl.store(to_blocks + at_row.to(tl.int64)[:, None] * blocks + at_col[None, :], mass, mask=inside)
    to = Sums + tl.program_id(0).to(tl.int64) * (T * T) + i[:, None] * T + i[None, :]
    tl.store(to, total)


@torch.library.custom_op("anchorscope::diagonals", mutates_args=())
def diagonals_op(
    q: Tensor, k: Tensor, lse: Tensor, sizes: Sequence[int], scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Launch `diagonal_kernel`; the geometry is flat (`Geometry.flat`). See `diagonals`."""
    geo = Geometry.unflat(sizes, scale, cap)
    c = launch("diagonals", q.device, q.element_size(), geo.dim_pad)
    side, rows = c["T"], geo.batch * geo.heads
    tiles = triton.cdiv(geo.queries, side)
    apart = tiles if geo.window is None else min(tiles, (geo.window + side - 2) // side + 1)
    sub = min(side, BLOCK)
    blocks, lines = triton.cdiv(geo.queries, sub), triton.cdiv(geo.queries, LINES)
    sums = q.new_empty(apart, rows, side, side, dtype=torch.float32)
    mass = q.new_zeros(rows, lines, blocks, dtype=torch.float32)
    with torch.cuda.device_of(q):
        diagonal_kernel[(apart * rows,)](
            q, k, lse, sums, mass, *q.stride(), *k.stride(),
            geo.queries, geo.window or 0, geo.heads, geo.repeats, rows, tiles, lines, blocks, geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, T=side, SUB=sub, LINES=LINES, WINDOW=geo.window is not None,
            SOFTCAP=geo.cap > 0, PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    by_distance = torch.stack([_by_distance(sums[:, row], geo.queries) for row in range(rows)])
    return (
        by_distance.view(geo.batch, geo.heads, -1),
        _coarser(mass, BLOCK // LINES, BLOCK // sub).view(geo.batch, geo.heads, *2 * [-(-geo.queries // BLOCK)]),
    )


@diagonals_op.register_fake
def _(q, k, lse, sizes, scale, cap):
    geo = Geometry.unflat(sizes, scale, cap)
    blocks = -(-geo.queries // BLOCK)
    return (
        q.new_empty(geo.batch, geo.heads, geo.queries, dtype=torch.float64),
        q.new_empty(geo.batch, geo.heads, blocks, blocks, dtype=torch.float32),
    )


def _by_distance(sums: Tensor, n: int) -> Tensor:
    """(N,) float64 sums by distance from the sums (diagonals, T, T) of the tiles on each diagonal of tiles."""
    apart, side = sums.shape[:2]
    # In rows of zeros around a tile, read with rows one longer, columns are diagonals.
    wide = torch.nn.functional.pad(sums, (side - 1, side))  # rows of 3 * side - 1
    length = wide.shape[-1]
    lines = wide.as_strided((apart, side, 2 * side - 1), (side * length, length + 1, 1)).sum(1, dtype=torch.float64)
    lines = lines.flip(1)  # place u: distance apart * side + u - (side - 1)
    total = lines[:, side - 1 :].clone()
    total[:-1, 1:] += lines[1:, : side - 1]
    found = sums.new_zeros(max(n, apart * side), dtype=torch.float64)
    found[: apart * side] = total.flatten()
    return found[:n]


def _coarser(mass: Tensor, lines: int, columns: int) -> Tensor:
    """Sums of `lines` x `columns` neighboring blocks of mass (rows, lines, blocks)."""
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[2] % columns, 0, -mass.shape[1] % lines))
    mass = mass.unflatten(1, (-1, lines)).sum(2)
    return mass if columns == 1 else mass.unflatten(2, (-1, columns)).sum(3)


def diagonals(q: Tensor, k: Tensor, lse: Tensor, **place: Unpack[Placement]) -> Diagonals:
    """Attention mass by distance and by block, of whole prompts (as many queries as keys).

    `lse` (B, H, N) float32 is that of `dense_lse`; groups play no part.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    geo = checked(q, k, **place)
    if geo.queries != geo.keys:
        raise ValueError(f"diagonals are of a whole prompt, not of {geo.queries} queries and {geo.keys} keys")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(q.shape[:3])}, not {tuple(lse.shape)}")
    return Diagonals(*diagonals_op(q, k, lse.contiguous(), *geo.flat()))
