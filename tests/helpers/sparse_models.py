"""Models run sparse by brute force: the specification in float64, inside any model whose attention can be diverted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.kernels import reference
from anchorscope.models import AttentionCall, intercept, prefill
from anchorscope.models.calls import AttentionInputs, Own
from anchorscope.models.hook import _beneath, _interfaces, divert
from anchorscope.params import AnchorParams

SMALL = AnchorParams(8, 2, 4, 4)  # groups of 16 queries: five in the 80 tokens of the tiny models' prompt


def layer_heads(model: Any) -> dict[int, int]:
    """Query heads of every layer that makes attention calls."""
    heads: dict[int, int] = {}

    def note(call: AttentionCall) -> None:
        assert call.layer is not None
        heads[call.layer] = call.q.shape[1]

    with intercept(model, note):
        prefill(model, (1, 2))
    return heads


def everywhere(model: Any, theta: float | Sequence[float | None], params: AnchorParams = SMALL) -> AnchorConfig:
    """One theta for every head of every layer, or one per head."""
    thetas = {
        i: (theta,) * h if isinstance(theta, (int, float)) else tuple(theta) for i, h in layer_heads(model).items()
    }
    return AnchorConfig(tuple(LayerAnchors(i, params, t) for i, t in sorted(thetas.items())))


@contextlib.contextmanager
def brute_force(model: Any, config: AnchorConfig) -> Iterator[None]:
    """Every prefill call of the layers in `config` by docs/method.md, with N x N masks in float64."""

    def attend(call: AttentionInputs, own: Own) -> Any:
        assert call.layer is not None
        anchors = config[call.layer]
        if anchors is None or call.q.shape[2] == 1:
            return own(call.q, call.k, call.v)
        p = anchors.params
        theta = torch.tensor([[torch.inf if t is None else t for t in anchors.thetas]], dtype=torch.float64)
        out = reference.anchor_attention(
            call.q,
            call.k,
            call.v,
            theta=theta.expand(len(call.q), -1).to(call.q.device),
            block=p.block,
            step=p.step,
            init=p.init,
            lookback=p.lookback,
            scale=call.scale,
            window=None if call.mask is None else call.options.get("sliding_window"),
            softcap=call.softcap,
        )[0]
        return out.to(call.q.dtype).transpose(1, 2).contiguous(), None

    with divert(model, attend):
        yield


def unregister(name: str) -> None:
    """Take an attention implementation back that `register_attention` gave."""
    for interface in _interfaces():
        interface._global_mapping.pop(name, None)
    _beneath.pop(name, None)


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL of the next-token distributions from the second to the first, per position, nats, float64."""
    p, q = (x.double().log_softmax(-1) for x in (theirs, ours))
    return (p.exp() * (p - q)).sum(-1)
