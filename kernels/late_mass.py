"""Attention mass of every column by how much later the queries are: the part that group sums do not tell apart.

Of the queries of later groups all are late enough; only those of a column's own group and the next ones are looked at
one by one, so the pass is short.
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


@triton.jit(do_not_specialize=["n", "window", "heads", "repeats", "group", "tiles", "late", "near", "far"])
def late_kernel(
    Q, K, Lse, Late, Between, sqb, sqh, sqn, sqd, skb, skh, skn, skd,
    n, window, heads, repeats, group, tiles, late, near, far, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (key tiles * B * H,). Late, Between: (B, H, n) float32; Lse: (B, H, n) float32. Query i is at position i.

    Queries from the tile's first key on up to `whole_from` are looked at: Late holds those of them that are `late` or
    more behind the key, Between all that are `near` to `far` behind it.
    """
    c0 = tl.program_id(0) % tiles * BC
    bh = tl.program_id(0) // tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    c = tl.arange(0, BC)
    i = tl.arange(0, BQ)
    d = tl.arange(0, D)
    inner = (d < DIM)[None, :]
    cols = c0 + c
    k_at = K + b * skb + (h // repeats).to(tl.int64) * skh + c0.to(tl.int64) * skn
    k = tl.load(k_at + c[:, None] * skn + d[None, :] * skd, mask=(cols < n)[:, None] & inner, other=0.0)  # [BC, D]
    q_base = Q + b * sqb + h.to(tl.int64) * sqh + i[:, None] * sqn + d[None, :] * sqd
    l_base = Lse + bh.to(tl.int64) * n + i
    last = tl.maximum(c0 + BC - 1 + late, c0 + BC + far)
    stop = tl.minimum(tl.cdiv(last, group) * group, n)
    if WINDOW:
        stop = tl.minimum(stop, c0 + BC - 1 + window)
    is_late = tl.zeros([BC], tl.float32)
    between = tl.zeros([BC], tl.float32)
    for r in tl.range(c0 + tl.minimum(late, near), stop, BQ):
        live = r + i < n
        q = tl.load(q_base + tl.cast(r, tl.int64) * sqn, mask=live[:, None] & inner, other=0.0)  # [BQ, D]
        ref = tl.load(l_base + r, mask=live, other=float("inf")) * LOG2E  # [BQ]
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BC, BQ]
        gap = (r + i)[None, :] - cols[:, None]
        seen = (gap >= 0) & (r + i < stop)[None, :]
        if WINDOW:
            seen = seen & (gap < window)
        w = tl.where(seen, tl.exp2(capped(qk, scale, cap, SOFTCAP) * LOG2E - ref[None, :]), 0.0)
        is_late += tl.sum(tl.where(gap >= late, w, 0.0), 1)
        between += tl.sum(tl.where((gap >= near) & (gap <= far), w, 0.0), 1)
    tl.store(Late + bh.to(tl.int64) * n + cols, is_late, mask=cols < n)
    tl.store(Between + bh.to(tl.int64) * n + cols, between, mask=cols < n)


@torch.library.custom_op("anchorscope::late_mass", mutates_args=())
def late_op(
    q: Tensor, k: Tensor, lse: Tensor, mass: Tensor, late: int, near: int, far: int, sizes: Sequence[int], scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `late_kernel`; the geometry is flat (`Geometry.flat`). See `late_mass`."""
    geo = Geometry.unflat(sizes, scale, cap)
    c = launch("column_mass", q.device, q.element_size(), geo.dim_pad)
    part, between = (q.new_empty(geo.batch, geo.heads, geo.queries, dtype=torch.float32) for _ in range(2))
    tiles = triton.cdiv(geo.queries, c["BC"])
    with torch.cuda.device_of(q):
        late_kernel[(tiles * geo.batch * geo.heads,)](
            q, k, lse, part, between, *q.stride(), *k.stride(),
            geo.queries, geo.window or 0, geo.heads, geo.repeats, geo.group, tiles, late, near, far, geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BC=c["BC"], BQ=c["BQ"], WINDOW=geo.window is not None, SOFTCAP=geo.cap > 0,
            PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    total, rest = _sums(mass, geo, c["BC"], max(late - 1, far))
    return total, part.double() + rest, between.double()


@late_op.register_fake
def _(q, k, lse, mass, late, near, far, sizes, scale, cap):
    geo = Geometry.unflat(sizes, scale, cap)
    shape = geo.batch, geo.heads, geo.queries
    total, late, between = (q.new_empty(*shape, dtype=torch.float64) for _ in range(3))
    return total, late, between


def _sums(mass: Tensor, geo: Geometry, tile: int, behind: int) -> tuple[Tensor, Tensor]:
    """(B, H, N) float64 sums of mass (B, H, groups, N) in the order of the groups: of all, and of those that
    `late_kernel` leaves out.
    """
    first = torch.arange(0, geo.queries, tile, device=mass.device) + tile + behind
    begin = torch.div(first + geo.group - 1, geo.group, rounding_mode="floor").repeat_interleave(tile)[: geo.queries]
    total, rest = mass.new_zeros(2, geo.batch, geo.heads, geo.queries, dtype=torch.float64)
    for g in range(geo.groups):
        stop = min((g + 1) * geo.group, geo.queries)  # later columns are not seen by the group
        part = mass[:, :, g, :stop]
        total[..., :stop] += part
        rest[..., :stop] += torch.where(begin[:stop] <= g, part, 0.0)
    return total, rest


def late_mass(
    q: Tensor, k: Tensor, lse: Tensor, mass: Tensor, late: int, between: tuple[int, int], **place: Unpack[Placement]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention mass of every column from late queries, of whole prompts (as many queries as keys).

    Args:
        q, k, lse, **place: as given to `column_mass`.
        mass: (B, H, groups, N) float32, from `column_mass`.
        late: distance from which on a query is late.
        between: (near, far) distances, both included.

    Returns:
        (B, H, N) float64 each: mass of column j from all queries, from those with i - j >= late, and from those with
        near <= i - j <= far.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    geo = checked(q, k, **place)
    if geo.queries != geo.keys:
        raise ValueError(f"late mass is of a whole prompt, not of {geo.queries} queries and {geo.keys} keys")
    if mass.shape != (geo.batch, geo.heads, geo.groups, geo.keys):
        raise ValueError(f"mass has shape {tuple(mass.shape)}, which is not that of these groups")
    return late_op(q, k, lse.contiguous(), mass, late, *between, *geo.flat())
