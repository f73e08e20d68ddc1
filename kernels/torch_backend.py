"""Anchor attention in plain torch: any device, exact, memory-bounded. The back end where Triton cannot run.

The three stages have the signatures of the Triton kernels. Sums are float32 (float64 for float64 inputs), pooled
queries are not rounded, K and V are never repeated, and no tensor has n x N elements: scores exist for one chunk of
rows of one kv head at a time.

Layout: `q` (B, H, n, d), `k` and `v` (B, Hkv, N, d), any strides; query head h reads kv head h // (H // Hkv). The n
queries are the last of the N positions, or start at the absolute position `offset`; groups start at the first query.
Source: Zhang et al., AnchorAttention (EMNLP 2025), section 3, with the partition of docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .geometry import Geometry, Placement, geometry
from .types import AnchorState, Stripes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CHUNK_SCORES = {
    "cpu": 1 << 19,
    "cuda": 1 << 26,
}  # elements: a CPU wants them in cache, a GPU wants large products


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores under the soft-cap c, c * tanh(s / c), nats; changed in place."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _chunks(first: int, last: int, scores: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Split [first, last) so that one chunk has a bounded number of scores (`scores` per element)."""
    size = max(1, _CHUNK_SCORES.get(device.type, _CHUNK_SCORES["cuda"]) // max(scores, 1))
    for low in range(first, last, size):
        yield low, min(low + size, last)


def anchor(q: Tensor, k: Tensor, v: Tensor, **place: Unpack[Placement]) -> AnchorState:
    """Exact softmax over A(i) = {j <= i : j < init or j >= G(g) - lookback}, and the pooled anchors.

    Args:
        q: (B, H, n, d) queries; `k`, `v`: (B, Hkv, N, d). bf16, fp16, float32 or float64.
        **place: see `Placement`.

    Returns:
        AnchorState, all of it float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or parameters that do not fit (see `geometry`).
    """
    return anchor_at(q, k, v, geometry(q.shape, k.shape, **place))


def anchor_at(q: Tensor, k: Tensor, v: Tensor, geo: Geometry) -> AnchorState:
    """`anchor` for a call whose geometry is known."""
    dtype = _working_dtype(q)
    out = torch.empty(q.shape[:3] + v.shape[3:], dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    anchors = torch.empty_like(lse)
    for b in range(geo.batch):
        for kv in range(geo.kv_heads):
            heads = slice(kv * geo.repeats, (kv + 1) * geo.repeats)
            keys, values = k[b, kv].to(dtype), v[b, kv].to(dtype)
            for g in range(geo.groups):
                first, last = geo.rows(g)
                init, local = geo.anchor_keys(g, last)
                near = values[local] if init.start == init.stop else torch.cat([values[init], values[local]])
                for low, high in _chunks(first, last, geo.repeats * len(near), q.device):
                    rows = q[b, heads, low:high].to(dtype) * geo.scale  # (R, rows, d)
                    s, _ = anchor_scores(rows, keys.T, geo, g, low)  # (R, rows, A)
                    row_max = s.amax(-1, keepdim=True)
                    p = s.sub_(row_max).exp_()
                    row_sum = p.sum(-1, keepdim=True)
                    o = (p.flatten(0, 1) @ near[: s.shape[-1]]).view(geo.repeats, high - low, -1)
                    out[b, heads, low:high] = o / row_sum
                    lse[b, heads, low:high] = (row_max + row_sum.log())[..., 0]
                    anchors[b, heads, low:high] = row_max[..., 0]
    return AnchorState(out, lse, block_means(q, geo.block, -2, dtype), block_means(anchors, geo.block, -1))


def anchor_scores(q: Tensor, keys: Tensor, geo: Geometry, group: int, first: int) -> tuple[Tensor, Tensor]:
    """Scores of some queries of a group over the anchor region, -inf where a key is hidden, and the keys' positions.

    Args:
        q: (..., rows, d) scaled queries, the first of which is query `first` of the call.
        keys: (d, N) keys of their kv head.

    Returns:
        Scores (..., rows, A) and positions (A,): the first keys of the region, then those up to the last query itself.
    """
    rows = q.shape[-2]
    flat = q.flatten(0, -2)  # (R * rows, d): one product for all heads
    init, local = geo.anchor_keys(group, first + rows)
    s = flat @ keys[:, local]
    at = torch.arange(local.start, local.stop, device=q.device)
    if init.stop > init.start:
        s = torch.cat([flat @ keys[:, init], s], 1)
        at = torch.cat([torch.arange(init.start, init.stop, device=q.device), at])
    s = capped(s, geo.softcap).view(*q.shape[:-1], -1)
    i = torch.arange(first, first + rows, device=q.device)[:, None] + geo.offset
    # Only keys from the first query on can be later than a query.
    s[..., s.shape[-1] - rows :].masked_fill_(i < i.T, -math.inf)
    if geo.window is not None:
        s.masked_fill_(at <= i - geo.window, -math.inf)
    return s, at


def block_means(x: Tensor, block: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Means of runs of `block` entries along a dimension, in `dtype` if given; the last run may be short."""
    return torch.stack([part.to(dtype or x.dtype).mean(dim) for part in x.split(block, dim)], dim)


def margins(q_bar: Tensor, a_bar: Tensor, keys: Tensor, geo: Geometry, group: int, columns: tuple[int, int]) -> Tensor:
    """Margins of some candidate columns of a group: the least difference over the group's blocks that see the column.

    Args:
        q_bar: (..., T, d) scaled mean queries of the group's blocks.
        a_bar: (..., T) their mean anchors, nats.
        keys: (d, N) keys of their kv head.
        columns: the first column and the one past the last.

    Returns:
        (..., columns), nats. Some block sees every candidate (`Geometry.candidates`), so all are finite.
    """
    low, high = columns
    s = capped(q_bar.flatten(0, -2) @ keys[:, low:high], geo.softcap).view(*a_bar.shape, high - low)
    delta = a_bar[..., None] - s
    if geo.window is not None:
        first = geo.offset + group * geo.group
        t0 = torch.arange(a_bar.shape[-1], device=s.device)[:, None] * geo.block + first
        delta.masked_fill_(t0 - torch.arange(low, high, device=s.device) >= geo.window, math.inf)
    return delta.amin(-2)


def identify(
    state: AnchorState, k: Tensor, *, theta: float | Tensor, queries: int, **place: Unpack[Placement]
) -> Stripes:
    """Stripes of every group: the candidate columns whose margin is at most theta.

    The margin is the least difference a_bar - score(q_bar, k_j) over the group's blocks that see column j.

    Args:
        state: what `anchor` returned for the same arguments.
        k: (B, Hkv, N, d).
        theta: nats; a number or a (B, H) tensor. +inf selects every visible candidate, -inf none.
        queries: n, the number of queries behind `state`.
        **place: as given to `anchor`.

    Returns:
        Stripes. With a window, a column that no query of the group sees is never selected.

    Raises:
        ValueError: theta is NaN or has the wrong shape, or shapes do not fit.
    """
    batch, heads, blocks, d = state.q_bar.shape
    geo = geometry((batch, heads, queries, d), k.shape, **place)
    if blocks != geo.blocks:
        raise ValueError(f"state has {blocks} blocks but {queries} queries in blocks of {geo.block} make {geo.blocks}")
    return identify_at(state, k, geo, theta)


def identify_at(state: AnchorState, k: Tensor, geo: Geometry, theta: float | Tensor) -> Stripes:
    """`identify` for a call whose geometry is known."""
    batch, heads, blocks, _ = state.q_bar.shape
    device = k.device
    limit = torch.as_tensor(theta, dtype=state.a_bar.dtype, device=device)
    if limit.ndim and limit.shape != (batch, heads):
        raise ValueError(f"theta must be a number or have shape {(batch, heads)}, not {tuple(limit.shape)}")
    if bool(limit.isnan().any()):
        raise ValueError("theta must not be NaN")
    limit = limit.expand(batch, heads)
    found: list[list[Tensor]] = [[] for _ in range(batch * heads)]  # per (b, h): one tensor per group
    for b in range(batch):
        for kv in range(geo.kv_heads):
            own = slice(kv * geo.repeats, (kv + 1) * geo.repeats)
            keys = k[b, kv].to(state.q_bar.dtype).T
            pooled, anchors, most = state.q_bar[b, own] * geo.scale, state.a_bar[b, own], limit[b, own, None]
            for g in range(geo.groups):
                span = slice(g * geo.step, min((g + 1) * geo.step, blocks))
                q_bar, a_bar = pooled[:, span], anchors[:, span]  # (R, blocks of the group, d), and without d
                parts: list[list[Tensor]] = [[] for _ in range(geo.repeats)]
                for low, high in _chunks(*geo.candidates(g), a_bar.numel(), device):
                    keep = margins(q_bar, a_bar, keys, geo, g, (low, high)) <= most
                    for part, row in zip(parts, keep, strict=True):
                        part.append(row.nonzero()[:, 0] + low)
                for r, part in enumerate(parts):
                    joined = torch.cat(part) if part else torch.empty(0, dtype=torch.int64, device=device)
                    found[b * heads + kv * geo.repeats + r].append(joined.int())
    lists = [x for row in found for x in row]
    counts = torch.tensor([len(x) for x in lists], dtype=torch.int64)
    offsets = torch.zeros(len(lists) + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    return Stripes(torch.cat(lists), offsets.to(device), counts.int().view(batch, heads, geo.groups).to(device))


def sparse(
    q: Tensor, k: Tensor, v: Tensor, state: AnchorState, stripes: Stripes, **place: Unpack[Placement]
) -> tuple[Tensor, Tensor]:
    """Continue the softmax of `state` over the stripes of each group: exact attention over everything kept.

    Returns:
        out (B, H, n, d) in the dtype of `q`, and the LSE over the kept keys (B, H, n), float32 (float64 for float64
        inputs).

    Raises:
        ValueError: shapes or parameters that do not fit (see `geometry`).
    """
    return sparse_at(q, k, v, state, stripes, geometry(q.shape, k.shape, **place))


def sparse_at(
    q: Tensor, k: Tensor, v: Tensor, state: AnchorState, stripes: Stripes, geo: Geometry
) -> tuple[Tensor, Tensor]:
    """`sparse` for a call whose geometry is known."""
    scale, softcap, window = geo.scale, geo.softcap, geo.window
    if stripes.counts.shape != (geo.batch, geo.heads, geo.groups):
        expected = (geo.batch, geo.heads, geo.groups)
        raise ValueError(f"stripes are for (B, H, groups) {tuple(stripes.counts.shape)}, the queries make {expected}")
    dtype = state.lse.dtype
    out = torch.empty(q.shape[:3] + v.shape[3:], dtype=q.dtype, device=q.device)
    lse = torch.empty_like(state.lse)
    ends = stripes.offsets.tolist()
    for b in range(geo.batch):
        for h in range(geo.heads):
            keys, values = k[b, h // geo.repeats], v[b, h // geo.repeats]
            for g in range(geo.groups):
                first, last = geo.rows(g)
                row = (b * geo.heads + h) * geo.groups + g
                columns = stripes.columns[ends[row] : ends[row + 1]]
                if not len(columns):
                    out[b, h, first:last] = state.out[b, h, first:last].to(q.dtype)
                    lse[b, h, first:last] = state.lse[b, h, first:last]
                    continue
                stripe_k, stripe_v = (x.index_select(0, columns).to(dtype) for x in (keys, values))
                for low, high in _chunks(first, last, len(columns), q.device):
                    s = capped((q[b, h, low:high].to(dtype) * scale) @ stripe_k.T, softcap)
                    if window is not None:
                        i = torch.arange(low, high, device=q.device)[:, None] + geo.offset
                        s.masked_fill_(i - columns >= window, -math.inf)
                    before = state.lse[b, h, low:high, None]
                    row_max = torch.maximum(s.amax(-1, keepdim=True), before)
                    weight = (before - row_max).exp_()  # of everything in the anchor region
                    p = s.sub_(row_max).exp_()
                    row_sum = p.sum(-1, keepdim=True) + weight
                    o = (p @ stripe_v + weight * state.out[b, h, low:high].to(dtype)) / row_sum
                    out[b, h, low:high] = o.to(q.dtype)
                    lse[b, h, low:high] = (row_max + row_sum.log())[:, 0]
    return out, lse


def anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, *, theta: float | Tensor = 12.0, **place: Unpack[Placement]
) -> tuple[Tensor, Tensor]:
    """The three stages in a row: exact causal attention over the anchor region and the stripes of each group.

    Args: as in `anchor` and `identify`. theta = +inf is dense causal attention, -inf the anchor region alone.

    Returns:
        out (B, H, n, d) in the dtype of `q`, LSE over the kept keys (B, H, n) float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or parameters that do not fit.
    """
    return attention_at(q, k, v, geometry(q.shape, k.shape, **place), theta)[:2]


def attention_at(
    q: Tensor, k: Tensor, v: Tensor, geo: Geometry, theta: float | Tensor
) -> tuple[Tensor, Tensor, Stripes]:
    """`anchor_attention` for a call whose geometry is known, with the selection."""
    state = anchor_at(q, k, v, geo)
    stripes = identify_at(state, k, geo, theta)
    return (*sparse_at(q, k, v, state, stripes, geo), stripes)
