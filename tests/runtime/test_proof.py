"""Entering `sparse_attention` looks at the model's weights, without running them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import anchorscope
from anchorscope.errors import InputError

transformers = pytest.importorskip("transformers")

from families import tiny  # noqa: E402


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny().config).eval()
    with pytest.raises(InputError, match="weights without values"), anchorscope.sparse_attention(model, 4.0):
        pass


def test_weights_that_no_checkpoint_held_are_a_warning(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.self_attn.k_proj.weight"
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def enter() -> None:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with anchorscope.sparse_attention(model, 4.0):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        enter()
    del weights[name]
    with pytest.warns(UserWarning, match=rf"1 weights of LlamaForCausalLM were in no checkpoint \({name}\)") as said:
        enter()
    assert said[0].filename == __file__  # it points at the caller
