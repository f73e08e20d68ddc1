"""The specification in float64: brute force, N x N masks, plain torch. Slow on purpose; every fast path is tested
against it.

Layout as in the kernels: `q` (B, H, n, d), `k` and `v` (B, Hkv, N, d). The n queries are the last n of the N
positions, or start at `offset` (absolute position of the first query; N - n by default). Query head h reads kv head h
// (H // Hkv). Groups start at the first query. Source: Zhang et al., AnchorAttention (EMNLP 2025), section 3, with the
exact partition of docs/method.md: anchor region, candidates and later keys are disjoint and cover everything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .geometry import Geometry, Placement
from .geometry import geometry as sizes

if TYPE_CHECKING:
    from typing_extensions import Unpack


def geometry(q: Tensor, k: Tensor, **place: Unpack[Placement]) -> Geometry:
    """The geometry of one call."""
    return sizes(q.shape, k.shape, **place)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, N, d) -> (B, H, N, d): kv head of query head h is h // (H // Hkv)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def scores(q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Scores in nats, (B, H, n, N) float64, no mask: scale * q.k, then c * tanh(s / c) with a soft-cap c."""
    s = scale * q.double() @ repeat_kv(k.double(), q.shape[1]).mT
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def visible_mask(geo: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """(n, N) bool: j <= i and, with a window, i - j < window."""
    i = torch.arange(geo.queries, device=device)[:, None] + geo.offset
    j = torch.arange(geo.keys, device=device)[None, :]
    mask = j <= i
    return mask if geo.window is None else mask & (i - j < geo.window)


def anchor_mask(geo: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """(n, N) bool: the visible part of A(i) = {j <= i : j < init or j >= G(g) - lookback}."""
    row = torch.arange(geo.queries, device=device)[:, None]
    start = row // geo.group * geo.group + geo.offset
    j = torch.arange(geo.keys, device=device)[None, :]
    return visible_mask(geo, device) & ((j < geo.init) | (j >= start - geo.lookback))


def candidate_mask(geo: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """(groups, N) bool: C(g) = {j : init <= j < G(g) - lookback}, whatever the window."""
    start = torch.arange(geo.groups, device=device)[:, None] * geo.group + geo.offset
    j = torch.arange(geo.keys, device=device)[None, :]
    return (j >= geo.init) & (j < start - geo.lookback)


def pooled(q: Tensor, s: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Mean query (B, H, blocks, d) and mean anchor (B, H, blocks) of each block, float64.

    The anchor of a query is its largest score over its anchor region; `s` are the scores of `scores`.
    """
    anchors = s.masked_fill(~anchor_mask(geo, s.device), -math.inf).amax(-1)
    q_bar = torch.stack([b.mean(-2) for b in q.double().split(geo.block, dim=-2)], -2)
    a_bar = torch.stack([b.mean(-1) for b in anchors.split(geo.block, dim=-1)], -1)
    return q_bar, a_bar


def margins(q: Tensor, k: Tensor, geo: Geometry) -> Tensor:
    """Margin of every column, (B, H, groups, N) float64; +inf where the column is no candidate or no block sees it.

    delta(t, j) = mean anchor of block t - score of the block's mean query with key j; the margin is the minimum over
    the group's blocks that see j (with a window: blocks whose first query t0 has t0 - j < window).
    """
    q_bar, a_bar = pooled(q, scores(q, k, scale=geo.scale, softcap=geo.softcap), geo)
    delta = a_bar[..., None] - scores(q_bar, k, scale=geo.scale, softcap=geo.softcap)
    if geo.window is not None:
        first = torch.arange(geo.blocks, device=q.device)[:, None] * geo.block + geo.offset
        j = torch.arange(geo.keys, device=q.device)[None, :]
        delta = delta.masked_fill(first - j >= geo.window, math.inf)
    out = torch.stack([b.amin(-2) for b in delta.split(geo.step, dim=-2)], -2)
    return out.masked_fill(~candidate_mask(geo, q.device), math.inf)


def keep_mask(margin: Tensor, theta: float | Tensor, geo: Geometry) -> Tensor:
    """(B, H, n, N) bool: anchor region plus the stripes of the query's group (margin <= theta).

    `theta` is a number or a (B, H) tensor, in nats; +inf keeps everything visible, -inf the anchor region alone.
    """
    limit = torch.as_tensor(theta, dtype=torch.float64, device=margin.device)
    limit = limit[..., None, None] if limit.ndim else limit
    stripes = (margin <= limit) & candidate_mask(geo, margin.device)
    rows = torch.arange(geo.queries, device=margin.device) // geo.group
    return visible_mask(geo, margin.device) & (anchor_mask(geo, margin.device) | stripes[:, :, rows])


def masked_attention(s: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exact softmax over the kept keys: output (B, H, n, d) and LSE (B, H, n), float64."""
    s = s.masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    return torch.exp(s - lse[..., None]) @ repeat_kv(v.double(), s.shape[1]), lse


def anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, *, theta: float | Tensor = 12.0, **place: Unpack[Placement]
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor attention end to end: output (B, H, n, d), LSE over the kept keys (B, H, n), kept mask (B, H, n, N)."""
    geo = geometry(q, k, **place)
    mask = keep_mask(margins(q, k, geo), theta, geo)
    out, lse = masked_attention(scores(q, k, scale=geo.scale, softcap=geo.softcap), v, mask)
    return out, lse, mask


def recall_rows(s: Tensor, mask: Tensor, geo: Geometry) -> Tensor:
    """Attention mass kept per query, (B, H, n) float64: exp(LSE_kept - LSE_all)."""
    visible = visible_mask(geo, s.device)
    kept = s.masked_fill(~(mask & visible), -math.inf).logsumexp(-1)
    return torch.exp(kept - s.masked_fill(~visible, -math.inf).logsumexp(-1))
