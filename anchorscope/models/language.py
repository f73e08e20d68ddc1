"""`Language` tells a language model's causal self-attention from the other attention of a model that sees or hears.

Towers for images and sound may number their layers from 0 as the text does, and cross-attention layers stand among
those of the text. Neither is prefill of a prompt, so both are left out, by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anchorscope.models.calls import AttentionCall, AttentionInputs
from anchorscope.models.config import text_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOWERS = ("vision", "audio", "speech", "encoder")  # in the type of a tower's configuration


class Language:
    """The set of modules that make up a model's language model, without its towers.

    Args:
        model: any loaded transformers model; None where only a call is known: then towers are told by their
            configuration.
    """

    def __init__(self, model: PreTrainedModel | None) -> None:
        self._decoder: Any = None if model is None else weakref.ref(text_decoder(model))
        self._known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __contains__(self, module: nn.Module) -> bool:
        if module not in self._known:
            self._known[module] = self._belongs(module)
        return self._known[module]

    def _belongs(self, module: nn.Module) -> bool:
        if self._decoder is None:
            kind = str(getattr(getattr(module, "config", None), "model_type", ""))
            return not any(tower in kind for tower in TOWERS)
        decoder = self._decoder()
        return decoder is not None and any(x is module for x in decoder.modules())

    def foreign(self, call: AttentionInputs) -> bool:
        """Return whether a call is something else than self-attention of a numbered layer of the language model."""
        return call.layer is None or call.module not in self or crosses(call)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that is its language model, or the model itself where there is no other part."""
    kind = type(text_config(model))
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(getattr(decoder, "config", None), kind):
        return decoder
    return next((x for x in model.modules() if isinstance(getattr(x, "config", None), kind)), model)


def crosses(call: AttentionInputs) -> bool:
    """Return whether a call is cross-attention, which reads something else than its own tokens."""
    named = "cross" in type(call.module).__name__.lower() or getattr(call.module, "is_cross_attention", False)
    return bool(named) or call.k.shape[-2] < call.q.shape[-2]


def language_only(model: PreTrainedModel, sink: Callable[[AttentionCall], None]) -> Callable[[AttentionCall], None]:
    """Return a sink for `intercept` that passes on the calls of the language model, not those of other towers."""
    language = Language(model)

    def watch(call: AttentionCall) -> None:
        if call.module in language:
            sink(call)

    return watch
