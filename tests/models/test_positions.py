"""How many positions models have, and rotations that depend on the length."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.errors import InputError
from anchorscope.models import PromptInput
from anchorscope.models.facts import model_facts
from anchorscope.models.positions import Positions, model_positions, reset_rotations

pytest.importorskip("transformers")

from families import collect, ids, prompt, quiet, relative, tiny

ORIGINAL = 48
THETA = {"rope_theta": 10000.0}
LONGROPE: dict[str, Any] = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
WIDE = {**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # of heads with 16 dimensions
DYNAMIC = {**THETA, "rope_type": "dynamic", "factor": 2.0}
LOCAL = {**THETA, "rope_type": "default"}
# family, changes of its configuration: positions are rotated otherwise in prompts of more than ORIGINAL tokens
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}),
    "longrope elsewhere": ("llama", {"rope_parameters": LONGROPE}),
    "scale alone": ("phimoe", {"rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3}}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "partly rotated": ("gpt_neox", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "full layers": ("gemma3_text", {"rope_parameters": {"full_attention": WIDE, "sliding_attention": LOCAL}}),
    "window layers": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": LOCAL, "sliding_attention": DYNAMIC},
            "max_position_embeddings": ORIGINAL,
        },
    ),
}
STEADY: dict[str, dict[str, Any]] = {
    "yarn": {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "linear": {**THETA, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        **THETA,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def changing(name: str) -> Any:
    family, changes = CHANGING[name]
    return tiny(family, **copy.deepcopy(changes))  # a configuration writes into what it is given


def tensors(dump: Any) -> list[torch.Tensor]:
    found = (dump.load(e) for e in dump.entries)
    return [x for t in found for x in (t.q, t.k, t.v)]


def difference(one: Any, two: Any) -> float:
    return max(relative(b, a) for a, b in zip(tensors(one), tensors(two), strict=True))


@pytest.mark.parametrize("name", CHANGING)
def test_chunks_that_would_be_rotated_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    model = changing(name)
    with pytest.raises(InputError, match=rf"more than {ORIGINAL} tokens \(rope type .*; capture without --chunk"):
        capture_model(model, [prompt(80)], tmp_path / "refused", chunk=17, notify=quiet)
    assert not (tmp_path / "refused").exists()
    # the branch is real: in chunks, the model's own forwards give other keys
    ids = torch.tensor([prompt(80).token_ids])
    whole = collect(model, prompt(80).token_ids or ())
    found = []
    with torch.no_grad():
        reset_rotations(model)
        first = model(ids[:, :17], use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    for layer, call in whole.items():
        found.append(relative(cache.layers[layer].keys[0].float(), call.k[0, :, :17]))
    assert max(found) > 1e-2


@pytest.mark.parametrize("name", CHANGING)
def test_up_to_the_switch_chunks_are_the_whole(tmp_path: Path, name: str) -> None:
    model = changing(name)
    whole = capture_model(model, [prompt(ORIGINAL)], tmp_path / "whole", notify=quiet)
    parts = capture_model(model, [prompt(ORIGINAL)], tmp_path / "parts", chunk=17, notify=quiet)
    assert difference(whole, parts) < 2e-5


def test_beyond_the_switch_from_the_first_chunk_on_is_the_whole(tmp_path: Path) -> None:
    """longrope has two sets of frequencies: a first chunk beyond the switch has the same one as the whole."""
    model = changing("phi3")
    whole = capture_model(model, [prompt(80)], tmp_path / "whole", notify=quiet)
    parts = capture_model(model, [prompt(80)], tmp_path / "parts", chunk=ORIGINAL + 1, notify=quiet)
    assert difference(whole, parts) < 2e-5
    with pytest.raises(InputError, match="rotates the same positions otherwise"):
        capture_model(model, [prompt(80)], tmp_path / "refused", chunk=ORIGINAL, notify=quiet)


@pytest.mark.parametrize("kind", STEADY)
def test_scaling_that_does_not_depend_on_the_length_runs_in_chunks(tmp_path: Path, kind: str) -> None:
    model = tiny(rope_parameters=dict(STEADY[kind]))
    whole = capture_model(model, [prompt(80)], tmp_path / "whole", notify=quiet)
    parts = capture_model(model, [prompt(80)], tmp_path / "parts", chunk=17, notify=quiet)
    assert difference(whole, parts) < 2e-5


@pytest.mark.parametrize("name", ["dynamic", "window layers"])
def test_no_prompt_is_rotated_for_one_before_it(tmp_path: Path, name: str) -> None:
    """Dynamic scaling keeps the frequencies of the longest prompt so far; transformers forgets them too late."""
    prompts = [prompt(90, "long"), prompt(60, "middle"), prompt(40, "short")]
    together = capture_model(changing(name), prompts, tmp_path / "together", notify=quiet)
    for p in prompts:
        model = changing(name)
        calls = collect(model, p.token_ids or ())  # a model that has seen nothing else
        for entry in together.entries:
            if entry.prompt == p.name:
                assert relative(together.load(entry).k, calls[entry.layer].k[0]) < 1e-6


# ------------------------------------------------------------------------------------------------------------------
# how many


@pytest.mark.parametrize(
    ("family", "changes", "want"),
    [
        ("llama", {}, Positions(None, 256)),
        # the form of the Qwen model cards: the stated length is the original one
        ("qwen2", {"max_position_embeddings": ORIGINAL, "rope_parameters": STEADY["yarn"]}, Positions(None, 192)),
        ("qwen2", {"max_position_embeddings": 192, "rope_parameters": STEADY["yarn"]}, Positions(None, 192)),
        ("llama", {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC}, Positions(None, 96)),
        ("llama", {"max_position_embeddings": ORIGINAL, "rope_parameters": STEADY["linear"]}, Positions(None, 192)),
        ("llama", {"rope_parameters": STEADY["llama3"]}, Positions(None, 256)),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}, Positions(None, 256)),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": STEADY["linear"], "sliding_attention": LOCAL}},
            Positions(None, 256),
        ),
        (
            "olmo3",
            {
                "max_position_embeddings": ORIGINAL,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {"full_attention": STEADY["yarn"], "sliding_attention": LOCAL},
            },
            Positions(None, 192),
        ),
        ("jamba", {}, Positions(None, 256)),  # no positions at all
        ("gpt2", {}, Positions(256, 256)),
        ("opt", {}, Positions(256, 256)),
        ("biogpt", {}, Positions(256, 256)),
        ("gpt_bigcode", {}, Positions(256, 256)),
        ("llama", {"hidden_size": 252, "num_attention_heads": 6, "head_dim": 42}, Positions(None, 256)),
        ("bloom", {"n_head": 6, "n_layer": 3}, Positions(None, 256)),
    ],
)
def test_positions(family: str, changes: dict[str, Any], want: Positions) -> None:
    model = tiny(family, **copy.deepcopy(changes))
    if family == "bloom":  # its distances are biases: it names no length
        del model.config.max_position_embeddings
        want = Positions(None, None)
    assert model_positions(model) == want
    assert model_facts(model)["positions"] == want.trained


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_scaled_models_run_beyond_their_original_length(tmp_path: Path, kind: str) -> None:
    parameters = {"yarn": STEADY["yarn"], "dynamic": DYNAMIC}[kind]
    model = tiny("qwen3", max_position_embeddings=ORIGINAL, rope_parameters=dict(parameters))
    most = {"yarn": 192, "dynamic": 96}[kind]
    said: list[str] = []
    capture_model(model, [prompt(most)], tmp_path / "a", notify=said.append)
    assert not any("positions" in x for x in said)
    dump = capture_model(model, [prompt(most + 8)], tmp_path / "b", notify=said.append)
    assert any(f"has {most + 8} tokens and the model is made for {most}" in x for x in said)
    calls = collect(tiny("qwen3", max_position_embeddings=ORIGINAL, rope_parameters=dict(parameters)), ids(most + 8))
    assert all(relative(dump.load(e).k, calls[e.layer].k[0]) < 1e-6 for e in dump.entries)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_a_limit(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    capture_model(model, [prompt(256)], tmp_path / "a", layers=[0], notify=quiet)
    with pytest.raises(InputError, match="prompt p has 257 tokens and the model 256 positions: give --tokens 256"):
        capture_model(model, [prompt(257)], tmp_path / "b", notify=quiet)
    dump = capture_model(model, [PromptInput("p", token_ids=ids(300))], tmp_path / "c", tokens=256, notify=quiet)
    assert dump.prompts[0].tokens == 256
