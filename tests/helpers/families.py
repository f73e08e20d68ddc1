"""Which model families capture supports, found out by running each: tiny random models from configs, no download.

`python tests/helpers/families.py docs/families.md` runs them all and writes the table. A family counts as supported
when the attention recomputed from its dump alone equals the model's own output in every layer; it captures in chunks
when that dump equals the unchunked one.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from anchorscope.capture import AttentionCall, PromptInput, capture_model, intercept
from anchorscope.dumps import Dump, Entry
from anchorscope.errors import InputError
from anchorscope.kernels import reference

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

SUPPORTED: dict[str, dict[str, Any]] = {
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
}
# What Q, K and V cannot represent, and what the message says about it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "bidirectional"),
    "bloom": ({"n_head": 6, "n_layer": 3}, "never called"),
    "deepseek_v2": (LATENT, "latent"),
    "deepseek_v3": (LATENT, "latent"),
    "diffllama": ({}, "more than once"),
    "doge": ({}, "bias"),
    "falcon": ({}, "never called"),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "learned attention sinks"),
    "gptj": ({**OLD, "rotary_dim": 4}, "never called"),
    "llama4_text": (
        {"head_dim": 8, "attention_chunk_size": 24, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0]}
        | {"num_local_experts": 2},
        "chunked, prefix or bidirectional",
    ),
    "mamba": ({}, "never called"),
    "mamba2": ({"num_heads": 12, "head_dim": 8, "n_groups": 1}, "never called"),
    "minicpm3": (LATENT, "latent"),
    "mpt": ({"d_model": 48, "n_heads": 6, "n_layers": 3}, "never called"),
    "rwkv": ({}, "never called"),
    "t5": ({}, "encoder-decoder"),
    "xglm": ({"d_model": 48, "ffn_dim": 64, "num_layers": 3, "attention_heads": 6}, "never called"),
}
# Chunked prefill is wrong in transformers' own code there (recurrent state or masks are not carried over).
NO_CHUNKS = ("bamba", "jamba", "minimax", "recurrent_gemma")


@dataclass(frozen=True)
class Row:
    """One family's line: `reason` is empty for supported ones; errors are relative to the largest value."""

    family: str
    model: str
    reason: str = ""
    attention: str = ""
    dumped: str = ""
    windows: str = ""
    softcap: float | None = None
    output_error: float = 0.0
    chunk_error: float | None = None
    chunk_reason: str = ""


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A seeded random model in float32, milliseconds per forward, attention far from uniform."""
    known = SUPPORTED.get(family) or (REFUSED[family][0] if family in REFUSED else {})
    attention = changes.pop("attn_implementation", None)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **known, **changes})
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(7)
    model = kind.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "head" not in name:
                weight.mul_(6)  # as initialised, scores are so small that every mistake stays invisible
    return model.eval()


def prompt(count: int = N, name: str = "p", seed: int = 0) -> PromptInput:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return PromptInput(name, token_ids=tuple(torch.randint(3, 97, (count,), generator=generator).tolist()))


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
    t = dump.load(entry)
    assert t.v is not None
    q, k, v = t.q[None], t.k[None], t.v[None]
    scores = reference.scores(q, k, scale=entry.scale, softcap=entry.softcap)
    mask = reference.visible_mask(reference.geometry(q, k, window=entry.window))
    return reference.masked_attention(scores, v, mask)[0][0]


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest |x - y| relative to the largest |y|."""
    return float((x - y).abs().max() / y.abs().max())


