"""Statements of a GGUF file about attention are put into the configuration that transformers makes of the file.

transformers drops most of them without a word: rope scaling, per-dimension frequencies, windows, head sizes. The
conventions are llama.cpp's, whose converter writes the files. An architecture is admitted once a test shows that the
same weights give the same logits from GGUF and from safetensors (tests/models/test_gguf.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.errors import InputError
from anchorscope.models.gguf_metadata import contents
from anchorscope.models.gguf_rope import ROPE_KEYS, ROPE_TENSORS, Rope, rope_parameters
from anchorscope.shown import counted

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig

NORMS = ("attn_norm.weight", "ffn_norm.weight")
SPLIT = tuple(f"attn_{x}.weight" for x in ("q", "k", "v", "output"))
GATED = tuple(f"ffn_{x}.weight" for x in ("gate", "up", "down"))
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
POST = ("post_attention_norm.weight", "post_ffw_norm.weight")
DENSE = (*NORMS, *SPLIT, *GATED)
BIASES = {  # groups of biases that a configuration can switch on, all or none
    "attention_bias": tuple(f"attn_{x}.bias" for x in ("q", "k", "v", "output")),
    "mlp_bias": tuple(f"ffn_{x}.bias" for x in ("gate", "up", "down")),
}
BLOCK_TENSORS = {  # the tensors of a layer that transformers reads
    "llama": DENSE,
    "qwen2": (*DENSE, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": (*DENSE, *QK_NORMS),
    "gemma2": (*DENSE, *POST),
    "gemma3": (*DENSE, *POST, *QK_NORMS),
    "phi3": (*NORMS, "attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
}
SHARED_TENSORS = {"token_embd.weight", "output_norm.weight", "output.weight", *ROPE_TENSORS}
ATTRIBUTES = {  # metadata that has one counterpart in the configuration
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
HANDLED = {*ATTRIBUTES, *ROPE_KEYS, "attention.key_length", "attention.value_length", "attention.sliding_window"}
HANDLED |= {"attention.causal", "vocab_size", "attention.sliding_window_pattern"}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # metadata that changes nothing at these values, and is refused at others
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.shared_kv_layers": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "nextn_predict_layers": (0,),
}
REQUIRED = (
    "attention.head_count",
    "attention.head_count_kv",  # without it transformers leaves Q and K in llama.cpp's order
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
)
WINDOWED = ("gemma2", "gemma3", "phi3")
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models that scale scores by hidden size / heads


@dataclass(frozen=True)
class Gguf:
    """One GGUF file: its architecture, and its metadata under the architecture's name."""

    reader: GGUFReader
    where: str
    architecture: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, reader: GGUFReader, path: Path) -> Gguf:
        """Take the metadata out of a file, before transformers reads it.

        Raises:
            InputError: an architecture that is not admitted, or a statement or a tensor that transformers' loader would
                ignore; it is named.
        """
        architecture = contents(reader, "general.architecture")
        if architecture not in BLOCK_TENSORS:
            raise InputError(
                f"{path}: GGUF files of architecture {architecture!r} are not read, since transformers' loader of them"
                f" is not proven here (those of {', '.join(BLOCK_TENSORS)} are): give the model as safetensors"
            )
        values: dict[str, Any] = {}
        for name in reader.fields:
            if name.startswith(f"{architecture}."):
                key, value = name.removeprefix(f"{architecture}."), contents(reader, name)
                if isinstance(value, list) and key != "attention.sliding_window_pattern":
                    raise InputError(f"{path}: {name} is given layer by layer, which transformers' loader cannot read")
                values[key] = value
        file = cls(reader, str(path), architecture, values)
        for key in REQUIRED:
            if not file.need(key):
                raise InputError(f"{path}: {architecture}.{key} is {values[key]!r}, which no model has")
        _refuse_unknown(file)
        return file

    def need(self, key: str) -> Any:
        """Return a value that every such file must have."""
        if key not in self.values:
            raise InputError(f"{self.where} is incomplete: it has no {self.architecture}.{key}")
        return self.values[key]


