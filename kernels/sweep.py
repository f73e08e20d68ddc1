"""The stripes of every theta in one pass: LSE over the kept keys, and the output's distance from dense attention.

Columns are sorted by the first theta that selects them (`bin_columns`), so the softmax state after bin t is that of
thetas[t]. For as many heads as memory allows (one kv head at a time is plenty to fill a GPU), the exact profile is:

    state = anchor(q, k, v, precise=True, **place)
    out, lse = dense_lse(q, k, v, **place)                     # full causal attention
    margin = margins(state, k, queries=n, **place)             # (B, H, groups, N)
    mass = column_mass(q, k, lse, **place)                     # (B, H, groups, N)
    columns, bins = bin_columns(margin, thetas)
    result = sweep(q, k, v, state, out, columns, bins, thetas=len(thetas), **place)

Each function's memory is its result, so callers bound it by the number of heads they pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, accumulate, checked, launch
from .geometry import Geometry, Placement
from .types import AnchorState

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    """The grid is that of `sparse_kernel`. Lse: (B, H, T, n); Sums: (B * H, groups * tiles, T, 3) float32.

    OutA, LseA: attention over the anchor region; OutD: dense attention. Sums are those of `Sweep`, one row a tile.
    """
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
    q = tl.load(q_at, mask=part, other=0.0)  # [BM, D]
    k_base = K + b * skb + hk * skh + d[None, :] * skd
    v_base = V + b * svb + hk * svh + d[None, :] * svd
    flat = bh.to(tl.int64) * n + rows
    # A normalized output has running sum 1 at its LSE.
    row_max = tl.load(LseA + flat, mask=live, other=0.0) * LOG2E  # [BM]
    row_sum = tl.where(row_max > float("-inf"), 1.0, 0.0)
    if HAS_V:
        acc = tl.load(OutA + flat[:, None] * DIM + d[None, :], mask=part, other=0.0)  # [BM, D]
    else:
        acc = row_sum
    edges = Bins + (bh.to(tl.int64) * groups + g) * thetas
    # The groups of all heads lie one after the other in Columns; bins are closed above by the next one's start.
    at = tl.load(edges)
    for t in tl.range(0, thetas):
        end = tl.load(edges + t + 1)
        for j in tl.range(0, (end - at).to(tl.int32), BN):
            there = j + c < end - at
            cols = tl.load(Columns + at + j + c, mask=there, other=0).to(tl.int64)  # [BN]
            # k and v: [BN, D]
            k = tl.load(k_base + cols[:, None] * skn, mask=there[:, None] & inner[None, :], other=0.0)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
            seen = there[None, :] & (rows >= 0)[:, None]
            if WINDOW:
                seen = seen & ((offset + rows)[:, None] - cols[None, :] < window)
            qk = tl.where(seen, qk, float("-inf"))
            v = k
            if HAS_V:
                v = tl.load(v_base + cols[:, None] * svn, mask=there[:, None] & inner[None, :], other=0.0)
            acc, row_sum, row_max = accumulate(
                acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, True, HAS_V, SPLIT, PRECISION
            )
        at = end
        lse = tl.where(row_sum > 0, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
        tl.store(Lse + (bh.to(tl.int64) * thetas + t) * n + rows, lse, mask=live)
        if HAS_V:
            dense = tl.load(OutD + flat[:, None] * DIM + d[None, :], mask=part, other=0.0)  # [BM, D]
            off = tl.where(part, acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None] - dense, float("inf"))
            to = Sums + ((bh.to(tl.int64) * groups * tiles + g * tiles + tile) * thetas + t) * 3
            tl.store(to, tl.sum(tl.sum(tl.where(part, off * off, 0.0), 1), 0))
            tl.store(to + 1, tl.sum(tl.sum(tl.where(tl.abs(off) < 0.01, 1.0, 0.0), 1), 0))
            tl.store(to + 2, tl.sum(tl.sum(tl.where(tl.abs(off) < 0.005, 1.0, 0.0), 1), 0))


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
    bins: Tensor, thetas: int, sizes: Sequence[int], scale: float, cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch `sweep_kernel`: LSE (B, H, T, n) and sums (B, H, T, 3) float64; see `sweep`."""
    geo = Geometry.unflat(sizes, scale, cap)
    c = launch("sweep", q.device, q.element_size(), geo.dim_pad)
    bm = min(c["BM"], max(16, triton.next_power_of_2(geo.group)))
    tiles = triton.cdiv(geo.group, bm)
    lse = q.new_empty(geo.batch, geo.heads, thetas, geo.queries, dtype=torch.float32)
    parts = geo.groups * tiles if v is not None else 0
    sums = q.new_zeros(geo.batch, geo.heads, parts, thetas, 3, dtype=torch.float32)
    keys_v = k if v is None else v
    with torch.cuda.device_of(q):
        sweep_kernel[(tiles * geo.batch * geo.heads * geo.groups,)](
            q, k, keys_v, out_anchor, lse_anchor, out_dense, columns, bins, lse, sums,
            *q.stride(), *k.stride(), *keys_v.stride(),
            geo.queries, geo.offset, geo.window or 0, geo.heads, geo.repeats, geo.group, geo.groups, tiles,
            geo.batch * geo.heads, thetas, geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BM=bm, BN=c["BN"], HAS_V=v is not None, WINDOW=geo.window is not None,
            SOFTCAP=geo.cap > 0, SPLIT=q.dtype != torch.float32, PRECISION="ieee",
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    # One head after the other: how torch adds up several at once depends on their number.
    total = torch.stack([part.double().sum(0) for part in sums.flatten(0, 1)])
    return lse, total.view(geo.batch, geo.heads, thetas, 3)


@sweep_op.register_fake
def _(q, k, v, out_anchor, lse_anchor, out_dense, columns, bins, thetas, sizes, scale, cap):
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
    **place: Unpack[Placement],
) -> Sweep:
    """LSE over the kept keys of every query at every theta, and each theta's output error sums, in one pass over the
    stripes.

    Args:
        q, k, v: as given to `anchor`; `v` may be None.
        state: from `anchor(..., precise=True)`.
        out_dense: (B, H, n, d) float32 from `dense_lse`, needed with `v`.
        columns, bin_offsets: from `bin_columns`.
        thetas: T, the number of thetas given to `bin_columns`.
        **place: as given to `anchor`.

    Returns:
        Sweep(lse (B, H, T, n), squares, close_01, close_005 (B, H, T)). The recall of a query at a theta is
        exp(lse - dense LSE).

    Raises:
        ValueError: shapes or parameters that do not fit.
    """
    geo = checked(q, k, v, **place)
    entries = geo.batch * geo.heads * geo.groups * thetas + 1
    if bin_offsets.numel() != entries:
        raise ValueError(
            f"bin_offsets has {bin_offsets.numel()} entries, but batch x heads x groups x thetas + 1 is {entries}"
        )
    if v is not None and (out_dense is None or out_dense.dtype != torch.float32 or out_dense.shape != q.shape):
        raise ValueError("with v, out_dense must be the float32 output of dense_lse")
    if v is not None and state.out.dtype != torch.float32:
        raise ValueError("with v, the anchor state must come from anchor(..., precise=True)")
    lse, sums = sweep_op(
        q, k, v, state.out.contiguous(), state.lse.contiguous(),
        state.lse if out_dense is None else out_dense.contiguous(), columns, bin_offsets, thetas, *geo.flat(),
    )  # fmt: skip
    if v is None:
        sums = sums[:, :, :0]
    return Sweep(lse, sums[..., 0], sums[..., 1].long(), sums[..., 2].long())