def run_family(family: str, folder: Path) -> Row:
    """Capture a family's tiny model whole and in chunks, and compare with the model itself."""
    model = tiny(family)
    name = type(model).__name__
    p = prompt()
    try:
        dump = capture_model(model, [p], folder / "whole", notify=_ignore)
    except InputError as error:
        return Row(family, name, reason=_short(str(error), name))
    calls = collect(model, p.token_ids or ())
    worst = 0.0
    for entry in dump.entries:
        call, t = calls[entry.layer], dump.load(entry)
        if not torch.equal(t.q, call.q[0]) or not torch.equal(t.k, call.k[0]):
            raise AssertionError(f"{family}: layer {entry.layer} is not what attention consumed")
        worst = max(worst, relative(recompute(dump, entry), call.output[0].transpose(0, 1).double()))
    chunk_error: float | None = None
    chunk_reason = ""
    try:
        parts = capture_model(model, [p], folder / "parts", chunk=CHUNK, notify=_ignore)
    except InputError as error:
        chunk_reason = _short(str(error), name)
    else:
        chunk_error = 0.0
        for a, b in zip(dump.entries, parts.entries, strict=True):
            if (a.layer, a.window, a.softcap, a.scale) != (b.layer, b.window, b.softcap, b.scale):
                raise AssertionError(f"{family}: layer {a.layer} differs when captured in chunks")
            one, two = dump.load(a), parts.load(b)
            for x, y in ((one.q, two.q), (one.k, two.k), (one.v, two.v)):
                assert x is not None
                assert y is not None
                chunk_error = max(chunk_error, relative(y, x))
    count = len(model.config.get_text_config(decoder=True).layer_types or ()) if _typed(model) else 0
    count = max(count, int(getattr(model.config, "num_hidden_layers", 0)))
    windows = [e.window for e in dump.entries]
    return Row(
        family,
        name,
        attention=model.config._attn_implementation,
        dumped="all" if len(windows) == count else f"{len(windows)} of {count}",
        windows="" if not any(windows) else f"{sum(w is not None for w in windows)} of {len(windows)}",
        softcap=dump.entries[0].softcap,
        output_error=worst,
        chunk_error=chunk_error,
        chunk_reason=chunk_reason,
    )


def table(rows: list[Row]) -> str:
    """docs/families.md."""
    good = [r for r in rows if not r.reason]
    lines = [
        "# Model families",
        "",
        "Which transformers families `anchorscope capture` supports, and why it refuses the others. Generated by",
        "`python tests/helpers/families.py docs/families.md` from tiny random models"
        f" (transformers {transformers.__version__}); the tests keep it honest.",
        "",
        "- **output**: attention recomputed in float64 from the dump alone against the model's own float32 output,",
        "  largest difference in any layer relative to the largest value.",
        "- **chunks**: Q, K and V captured with `--chunk` against those captured whole, likewise.",
        "- **layers**: hybrids mix attention with recurrent or convolution layers; only softmax layers are dumped.",
        "",
        "Families that are not listed are not refused: each call is compared with what a dump can represent while the",
        "model runs, so what is captured is right or the capture stops with a sentence.",
        "",
        f"## Supported: {len(good)}",
        "",
        "| family | class | attention | layers | windows | soft-cap | output | chunks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in good:
        chunks = f"{r.chunk_error:.0e}" if r.chunk_error is not None else "refused (1)"
        cap = "" if r.softcap is None else f"{r.softcap:g}"
        lines.append(
            f"| {r.family} | {r.model} | {r.attention} | {r.dumped} | {r.windows} | {cap} | {r.output_error:.0e} |"
            f" {chunks} |"
        )
    lines += [
        "",
        "(1) transformers' own cache of these does not carry their state from chunk to chunk, or none: a short",
        "prompt run in pieces gives other queries than run whole. Capture them without `--chunk`.",
        "",
        f"## Refused: {len(rows) - len(good)}",
        "",
        "| family | class | reason |",
        "|---|---|---|",
    ]
    lines += [f"| {r.family} | {r.model} | {r.reason} |" for r in rows if r.reason]
    return "\n".join(lines) + "\n"


def _typed(model: Any) -> bool:
    return getattr(model.config.get_text_config(decoder=True), "layer_types", None) is not None


def _short(message: str, model: str) -> str:
    """The reason in a refusal, without the advice that follows it."""
    message = re.sub(r"; Q, K and V alone do not reproduce it.*", "", message)
    message = re.sub(r" cannot be captured", "", message)
    return message.replace(f"{model} ", "", 1).replace(f"model {model} ", "", 1)


def _ignore(_: str) -> None:
    pass


def main(target: str) -> None:
    """Run every family and write the table."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in sorted([*SUPPORTED, *REFUSED]):
            rows.append(run_family(family, Path(folder) / family))
            print(rows[-1], file=sys.stderr)
    wrong = [r.family for r in rows if bool(r.reason) != (r.family in REFUSED)]
    wrong += [r.family for r in rows if max(r.output_error, r.chunk_error or 0.0) > TOLERANCE]
    if wrong:
        raise SystemExit(f"not as expected: {', '.join(wrong)}")
    Path(target).write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