def agree(config: PretrainedConfig, file: Gguf) -> dict[str, Any]:
    """Make the configuration say what the file says.

    Args:
        config: what transformers read from the file; it is changed.
        file: the file's own statements.

    Returns:
        JSON-able: `architecture`, `keys` (what the file says under that name), and `set`, the settings that
        transformers had otherwise, as they are now.

    Raises:
        InputError: the file asks for something that transformers cannot do; it is named.
    """
    wanted = {attribute: file.values[key] for key, attribute in ATTRIBUTES.items() if key in file.values}
    heads, hidden = file.need("attention.head_count"), file.need("embedding_length")
    head_dim = file.values.get("attention.key_length", hidden // heads)
    if file.values.get("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.where}: keys and values of different sizes are not read by transformers' loader")
    wanted["head_dim"] = head_dim
    wanted.update(_windows(file), **_scale(file, heads, hidden, head_dim), **_biases(file))
    wanted["rope_parameters"] = _rope(file, head_dim)
    if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
        wanted["pad_token_id"] = None  # a default of the class, not the file's
    changed = {}
    for name, value in wanted.items():
        if not _same(getattr(config, name, None), value):
            changed[name] = value
        setattr(config, name, value)
    if "original_max_position_embeddings" in wanted["rope_parameters"] and file.architecture == "phi3":
        config.original_max_position_embeddings = wanted["rope_parameters"]["original_max_position_embeddings"]
    return {"architecture": file.architecture, "keys": file.values, "set": changed}


def _refuse_unknown(file: Gguf) -> None:
    for key, value in file.values.items():
        if key in HANDLED or (key in NEUTRAL and value in NEUTRAL[key]):
            continue
        raise InputError(
            f"{file.where}: {file.architecture}.{key} = {value!r} is ignored by transformers' loader"
            ": give the model as safetensors"
        )
    if file.values.get("attention.causal", True) is not True:
        raise InputError(f"{file.where}: {file.architecture}.attention.causal is false; only causal models are read")
    count, known = file.need("block_count"), (*BLOCK_TENSORS[file.architecture], *_bias_names(file))
    for tensor in file.reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name)
        good = tensor.name in SHARED_TENSORS if block is None else int(block[1]) < count and block[2] in known
        if not good:
            raise InputError(
                f"{file.where}: the tensor {tensor.name} has no place in a model of {counted(count, 'layer')}"
                f" of transformers'"
                f" {file.architecture}: its loader would ignore it, so give the model as safetensors"
            )


def _bias_names(file: Gguf) -> tuple[str, ...]:
    return sum(BIASES.values(), ()) if file.architecture == "llama" else ()


def _biases(file: Gguf) -> dict[str, Any]:
    """Return the settings that make room for biases, which the file's metadata does not mention."""
    if file.architecture != "llama":
        return {}
    found = {tensor.name for tensor in file.reader.tensors}
    wanted = {}
    for setting, names in BIASES.items():
        there = [name for name in names if f"blk.0.{name}" in found]
        if there and len(there) < len(names):
            raise InputError(
                f"{file.where} has {', '.join(there)} in its layers but not the other biases, which transformers'"
                " llama cannot hold: give the model as safetensors"
            )
        wanted[setting] = bool(there)
    return wanted


def _windows(file: Gguf) -> dict[str, Any]:
    window, count = file.values.get("attention.sliding_window"), file.need("block_count")
    if file.architecture not in WINDOWED:
        if window and window < file.need("context_length"):
            raise InputError(f"{file.where}: a sliding window of {window} is not read by transformers' loader")
        return {"sliding_window": None}
    if file.architecture == "phi3":
        return {"sliding_window": window or None}
    pattern = file.values.get("attention.sliding_window_pattern", 2 if file.architecture == "gemma2" else 6)
    if isinstance(pattern, list):
        local = [bool(x) for x in pattern]
    else:
        local = [(i + 1) % pattern != 0 for i in range(count)]
    if len(local) != count:
        raise InputError(
            f"{file.where}: the pattern of sliding windows has {counted(len(local), 'layer')}, not {count}"
        )
    types = ["sliding_attention" if x else "full_attention" for x in local]
    return {"sliding_window": file.need("attention.sliding_window"), "layer_types": types}


def _scale(file: Gguf, heads: int, hidden: int, head_dim: int) -> dict[str, Any]:
    """Return the setting that scales the scores; llama.cpp derives it from the size of the model."""
    if file.architecture not in LARGEST:
        return {}
    largest = file.need("block_count") == LARGEST[file.architecture]
    return {"query_pre_attn_scalar": hidden // heads if largest else head_dim}


def _rope(file: Gguf, head_dim: int) -> dict[str, Any]:
    tensors = {t.name: [float(x) for x in t.data] for t in file.reader.tensors if t.name in ROPE_TENSORS}
    rotated = file.values.get("rope.dimension_count", head_dim)
    if rotated != head_dim and file.architecture != "phi3":
        raise InputError(
            f"{file.where}: {rotated} of {head_dim} dimensions are rotated, which transformers cannot load"
        )
    own = rope_parameters(Rope(file.values, tensors, file.need("context_length"), rotated, file.where))
    if file.architecture == "phi3":
        own["partial_rotary_factor"] = rotated / head_dim
    if file.architecture != "gemma3":
        return own
    local = {"rope_type": "default", "rope_theta": float(file.values.get("rope.freq_base_swa", 10_000.0))}
    return {"full_attention": own, "sliding_attention": local}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        return left is not None and right is not None and abs(left - right) <= 1e-6 * abs(right)
    return bool(left == right)
