"""This module describes one attention call of a transformers model: its tensors and what its options say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs that one layer hands to its attention function.

    Attributes:
        module: the attention module.
        layer: the module's `layer_idx`, or None.
        implementation: the attention the model chose ("sdpa", "eager", "flash_attention_2", ...).
        q: (B, H, n, d) after rotary embedding and norms.
        k: (B, Hkv, m, d): all keys so far; the last n belong to these queries. A cache of a window layer may crop
            older ones.
        v: (B, Hkv, m, dv).
        mask: the result of the mask function: None, a boolean or additive tensor (B or 1, 1 or H, n, m), or another
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
        """Return the attention module's class and layer, for messages."""
        return f"{type(self.module).__name__} of layer {'?' if self.layer is None else self.layer}"

    @property
    def mask_tensor(self) -> Tensor | None:
        """Return the mask if it is a tensor (B or 1, 1 or H, n, m), else None; FlashAttention takes other objects."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 4 else None

    @property
    def window(self) -> int | None:
        """Return the sliding window among the options, or None. SDPA and eager attention obey the mask instead."""
        window = self.options.get("sliding_window")
        return int(window) if window else None

    @property
    def softcap(self) -> float | None:
        """Return the logit soft-cap that the options name, or None."""
        value = self.options.get("softcap")
        return float(value) if value else None

    @property
    def bidirectional(self) -> bool:
        """Return whether the call has no mask although its module or options are not causal."""
        if self.q.shape[-2] == 1 or self.mask_tensor is not None:
            return False
        option = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if option is None else option
        return not causal or (self.mask is None and self.implementation == "eager")


@dataclass(frozen=True)
class AttentionCall(AttentionInputs):
    """An attention call with the output that the model's own attention gave.

    Attributes:
        output: (B, n, H, dv), the result of the model's own attention.
    """

    output: Tensor


# The model's own attention: (q, k, v) -> (output (B, n, H, dv), weights or None). Mask, scale and options are bound.
Own = Callable[[Tensor, Tensor, Tensor], Any]
# Answers a call in place of the model's own attention, and returns what `Own` returns.
Attend = Callable[[AttentionInputs, Own], Any]
