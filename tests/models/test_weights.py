"""A checkpoint that does not fill its model is refused by tensor name: the loader would put random numbers there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import load, random_model, rewrite, saved

from anchorscope.capture import capture_model
from anchorscope.errors import InputError
from anchorscope.evaluation import evaluate
from anchorscope.models import PromptInput
from anchorscope.models.load import ready_model

Q = "model.layers.1.self_attn.q_proj.weight"


def without(*parts: str) -> Any:
    return lambda tensors: {k: v for k, v in tensors.items() if not any(part in k for part in parts)}


def prefixed(prefix: str) -> Any:
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


def resized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "model.embed_tokens.weight": torch.zeros(120, 64)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Q), [Q, "1 tensor missing"]),
        (without("layers.1."), ["9 tensors missing", "model.layers.1.input_layernorm.weight"]),
        (without("lm_head"), ["lm_head.weight"]),
        (without("norm"), ["5 tensors missing", "layernorm"]),
        (without("o_proj"), ["2 tensors missing", "model.layers.0.self_attn.o_proj.weight"]),
        (prefixed("_orig_mod."), ["_orig_mod.", "compiled"]),
        (prefixed("base_model.model."), ["base_model.model.", "adapter"]),
        (prefixed("module."), ["module.", "wrapper"]),
        (prefixed("student."), ["fit nowhere", "student."]),
        (resized, ["model.embed_tokens.weight is [120, 64], not [97, 64]"]),
    ],
)
def test_what_is_missing_is_refused_by_name(tmp_path: Path, change: Any, words: list[str]) -> None:
    folder = rewrite(saved(tmp_path / "m"), change)
    with pytest.raises(InputError) as caught:
        load(folder)
    for word in ["random numbers", "not whole", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "SCB"])
def test_quantized_weights_without_their_settings_are_refused(tmp_path: Path, scale: str) -> None:
    """Their integers would be taken for weights, and the scales dropped."""
    name = Q.removesuffix("weight") + scale

    def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        step = tensors[Q].abs().max() / 127
        return {**tensors, Q: (tensors[Q] / step).round().to(torch.int8), name: step[None]}

    with pytest.raises(InputError, match=f"quantized and their scales would be left out .{name}"):
        load(rewrite(saved(tmp_path / "m"), quantized))


def test_capture_and_evaluate_refuse_it_and_write_nothing(tmp_path: Path) -> None:
    folder = rewrite(saved(tmp_path / "m"), without(Q))
    prompt = PromptInput("p", token_ids=list(range(3, 40)))
    for run in (
        lambda: capture_model(str(folder), [prompt], tmp_path / "d", device="cpu"),
        lambda: evaluate(str(folder), tmp_path / "e", arms={"a": 9.0}, prompts=[prompt], device="cpu"),
    ):
        with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj"):
            run()
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_whole_checkpoints_load_with_their_values(tmp_path: Path, kind: str) -> None:
    told: list[str] = []
    loaded = load(saved(tmp_path / "m", kind, tie_word_embeddings=kind != "llama"), told)
    assert told == []
    assert loaded.loading == {"unexpected": [], "metadata": {}}
    wanted = random_model(kind, tie_word_embeddings=kind != "llama")
    for (name, found), (_, right) in zip(loaded.model.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert torch.equal(found, right), name


def test_a_tied_head_is_not_missing_but_both_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    with pytest.raises(InputError, match="embed_tokens"):
        load(rewrite(folder, without("embed_tokens")))


def test_unexpected_tensors_are_a_warning_and_are_recorded(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64), "value_head.weight": torch.ones(4)}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # old checkpoints hold it
    folder = rewrite(saved(tmp_path / "m"), lambda tensors: {**tensors, **extra, **buffer})
    told: list[str] = []
    assert load(folder, told).loading["unexpected"] == sorted(extra)
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert "q_proj.bias" in told[0]


def shard(folder: Path) -> Path:
    """Split a saved model into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path: Path) -> None:
    folder = shard(saved(tmp_path / "m"))
    assert torch.equal(load(folder).model.lm_head.weight, random_model().lm_head.weight)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors of 2 weight files is absent"):
        load(folder)


def test_a_shard_without_a_tensor_that_the_index_promises(tmp_path: Path) -> None:
    folder = shard(saved(tmp_path / "m"))
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=gone.replace(".", r"\.")):
        load(folder)


def test_a_loaded_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(random_model().config)
    with pytest.raises(InputError, match=r"without values, on the device meta \(.*embed_tokens"):
        ready_model(model, None, notify=print)
