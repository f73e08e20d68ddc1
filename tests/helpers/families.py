"""Tiny random models of many families, made from configs: no download, and milliseconds per forward."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from anchorscope.dumps import Dump, Entry
from anchorscope.kernels import reference
from anchorscope.models import AttentionCall, PromptInput, intercept

N = 80  # tokens of the prompt: more than three windows
CHUNK = 17
TOLERANCE = 2e-5  # float32, relative to the largest value

COMMON: dict[str, Any] = {
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
WINDOW: dict[str, Any] = {"sliding_window": 24}
TWO_OF_THREE = {**WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LAST_OF_THREE = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 32}
OLD: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256}
LATENT: dict[str, Any] = {
    **ROUTED,
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **LAST_OF_THREE,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "cohere": {},
    "cohere2": TWO_OF_THREE,
    "dots1": ROUTED,
    "ernie4_5": {},
    "exaone4": {**TWO_OF_THREE, "sliding_window_pattern": 3},
    "flex_olmo": EXPERTS,
    "gemma": {"head_dim": 16},
    "gemma2": {**GEMMA, **WINDOW, "attn_logit_softcapping": 4.0},
    "gemma3_text": {**GEMMA, **TWO_OF_THREE},
    "gemma4_text": WINDOW,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "gpt2": OLD,
    "gpt_bigcode": {**OLD, "n_inner": 64},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite": {"attention_multiplier": 0.1},
    "granitemoe": LOCAL_EXPERTS,
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama": {},
    "mistral": WINDOW,
    "mixtral": {**LOCAL_EXPERTS, **WINDOW},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"word_embed_proj_dim": 48, "ffn_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": LOCAL_EXPERTS,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**GEMMA, **WINDOW},
    # hybrids: only their softmax layers are dumped
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "mamba_n_heads": 12,
        "mamba_d_head": 8,
        "shared_intermediate_size": 64,
    },
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"]},
    "minimax": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, **LAST_OF_THREE},
    "nemotron_h": {},
    "qwen3_5_text": DELTA,
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {},
    # what Q, K and V cannot represent, or code that does not use transformers' attention interface in every version
    "bert": {},
    "bloom": {"n_head": 6, "n_layer": 3},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": {},
    "doge": {},
    "falcon": {},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gptj": {**OLD, "rotary_dim": 4},
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 24,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0],
        "num_local_experts": 2,
    },
    "mamba": {},
    "mamba2": {"num_heads": 12, "head_dim": 8, "n_groups": 1},
    "minicpm3": LATENT,
    "mpt": {"d_model": 48, "n_heads": 6, "n_layers": 3},
    "rwkv": {},
    "t5": {},
    "xglm": {"d_model": 48, "ffn_dim": 64, "num_layers": 3, "attention_heads": 6},
}


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A seeded random model in float32, milliseconds per forward, attention far from uniform."""
    attention = changes.pop("attn_implementation", None)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(7)
    model = kind.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "head" not in name:
                weight.mul_(6)  # as initialized, scores are so small that every mistake stays invisible
    return model.eval()


def prompt(count: int = N, name: str = "p", seed: int = 0) -> PromptInput:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return PromptInput(name, token_ids=tuple(torch.randint(3, 97, (count,), generator=generator).tolist()))


def ids(count: int) -> tuple[int, ...]:
    """The token ids of `prompt(count)`."""
    return prompt(count).token_ids or ()


def quiet(_: str) -> None:
    """A `notify` that says nothing."""


def collect(model: Any, ids: tuple[int, ...]) -> dict[int, AttentionCall]:
    """Every layer's call of one forward, tensors copied."""
    calls: dict[int, AttentionCall] = {}

    def keep(call: AttentionCall) -> None:
        tensors = {name: getattr(call, name).clone() for name in ("q", "k", "v", "output")}
        assert call.layer is not None
        calls[call.layer] = AttentionCall(**{**vars(call), **tensors})

    with torch.no_grad(), intercept(model, keep):
        model(torch.tensor([ids]))
    return calls


def recompute(dump: Dump, entry: Entry) -> torch.Tensor:
    """Attention output (H, N, d) in float64 from the dump alone, by the specification."""
    v = dump.load(entry).v
    assert v is not None
    scores, mask = _scores(dump, entry)
    return reference.masked_attention(scores, v[None], mask)[0][0]


def recomputed_weights(dump: Dump, entry: Entry) -> torch.Tensor:
    """Attention weights (H, N, N) in float64 from the dump alone, by the specification."""
    scores, mask = _scores(dump, entry)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)[0]


def _scores(dump: Dump, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    t = dump.load(entry)
    q, k = t.q[None], t.k[None]
    scores = reference.scores(q, k, scale=entry.scale, softcap=entry.softcap)
    return scores, reference.visible_mask(reference.geometry(q, k, window=entry.window))


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest |x - y| relative to the largest |y|."""
    return float((x - y).abs().max() / y.abs().max())
