"""`model_facts` makes the `model` object of dumps and of anchors.json, which identifies a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.dtypes import dtype_name
from anchorscope.models.adapters import adapters_at_work, parameters_of, signs_of, unwrapped
from anchorscope.models.config import text_config
from anchorscope.models.placement import stored_values
from anchorscope.models.positions import model_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_facts(model: PreTrainedModel, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What identifies a model: the `model` object of dumps and of anchors.json.

    `query_heads`, `kv_heads` and `head_dim` are the configuration's, None where it gives none or one per layer.
    `fingerprint` hashes the names and shapes of all parameters, the values of those with one dimension (norms, biases),
    rounded to bf16, and the signs of the first values of all others, so that a model loaded in another dtype or
    offloaded by accelerate keeps it and another training run does not. Adapters at work change it (their names do not),
    and so does merging them; disabled or inactive ones do not.

    Raises:
        InputError: an adapter is not part of the model's layers (prompt learning and similar).
    """
    model = unwrapped(model)
    config = text_config(model)
    heads = _shared(config, "num_attention_heads", None)
    kv_heads = _shared(config, "num_key_value_heads", heads)
    width = getattr(config, "hidden_size", None)
    split = width // heads if isinstance(width, int) and isinstance(heads, int) else None
    head_dim = _shared(config, "head_dim", split)
    digest = hashlib.sha256(adapters_at_work(model).encode())
    values = stored_values(model)
    for key, parameter in parameters_of(model):
        digest.update(f"{key}{tuple(parameter.shape)}".encode())
        value = values(parameter)
        if value.ndim > 1:
            digest.update(signs_of(value))
        if value.ndim == 1 and value.is_floating_point() and value.device.type != "meta":
            digest.update(value.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "name": name or name_of(model),
        "revision": revision,
        "class": type(model).__name__,
        "type": config.model_type,
        "dtype": dtype_name(model.dtype) if model.dtype != torch.float64 else "fp64",
        "attention": model.config._attn_implementation,
        "layers": getattr(config, "num_hidden_layers", None),
        "query_heads": heads if isinstance(heads, int) else None,
        "kv_heads": kv_heads if isinstance(kv_heads, int) else None,
        "head_dim": head_dim if isinstance(head_dim, int) else None,
        "positions": model_positions(model).trained,
        "fingerprint": digest.hexdigest(),
    }


def name_of(model: PreTrainedModel) -> str:
    """Return a loaded model's id, or the last part of the folder it came from, since dumps carry no local paths."""
    source = str(getattr(model, "name_or_path", "") or "")
    return (Path(source).name if Path(source).exists() else source) or type(model).__name__


def _shared(config: PretrainedConfig, name: str, otherwise: Any) -> Any:
    """Return a configuration's value, `otherwise` where it is unset, or None where every layer has its own."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read it globally
        return None
    return otherwise if value is None else value
