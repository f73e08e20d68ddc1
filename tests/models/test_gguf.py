"""GGUF files give the model that safetensors give: every statement of theirs is applied or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import load, random_model

from anchorscope.errors import InputError
from anchorscope.models import intercept

IDS = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(1))
BASE = 10_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": BASE,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": BASE}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.freq_base": BASE,
}
SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [1.5 + 0.5 * i for i in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 64,
    "rope_theta": BASE,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": BASE},
}
THREE = ["sliding_attention", "sliding_attention", "full_attention"]


def keys_and_logits(model: Any) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """K of every layer as attention sees it, and logits."""
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), intercept(model, lambda call: seen.setdefault(call.layer, call.k[0].clone())):
        logits = model(IDS, use_cache=False).logits
    return seen, logits


def equal(found: Any, right: Any) -> float:
    """The largest difference of K and logits, relative to the largest value."""
    (keys, logits), (right_keys, right_logits) = keys_and_logits(found), keys_and_logits(right)
    assert sorted(keys) == sorted(right_keys) != []
    pairs = [(keys[i], right_keys[i]) for i in keys] + [(logits, right_logits)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def llama3_factors(rope: dict[str, Any], dims: int = 16) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter computes it."""
    factors = []
    low, high, old = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dims)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (GGUF architecture, settings of the transformers model, metadata, tensors)
    "llama": ("llama", {}, {}, {}),
    "llama, base": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope.freq_base": 5e5},
        {},
    ),
    "llama, head size": ("llama", {"head_dim": 32}, {}, {}),
    "llama, no base, no head size": (
        "llama",
        {},
        {"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": None},
        {},
    ),
    "llama, mha": ("llama", {"num_key_value_heads": 4}, {}, {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "llama 3.1": (
        "llama",
        {"rope_parameters": LLAMA3},
        {"rope.freq_base": BASE},
        {"rope_freqs.weight": llama3_factors(LLAMA3)},
    ),
    "llama, yarn": ("llama", {"rope_parameters": YARN}, YARN_KEYS, {}),
    "llama, yarn with betas": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": BASE}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "llama, linear of old": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": BASE}},
        {"rope.scale_linear": 4.0},
        {},
    ),
    "qwen2": ("qwen2", {}, {"rope.freq_base": BASE}, {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, YARN_KEYS, {}),
    "qwen3": ("qwen3", {"head_dim": 16}, {"rope.freq_base": BASE}, {}),
    "qwen3, yarn": ("qwen3", {"head_dim": 32, "rope_parameters": YARN}, YARN_KEYS, {}),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "attn_logit_softcapping": 4.0},
        {
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 30.0,
            "rope.freq_base": BASE,
        },
        {},
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "num_hidden_layers": 6,
            "rope_parameters": GEMMA3_ROPE,
        },
        {
            "attention.sliding_window": 24,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "gemma3, pattern": (
        "gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "layer_types": THREE,
            "rope_parameters": GEMMA3_ROPE,
        },
        {
            "attention.sliding_window": 24,
            "attention.sliding_window_pattern": [True, True, False],
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": BASE,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "phi3": ("phi3", {"sliding_window": 24}, {"attention.sliding_window": 24, "rope.freq_base": BASE}, {}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        {
            "rope.freq_base": BASE,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(64)),
        },
        {"rope_factors_long.weight": np.array(LONG), "rope_factors_short.weight": np.array(SHORT)},
    ),
}
KINDS = {"gemma3": "gemma3_text"}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_same_model_from_safetensors(tmp_path: Path, case: str) -> None:
    architecture, changes, keys, tensors = CASES[case]
    right = random_model(KINDS.get(architecture, architecture), **changes)
    right.save_pretrained(tmp_path / "m")
    right = load(tmp_path / "m").model
    loaded = load(write_gguf(right, tmp_path / "x.gguf", architecture, keys, tensors))
    assert equal(loaded.model, right) < 1e-5
    assert loaded.loading["metadata"]["architecture"] == architecture


