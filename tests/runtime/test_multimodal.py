"""Models that see or hear: the counts are of the text's causal self-attention, towers and cross-attention stay out."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from families import recompute, relative
from multimodal import MODELS
from sparse_models import SMALL, everywhere, unregister

from anchorscope import attention_clock, register_attention, sparse_attention
from anchorscope.anchors import AnchorConfig
from anchorscope.capture import capture_model
from anchorscope.errors import InputError
from anchorscope.models import AttentionCall, PromptInput, intercept

# attention that is left out, and the language model's layers that are counted
OTHERS = {
    "gemma3": ("SiglipAttention", 2),
    "gemma4": ("Gemma4VisionAttention", 2),
    "gpt2_reader": ("GPT2Attention", 2),
    "idefics3": ("Idefics3VisionAttention", 2),
    "llava": ("CLIPAttention", 2),
    "mllama": ("MllamaTextCrossAttention MllamaVisionAttention", 2),
    "paligemma": ("GemmaAttention SiglipAttention", 0),
    "qwen2_5_vl": ("Qwen2_5_VLVisionAttention", 2),
    "qwen2_audio": ("Qwen2AudioAttention", 2),
    "qwen2_vl": ("VisionAttention", 2),
    "qwen3_vl": ("Qwen3VLVisionAttention", 2),
    "voxtral_realtime": ("VoxtralRealtimeAttention", 2),
}
BOTH_SIDES = ("gemma3", "paligemma")  # an image in the text sees itself from both sides


def made(name: str) -> tuple[Any, dict[str, Any]]:
    try:
        return MODELS[name]()
    except (AttributeError, TypeError) as error:  # an older transformers
        pytest.skip(f"this transformers has no such {name}: {error}")


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def text_only(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": inputs["input_ids"].clamp(max=80)}


def true_pairs(model: Any, inputs: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """By layer: queries and pairs of all heads of the text's causal self-attention, from each call's own mask."""
    found: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    text = type(model.config.get_text_config(decoder=True))

    def look(call: AttentionCall) -> None:
        if not isinstance(call.module.config, text) or getattr(call.module, "is_cross_attention", False):
            return
        if "Cross" in type(call.module).__name__ or not getattr(call.module, "is_causal", True):
            return
        n = call.q.shape[2]
        s = torch.zeros(call.q.shape[0], call.q.shape[1], n, call.k.shape[2])
        if call.mask is None:
            s = s.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        elif call.mask.dtype == torch.bool:
            s = s.masked_fill(~call.mask, -torch.inf)
        else:
            s = s + call.mask
        queries, pairs = found[call.layer]
        found[call.layer] = queries + n, pairs + int((s.softmax(-1) > 0).sum())

    with intercept(model, look):
        logits(model, inputs)
    return dict(found)


@pytest.mark.parametrize("name", MODELS)
def test_counts(name: str) -> None:
    model, inputs = made(name)
    own, expected = logits(model, inputs), true_pairs(model, inputs)
    with attention_clock(model) as run:
        assert torch.equal(logits(model, inputs), own)
    others, layers = OTHERS[name]
    assert len(run.layers()) == len(expected) == layers
    assert {x.layer: (x.queries, x.visible_pairs) for x in run.layers()} == expected
    assert " ".join(run.left_out()) == others
    run.reset()
    assert run.left_out() == []


def test_the_issue_in_figures() -> None:
    """Layer 1 of Mllama looks at 17 image states; nothing of it nor of the vision tower is a causal pair."""
    model, inputs = made("mllama")
    with attention_clock(model) as run:
        logits(model, inputs)
    assert [(x.layer, x.queries, x.visible_pairs) for x in run.layers()] == [(i, 61, 6 * 61 * 62 // 2) for i in (0, 2)]


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(BOTH_SIDES)))
def test_sparse_text(name: str) -> None:
    """With everything kept, logits are the model's own; towers never run sparse, whatever their layers are called."""
    model, inputs = made(name)
    own = logits(model, inputs)
    if name == "voxtral_realtime":
        config = AnchorConfig.uniform(math.inf, [0, 1], 6, SMALL)
        with (
            pytest.raises(InputError, match=r"cannot be tried on two tokens of text.*exactly one of input_features"),
            sparse_attention(model, config),
        ):
            pass
        return
    config = everywhere(model, math.inf)
    assert [x.layer for x in config.layers] == ([0, 2] if name == "mllama" else [0, 1])
    with sparse_attention(model, config) as run:
        assert float((logits(model, inputs) - own).abs().max()) < 1e-5 * max(1.0, float(own.abs().max()))
    assert [x.kind for x in run.layers()] == ["sparse"] * 2
    assert run.left_out()
    towers: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(call: AttentionCall) -> None:
        if type(call.module).__name__ in OTHERS[name][0] and "Cross" not in type(call.module).__name__:
            towers[str(len(towers) // 100)].append(call.output.clone())

    with intercept(model, keep):
        logits(model, inputs)
    before = towers.pop("0", [])
    towers.clear()
    with sparse_attention(model, everywhere(model, -math.inf)) as run, intercept(model, keep):
        ours = logits(model, inputs)
    assert float((ours - own).abs().max()) > 1e-4
    if name != "gpt2_reader":  # whose cross-attention reads what the sparse layers made
        assert all(torch.equal(a, b) for a, b in zip(before, towers["0"], strict=True))
        assert before


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_images_seen_from_both_sides_are_refused(name: str) -> None:
    model, inputs = made(name)
    config = everywhere(model, math.inf)
    refusal = pytest.raises(InputError, match=r"layer 0 cannot run sparse: (it is|.*prefix or) bidirectional")
    if name == "paligemma":
        with refusal, sparse_attention(model, config):
            pass
        return
    with sparse_attention(model, config) as run:
        logits(model, text_only(model, inputs))
        assert [x.kind for x in run.layers()] == ["sparse"] * 2
        with refusal:
            logits(model, inputs)


@pytest.mark.parametrize("name", ["gemma4", "llava", "mllama", "voxtral_realtime"])
def test_registered(name: str) -> None:
    """Without a trial, towers are told by their configuration."""
    model, inputs = made(name)
    own = logits(model, inputs)
    config = AnchorConfig.uniform(math.inf, [0, 2] if name == "mllama" else [0, 1], 6, SMALL)
    run = register_attention(config)
    try:
        model.set_attn_implementation("anchorscope")
        assert float((logits(model, inputs) - own).abs().max()) < 1e-5 * max(1.0, float(own.abs().max()))
    finally:
        unregister("anchorscope")
    assert [x.kind for x in run.layers()][-1] == "sparse"
    assert [x.queries for x in run.layers()] == [inputs["input_ids"].shape[1]] * 2


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llava", "mllama", "qwen2_5_vl"])
def test_capture_of_text(name: str, tmp_path: Path) -> None:
    """What is captured is the text's attention, under its own layer numbers."""
    model, inputs = made(name)
    ids = tuple(text_only(model, inputs)["input_ids"][0].tolist())
    dump = capture_model(model, [PromptInput("p", token_ids=ids)], tmp_path / "dump", notify=lambda _: None)
    seen: dict[int, AttentionCall] = {}
    with torch.no_grad(), intercept(model, lambda call: seen.setdefault(call.layer, call) and None):
        model(torch.tensor([ids]))
    assert [x.layer for x in dump.entries] == ([0, 2] if name == "mllama" else [0, 1])
    for entry in dump.entries:
        call = seen[entry.layer]
        assert type(call.module.config) is type(model.config.get_text_config(decoder=True))
        assert relative(recompute(dump, entry), call.output[0].transpose(0, 1).double()) < 2e-5
