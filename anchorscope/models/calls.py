"""One attention call of a transformers model: what a layer hands over, and what the call says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer hands to its attention function.

    Attributes:
        module: the attention module.
        layer: its `layer_idx`, or None.
        implementation: the attention the model chose ("sdpa", "eager", "flash_attention_2", ...).
        q: (B, H, n, d) after rotary embedding and norms.
        k: (B, Hkv, m, d): all keys so far; the last n belong to these queries. A cache of a window layer may crop
            older ones.
        v: (B, Hkv, m, dv).
        mask: what the mask function built: None, a boolean or additive tensor (B or 1, 1 or H, n, m), or another
            object.
        scale: softmax scale.
        options: the remaining keyword arguments (`sliding_window`, `softcap`, `s_aux`, ...).
    """

    module: nn.Module
    layer: int | None
    implementation: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    scale: float
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The attention module's class and layer, for messages."""
        return f"{type(self.module).__name__} of layer {'?' if self.layer is None else self.layer}"

    @property
    def mask_tensor(self) -> Tensor | None:
        """The mask where it is a tensor (B or 1, 1 or H, n, m); FlashAttention's and other objects are none."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 4 else None

    @property
    def window(self) -> int | None:
        """The sliding window among the options, or None; an implementation that takes masks does not heed it."""
        window = self.options.get("sliding_window")
        return int(window) if window else None

    @property
    def softcap(self) -> float | None:
        """The logit soft-cap among the options, or None."""
        value = self.options.get("softcap")
        return float(value) if value else None

    @property
    def bidirectional(self) -> bool:
        """Whether the call says that it sees both sides: it has no mask, and its module or options are not causal."""
        if self.q.shape[-2] == 1 or self.mask_tensor is not None:
            return False
        option = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if option is None else option
        return not causal or (self.mask is None and self.implementation == "eager")


@dataclass(frozen=True)
class AttentionCall(AttentionInputs):
    """One attention call, as the model made it.

    Attributes:
        output: (B, n, H, dv), the model's own result.
    """

    output: Tensor


# The model's own attention, as (q, k, v) -> (output (B, n, H, dv), weights or None): mask, scale and options are bound.
Own = Callable[[Tensor, Tensor, Tensor], Any]
# What a call becomes; returns what `Own` returns.
Attend = Callable[[AttentionInputs, Own], Any]
