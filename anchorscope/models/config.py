"""These functions read a model's configuration and refuse models that it alone rules out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anchorscope.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the configuration of the language model, also from inside a multimodal one."""
    return model.config.get_text_config(decoder=True)


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse architectures whose attention is not causal self-attention throughout.

    Raises:
        InputError: the model is an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model {name} ({config.model_type}) is an encoder-decoder:"
            " only causal (decoder-only) models can be captured or run sparse"
        )
