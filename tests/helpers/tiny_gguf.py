"""GGUF files of tiny random models, written as llama.cpp's converter does, with the package gguf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K in llama.cpp's order, which pairs neighboring dimensions."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    model: Any,
    path: Path,
    architecture: str,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    drop: tuple[str, ...] = (),
    name: str = "tiny",
) -> Path:
    """Write a model's weights and the metadata that llama.cpp's converter writes for all of them.

    Args:
        model: a transformers model.
        path: the file.
        architecture: as GGUF calls it.
        keys: more metadata, without the architecture's name; None leaves a key out.
        tensors: more tensors.
        drop: GGUF names of tensors to leave out.
        name: general.name.
    """
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_string("general.name", name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
        **(keys or {}),
    }
    for key, value in values.items():
        full = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
    tied = config.tie_word_embeddings
    for hf, tensor in model.state_dict().items():
        if tied and hf == "lm_head.weight":
            continue
        data = tensor.float().numpy()
        if "gemma" in architecture and "norm" in hf:
            data = data + 1
        if architecture == "llama" and (found := re.search(r"self_attn\.([qk])_proj", hf)):
            data = permuted(data, config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)
        gguf = gguf_name(hf, architecture)
        if gguf not in drop:
            writer.add_tensor(gguf, np.ascontiguousarray(data))
    for gguf, data in (tensors or {}).items():
        writer.add_tensor(gguf, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(hf: str, architecture: str) -> str:
    """The GGUF name of a transformers tensor."""
    stem, suffix = hf.rsplit(".", 1)
    names = GEMMA if "gemma" in architecture else NAMES
    if block := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{block[1]}.{names[block[2]]}.{suffix}"
    return f"{names[stem]}.{suffix}"
