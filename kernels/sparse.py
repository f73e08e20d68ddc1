"""Stage 3: the softmax state of stage 1 continued over the stripes of each group, gathered key by key.

Each program owns a tile of BM queries of one head and iterates over its group's list of columns; every iteration
gathers BN scattered rows of K and V. Candidates lie before the group, so no causal mask is needed.
Source: Zhang et al., AnchorAttention (EMNLP 2025), step 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, LOG2E, accumulate, architecture, checked, launch, traced
from .geometry import Geometry, Placement
from .types import AnchorState, Stripes

if TYPE_CHECKING:
    from typing_extensions import Unpack


@triton.jit(
    do_not_specialize=[
        "n",
        "offset",
        "window",
        "heads",
        "repeats",
        "group",
        "groups",
        "tiles",
        "batch_heads",
        "capacity",
    ]
)
def sparse_kernel(
    Q, K, V, Out, Lse, Columns, Offsets,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sob, soh, son, sod,
    n, offset, window, heads, repeats, group, groups, tiles, batch_heads, capacity, scale, cap,
    DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles per group * B * H * groups,). Late groups, which have most stripes, come first.

    Updates Out (B, H, n, DIM) and Lse (B, H, n) in place. Columns, Offsets: see `types.Stripes`.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    bh = (pid // tiles) % batch_heads
    g = groups - 1 - pid // (tiles * batch_heads)
    row0 = g * group + tile * BM
    row_end = tl.minimum(g * group + group, n)
    at = bh.to(tl.int64) * groups + g
    begin = tl.minimum(tl.load(Offsets + at), capacity)
    count = (tl.minimum(tl.load(Offsets + at + 1), capacity) - begin).to(tl.int32)
    if (row0 >= row_end) | (count == 0):
        return
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    hk = h // repeats

    i = tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    rows = row0 + i
    live = rows < row_end
    inner = d < DIM
    q_at = Q + b * sqb + h.to(tl.int64) * sqh + row0.to(tl.int64) * sqn + i[:, None] * sqn + d[None, :] * sqd
    o_at = Out + b * sob + h.to(tl.int64) * soh + row0.to(tl.int64) * son + i[:, None] * son + d[None, :] * sod
    flat = bh.to(tl.int64) * n + rows
    q = tl.load(q_at, mask=live[:, None] & inner[None, :], other=0.0)  # [BM, D]
    k_base = K + b * skb + hk.to(tl.int64) * skh + d[None, :] * skd
    v_base = V + b * svb + hk.to(tl.int64) * svh + d[None, :] * svd

    # The state so far: a normalized output has running sum 1 at the reference LSE.
    lse = tl.load(Lse + flat, mask=live, other=0.0)  # [BM]
    row_max = lse * LOG2E
    row_sum = tl.where(row_max > float("-inf"), 1.0, 0.0)
    # acc: [BM, D]
    acc = tl.load(o_at, mask=live[:, None] & inner[None, :], other=0.0).to(tl.float32)

    listed = Columns + begin
    for it in tl.range(0, tl.cdiv(count, BN)):
        there = it * BN + c < count
        cols = tl.load(listed + it * BN + c, mask=there, other=0).to(tl.int64)  # [BN]
        # k and v: [BN, D]; beyond the end of the list key 0 is read, and masked below
        if D == DIM:
            k = tl.load(k_base + cols[:, None] * skn)
            v = tl.load(v_base + cols[:, None] * svn)
        else:
            k = tl.load(k_base + cols[:, None] * skn, mask=inner[None, :], other=0.0)
            v = tl.load(v_base + cols[:, None] * svn, mask=inner[None, :], other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if WINDOW:
            qk = tl.where((offset + rows)[:, None] - cols[None, :] < window, qk, float("-inf"))
        qk = tl.where(there[None, :], qk, float("-inf"))
        # Only a window can leave a query without any key so far.
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP, True, True, False, PRECISION
        )

    tl.store(Lse + flat, tl.where(row_sum > 0, (row_max + tl.log2(row_sum)) * LN2, float("-inf")), mask=live)
    acc = acc * (1.0 / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
    tl.store(o_at, acc.to(Out.dtype.element_ty), mask=live[:, None] & inner[None, :])


def _launch(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, offsets: Tensor, geo: Geometry
) -> None:  # fmt: skip
    if columns.numel() == 0:
        return
    if architecture(q.device) == "sm90":
        try:
            from . import sparse_hopper
        except ImportError:  # Gluon came with Triton 3.4, the portable kernel does the same
            pass
        else:
            if sparse_hopper.suits(out, lse, q, k, v, geo):
                sparse_hopper.sparse_hopper(out, lse, q, k, v, columns, offsets, geo)
                return
    portable(out, lse, q, k, v, columns, offsets, geo)


def portable(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, offsets: Tensor, geo: Geometry
) -> None:  # fmt: skip
    """Launch `sparse_kernel`, which runs on every architecture."""
    c = launch("sparse", q.device, q.element_size(), geo.dim_pad)
    bm = min(c["BM"], max(16, triton.next_power_of_2(geo.group)))
    tiles = triton.cdiv(geo.group, bm)
    with torch.cuda.device_of(q):
        sparse_kernel[(tiles * geo.batch * geo.heads * geo.groups,)](
            q, k, v, out, lse, columns, offsets,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            geo.queries, geo.offset, geo.window or 0, geo.heads, geo.repeats, geo.group, geo.groups, tiles,
            geo.batch * geo.heads, columns.numel(), geo.scale, geo.cap,
            DIM=geo.dim, D=geo.dim_pad, BM=bm, BN=c["BN"], WINDOW=geo.window is not None, SOFTCAP=geo.cap > 0,
            PRECISION="ieee", num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip


@torch.library.custom_op("anchorscope::sparse_", mutates_args=("out", "lse"))
def sparse_op(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, offsets: Tensor, sizes: Sequence[int],
    scale: float, cap: float,
) -> None:  # fmt: skip
    """Continue `out` (B, H, n, d) and `lse` (B, H, n) in place, for torch.compile and autograd; see `sparse`."""
    _launch(out, lse, q, k, v, columns, offsets, Geometry.unflat(sizes, scale, cap))


@sparse_op.register_fake
def _(out, lse, q, k, v, columns, offsets, sizes, scale, cap):
    return None


def sparse_at(
    q: Tensor, k: Tensor, v: Tensor, state: AnchorState, stripes: Stripes, geo: Geometry, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """`sparse` for a call that is checked already (`common.checked`)."""
    rows = geo.batch * geo.heads * geo.groups
    if stripes.offsets.numel() != rows + 1:
        raise ValueError(
            f"stripes list {stripes.offsets.numel() - 1} rows, but the call has {rows} (batch x heads x groups)"
        )
    out, lse = (state.out, state.lse) if inplace else (state.out.clone(), state.lse.clone())
    if traced(q, k, v):
        sparse_op(out, lse, q, k, v, stripes.columns, stripes.offsets, *geo.flat())
    else:
        _launch(out, lse, q, k, v, stripes.columns, stripes.offsets, geo)
    return out, lse


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AnchorState,
    stripes: Stripes,
    *,
    inplace: bool = False,
    **place: Unpack[Placement],
) -> tuple[Tensor, Tensor]:
    """Exact attention of every query over its anchor region and its group's stripes.

    Args:
        q, k, v: as given to `anchor`.
        state: what `anchor` returned.
        stripes: what `identify` returned (with any capacity; columns beyond it are left out).
        inplace: overwrite `state.out` and `state.lse` and return them, which saves a copy of the output.
        **place: as given to `anchor`; the stripes imply `init` and `lookback`.

    Returns:
        Output (B, H, n, d) in the dtype of `state.out`, and LSE over the kept keys (B, H, n) float32 in nats.

    Raises:
        ValueError: shapes or parameters that do not fit.
    """
    return sparse_at(q, k, v, state, stripes, checked(q, k, v, **place), inplace=inplace)
