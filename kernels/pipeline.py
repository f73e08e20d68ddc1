"""The three stages in a row: anchor attention end to end, by the Triton kernels or in plain torch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .geometry import Geometry, Placement, geometry
from .types import Stripes

SMALL_LIST = 512 * 2**20  # bytes


class Attention(NamedTuple):
    """Result of `anchor_attention`.

    Attributes:
        out: (B, H, n, d) in the dtype of the queries.
        lse: (B, H, n) float32, over the kept keys, nats.
        stripes: the selection.
        overflow: () bool, whether the given capacity was too small, so that columns were left out; None without one.
    """

    out: Tensor
    lse: Tensor
    stripes: Stripes
    overflow: Tensor | None


def anchor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float | Tensor = 12.0,
    block: int = 128,
    step: int = 16,
    init: int | None = None,
    lookback: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    capacity: int | None = None,
    backend: str = "triton",
) -> Attention:
    """Anchor attention: the anchor region of every query plus its group's stripes, exact softmax.

    Args:
        q: (B, H, n, d); k, v: (B, Hkv, N, d), not repeated. All other parameters as in `anchor` and `identify`.
        theta: nats, a number or a (B, H) tensor; +inf is dense causal attention, -inf the anchor region alone.
        capacity: room for stripes (triton only). Without it there is room for all candidates where that takes at most
            SMALL_LIST bytes, and otherwise the number of stripes is read from the GPU once, the only synchronization.
        backend: "triton" or "torch".

    Raises:
        ValueError: shapes or parameters that do not fit, an unknown back end.
    """
    place: Placement = {
        "block": block,
        "step": step,
        "init": init,
        "lookback": lookback,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "offset": offset,
    }
    if backend == "triton":
        from .common import checked

        return _triton(q, k, v, checked(q, k, v, **place), theta, capacity)
    if backend == "torch":
        if capacity is not None:
            raise ValueError("capacity is an option of the triton back end")
        from .torch_backend import attention_at

        return Attention(*attention_at(q, k, v, geometry(q.shape, k.shape, **place), theta), None)
    raise ValueError(f"unknown back end {backend!r}; there are 'triton' and 'torch'")


def _triton(q: Tensor, k: Tensor, v: Tensor, geo: Geometry, theta: float | Tensor, capacity: int | None) -> Attention:
    """The kernels in a row; the output of the anchor region is continued in place."""
    from .anchor import anchor_at
    from .identify import identify_at
    from .sparse import sparse_at

    state = anchor_at(q, k, v, geo)
    room = capacity
    if room is None:
        room = geo.most_stripes if geo.most_stripes * 4 <= SMALL_LIST else None
    stripes = identify_at(state, k, geo, theta=theta, capacity=room)
    out, lse = sparse_at(q, k, v, state, stripes, geo, inplace=True)
    overflow = None if capacity is None else stripes.offsets[-1] > capacity
    return Attention(out, lse, stripes, overflow)
