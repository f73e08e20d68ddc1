"""Tiny random-weight models built from configs: no download, milliseconds per forward."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A seeded model in float32; weights are scaled up so that attention is far from uniform."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "norm" not in name:
                weight.mul_(6)
    return model


def token_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    """Seeded ids inside the tiny vocabulary, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (count,), generator=generator).tolist())
