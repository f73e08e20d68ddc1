"""Loading the model to capture: a Hugging Face id, a local folder, a GGUF file or a preset."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from anchorscope.capture.adapters import adapters_at_work, parameters_of, signs_of, unwrapped
from anchorscope.capture.gguf_config import Gguf, agree
from anchorscope.capture.gguf_metadata import open_gguf
from anchorscope.capture.positions import max_positions
from anchorscope.capture.sources import guarded, load_tokenizer, locate, no_conversion
from anchorscope.capture.weights import check_materialised, check_report, stored_values
from anchorscope.devices import resolve_device
from anchorscope.dumps.writer import dtype_name, torch_dtype
from anchorscope.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer (None if it has none) and the name to record.

    `loading` is what the loader reported, JSON-able: `unexpected`, the names of the checkpoint's tensors that the model
    does not use, and `metadata`, what a GGUF file says about attention and what was made of it. It is empty for a model
    that was loaded elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    loading: Mapping[str, Any] = field(default_factory=dict)


OLDEST_TRANSFORMERS = (5, 22)  # as pyproject.toml says


def require_transformers() -> None:
    """Make sure the extra `hf` is installed.

    Raises:
        MissingBackendError: it is not, or transformers is older than the tests know.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingBackendError(f"capture needs transformers ({error}): pip install 'anchorscope[hf]'") from None
    if tuple(int(x) for x in transformers.__version__.split(".")[:2] if x.isdigit()) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MissingBackendError(
            f"capture needs transformers {oldest} or newer, not {transformers.__version__}:"
            " pip install -U 'anchorscope[hf]'"
        )


def quiet_transformers() -> None:
    """Keep transformers' own remarks and progress bars off the terminal: for programs with their own, not libraries."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(
    source: str,
    *,
    device: str = "auto",
    model_dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None],
) -> LoadedModel:
    """Load model and tokenizer, in evaluation mode, on the device.

    Only safetensors and GGUF weights are read, never pickle. What the loader reports is part of the result.

    Args:
        source: a preset, a `.gguf` file, a local folder, or a Hugging Face id; tried in this order.
        device: "auto", "cpu", "cuda" or "cuda:i".
        model_dtype: "bf16", "fp16" or "fp32"; by default what the checkpoint holds (fp32 for GGUF).
        revision: of a Hugging Face id.
        trust_remote_code: run code that comes with the model; off unless the user says so.
        notify: told about downloads, and about tensors of the checkpoint that the model does not use.

    Raises:
        InputError: no such model, one that is not a causal language model, damaged files, weights that are missing,
            of another shape or stored as pickle.
        MissingBackendError: transformers, accelerate, gguf or the device is missing.
    """
    require_transformers()
    where = resolve_device(device)
    place = locate(source, revision, notify)
    dtype = "auto" if model_dtype is None else torch_dtype(model_dtype)
    if place.gguf is not None:
        dtype = torch_dtype(model_dtype or "fp32")
    common = {**place.options, "trust_remote_code": trust_remote_code}
    from transformers import AutoConfig, AutoModelForCausalLM

    file = None if place.gguf is None else Gguf.read(open_gguf(place.gguf), place.gguf)
    config = guarded(place, lambda: AutoConfig.from_pretrained(place.folder, **common))
    check_config(config, source)
    metadata = {} if file is None else agree(config, file)
    tokenizer = load_tokenizer(place, common, notify)

    def weights() -> tuple[PreTrainedModel, dict[str, Any]]:
        found: Any = AutoModelForCausalLM.from_pretrained(
            place.folder,
            config=config,
            dtype=dtype,
            device_map={"": str(where)},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their shapes
            output_loading_info=True,
            **common,
        )
        return cast("tuple[PreTrainedModel, dict[str, Any]]", found)

    with no_conversion():
        model, report = guarded(place, weights)
    unexpected = check_report(report, source, notify)
    check_materialised(model, source)
    model.eval()
    return LoadedModel(
        model,
        tokenizer,
        place.name,
        getattr(config, "_commit_hash", None) or revision,
        {"unexpected": unexpected, "metadata": metadata},
    )


def ready_model(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **loading: Any) -> LoadedModel:
    """A model by name, loaded with `loading` (see `load_model`), or one that is loaded already, with its tokenizer.

    Raises:
        InputError, MissingBackendError: as `load_model`.
    """
    if isinstance(model, str):
        return load_model(model, **loading)
    check_materialised(model, name_of(model))
    base = unwrapped(model)
    loaded = LoadedModel(base, tokenizer, name_of(base), None)
    check_config(base.config, loaded.name)
    return loaded


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse architectures whose attention is not causal self-attention throughout.

    Raises:
        InputError: encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model {name} ({config.model_type}) is an encoder-decoder:"
            " only causal (decoder-only) models can be captured"
        )


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language model, also inside a multimodal one."""
    return model.config.get_text_config(decoder=True)


def model_facts(model: PreTrainedModel, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What identifies a model: the `model` object of dumps and of anchors.json.

    `query_heads`, `kv_heads` and `head_dim` are the configuration's, None where it gives none or one per layer.
    `fingerprint` hashes the names and shapes of all parameters, the values of those with one dimension (norms, biases),
    rounded to bf16, and the signs of the first values of all others, so that a model loaded in another dtype or
    offloaded by accelerate keeps it and another training run does not. Adapters at work change it (their names do not),
    and so does merging them; disabled or inactive ones do not.

    Raises:
        InputError: an adapter that is no part of the model's layers (prompt learning and the like).
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
        "positions": max_positions(model),
        "fingerprint": digest.hexdigest(),
    }


def _shared(config: PretrainedConfig, name: str, otherwise: Any) -> Any:
    """A configuration's value, `otherwise` where it is unset, None where every layer has its own."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read it globally
        return None
    return otherwise if value is None else value


def name_of(model: PreTrainedModel) -> str:
    """A loaded model's id, or the last part of the folder it came from: dumps carry no local paths."""
    source = str(getattr(model, "name_or_path", "") or "")
    return (Path(source).name if Path(source).exists() else source) or type(model).__name__


def prefill_module(model: PreTrainedModel) -> nn.Module:
    """The module whose forward is a prefill without N x vocabulary logits: the model itself if it can keep one row of
    them, else its body without the head.
    """
    return model if "logits_to_keep" in inspect.signature(model.forward).parameters else model.base_model
