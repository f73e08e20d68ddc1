"""Tiny random models on disk, from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from anchorscope.models.load import load_model

SIZE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(kind: str = "llama", **changes: Any) -> Any:
    """A tiny causal model of one transformers type with random weights, norms and biases included."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def saved(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """The folder of such a model, saved as transformers does."""
    random_model(kind, **changes).save_pretrained(folder)
    return folder


def load(source: Path | str, told: list[str] | None = None) -> Any:
    """The `LoadedModel` of a folder or a GGUF file; remarks go to `told`."""
    return load_model(str(source), device="cpu", notify=[].append if told is None else told.append)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Replace the tensors of a saved model."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