def test_what_transformers_alone_makes_of_it_is_wrong(tmp_path: Path) -> None:
    """The comparison above can fail: without the file's own statements K is off by as much as K is large."""
    import transformers

    right = random_model(rope_parameters=LLAMA3)
    path = write_gguf(right, tmp_path / "x.gguf", "llama", {}, {"rope_freqs.weight": llama3_factors(LLAMA3)})
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert equal(alone.eval(), right) > 0.5


def test_frequencies_of_no_formula_are_applied_as_they_are(tmp_path: Path) -> None:
    right = random_model()
    factors = np.linspace(1, 9, 8, dtype=np.float32)
    with torch.no_grad():
        right.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    path = write_gguf(right, tmp_path / "x.gguf", "llama", {}, {"rope_freqs.weight": factors})
    assert equal(load(path).model, right) < 1e-5


def test_what_was_changed_is_recorded(tmp_path: Path) -> None:
    path = write_gguf(random_model(rope_parameters=YARN), tmp_path / "x.gguf", "llama", YARN_KEYS)
    metadata = load(path).loading["metadata"]
    assert metadata["keys"]["rope.scaling.factor"] == 4.0
    assert metadata["set"]["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        ({"attention.scale": 0.5}, {}, r"llama\.attention\.scale = 0\.5 is ignored"),
        ({"attention.some_new_thing": 1}, {}, r"attention\.some_new_thing"),
        ({"rope.some_new_thing": 1}, {}, r"rope\.some_new_thing"),
        ({"expert_count": 4}, {}, r"expert_count = 4"),
        ({"embedding_scale": 12.0}, {}, r"embedding_scale = 12"),
        ({"attention.causal": False}, {}, "only causal"),
        ({"attention.sliding_window": 24}, {}, "sliding window of 24"),
        ({"attention.value_length": 8}, {}, "keys and values of different sizes"),
        ({"attention.head_count_kv": [2, 1]}, {}, "given layer by layer"),
        ({"rope.dimension_count": 8}, {}, "8 of 16 dimensions"),
        ({"rope.scaling.type": "dynamic"}, {}, "rope scaling 'dynamic' is not read"),
        ({"rope.scaling.type": "yarn"}, {}, "has no factor"),
        ({**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({"attention.head_count": 0}, {}, r"head_count is 0"),
        ({"attention.head_count_kv": None}, {}, r"no llama\.attention\.head_count_kv"),
        ({"block_count": None}, {}, r"no llama\.block_count"),
        ({}, {"rope_freqs.weight": np.ones(3)}, "does not hold 8 positive factors"),
        ({}, {"blk.0.attn_q.bias": np.ones(64)}, "but not the other biases"),
        ({}, {"blk.0.attn_sinks.weight": np.ones(4)}, r"tensor blk\.0\.attn_sinks\.weight has no place"),
        ({}, {"blk.7.attn_norm.weight": np.ones(64)}, r"blk\.7\.attn_norm\.weight has no place"),
        ({"split.count": 2}, {}, "split"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], words: str
) -> None:
    path = write_gguf(random_model(), tmp_path / "x.gguf", "llama", keys, tensors)
    with pytest.raises(InputError, match=words):
        load(path)


def test_unproven_architectures_are_refused(tmp_path: Path) -> None:
    path = write_gguf(random_model(), tmp_path / "x.gguf", "starcoder2")
    with pytest.raises(InputError, match="architecture 'starcoder2' are not read"):
        load(path)


def test_missing_tensors_and_cut_files(tmp_path: Path) -> None:
    path = write_gguf(random_model(), tmp_path / "x.gguf", "llama", drop=("blk.1.attn_q.weight",))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        load(path)
    whole = write_gguf(random_model(), tmp_path / "y.GGUF", "llama")
    load(whole)
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no whole GGUF file"):
        load(whole)
