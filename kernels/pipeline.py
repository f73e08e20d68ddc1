"""The three stages in a row: anchor attention end to end, by the Triton kernels or in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

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
            SMALL_LIST bytes, and otherwise the number of stripes is read from the GPU once, the only synchronisation.
        backend: "triton" or "torch".

    Raises:
        ValueError: shapes or parameters that do not fit, an unknown back end.
    """
    place: dict[str, Any] = {
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
        from . import anchor, identify, sparse

        state = anchor.anchor(q, k, v, **place)
        room = capacity
        if room is None:
            most = identify.candidates(q.shape, k.shape[2], **place)
            room = most if most * 4 <= SMALL_LIST else None
        stripes = identify.identify(state, k, theta=theta, queries=q.shape[2], capacity=room, **place)
        out, lse = sparse.sparse(q, k, v, state, stripes, inplace=True, **place)
        overflow = None if capacity is None else stripes.offsets[-1] > capacity
        return Attention(out, lse, stripes, overflow)
    if backend == "torch":
        if capacity is not None:
            raise ValueError("capacity is an option of the triton back end")
        from . import torch_backend

        state = torch_backend.anchor(q, k, v, **place)
        stripes = torch_backend.identify(state, k, theta=theta, queries=q.shape[2], **place)
        out, lse = torch_backend.sparse(q, k, v, state, stripes, **place)
        return Attention(out, lse, stripes, None)
    raise ValueError(f"unknown back end {backend!r}; there are 'triton' and 'torch'")
