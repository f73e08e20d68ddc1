"""These functions translate the rotary embedding that a GGUF file states into transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.errors import InputError
from anchorscope.shown import counted

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
SCALING = "rope.scaling."
ROPE_KEYS = (
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.dimension_count",
    "rope.scale_linear",
    *(
        SCALING + name
        for name in (
            "type",
            "factor",
            "original_context_length",
            "attn_factor",
            "finetuned",
            "yarn_log_multiplier",
            "yarn_ext_factor",
            "yarn_attn_factor",
            "yarn_beta_fast",
            "yarn_beta_slow",
        )
    ),
)
DEFAULT_BASE = 10_000.0  # llama.cpp's, where a file says nothing
UNSET: dict[str, tuple[float, ...]] = {  # yarn's options at which nothing differs from transformers' formula
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0, -1.0),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
}


@dataclass(frozen=True)
class Rope:
    """What a GGUF file states about its rotary embedding.

    Attributes:
        values: the metadata, its keys without the architecture's name.
        tensors: the tensors among ROPE_TENSORS that the file has, each with one factor per pair of dimensions.
        context: how many positions the model has.
        rotated: how many dimensions are rotated.
        where: the file's name.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Sequence[float]]
    context: int
    rotated: int
    where: str

    def scaling(self, name: str, otherwise: Any = None) -> Any:
        """Return a metadata value whose key begins with rope.scaling, or `otherwise`."""
        return self.values.get(SCALING + name, otherwise)


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """Return the `rope_parameters` with which transformers computes exactly the file's frequencies.

    Raises:
        InputError: transformers has no formula for the file's scaling.
    """
    base = {"rope_theta": float(rope.values.get("rope.freq_base", DEFAULT_BASE))}
    kind, factor = rope.scaling("type", "none"), rope.scaling("factor", rope.values.get("rope.scale_linear"))
    if "rope.scale_linear" in rope.values and rope.scaling("type") is None:
        kind = "linear"
    for name, factors in rope.tensors.items():
        if len(factors) != rope.rotated // 2 or not all(math.isfinite(x) and x > 0 for x in factors):
            raise InputError(f"{rope.where}: {name} does not hold {counted(rope.rotated // 2, 'positive factor')}")
    if LONG in rope.tensors or SHORT in rope.tensors:
        return base | _longrope(rope)
    if FREQUENCIES in rope.tensors:
        if kind != "none" and factor not in (None, 0, 1):
            raise InputError(f"{rope.where} has both {FREQUENCIES} and rope scaling {kind!r}, which is not read")
        return base | _frequencies(rope, base["rope_theta"])
    if kind == "yarn":
        return base | _yarn(rope, factor)
    if kind == "linear":
        if not factor or factor <= 0:
            raise InputError(f"{rope.where}: rope scaling 'linear' has no factor")
        return base | ({"rope_type": "linear", "factor": float(factor)} if factor != 1 else {"rope_type": "default"})
    if kind in ("none", ""):
        return base | {"rope_type": "default"}
    raise InputError(f"{rope.where}: rope scaling {kind!r} is not read: give the model as safetensors")


def _yarn(rope: Rope, factor: Any) -> dict[str, Any]:
    for name, neutral in UNSET.items():
        value = rope.scaling(name)
        if value is not None and value not in neutral:
            raise InputError(
                f"{rope.where}: yarn with {SCALING}{name} = {value} is not read: give the model as safetensors"
            )
    if not factor or factor < 1:
        raise InputError(f"{rope.where}: rope scaling 'yarn' has no factor of at least 1")
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": rope.scaling("original_context_length", rope.context),
        "beta_fast": float(rope.scaling("yarn_beta_fast", 32.0)),
        "beta_slow": float(rope.scaling("yarn_beta_slow", 1.0)),
    }


def _longrope(rope: Rope) -> dict[str, Any]:
    original = rope.scaling("original_context_length")
    if not (LONG in rope.tensors and SHORT in rope.tensors and original):
        raise InputError(f"{rope.where} has not both long and short rope factors with the original context length")
    found = {
        "rope_type": "longrope",
        "long_factor": list(rope.tensors[LONG]),
        "short_factor": list(rope.tensors[SHORT]),
        "original_max_position_embeddings": original,
        "factor": rope.context / original,
    }
    attention = rope.scaling("attn_factor")
    return found if attention is None else {**found, "attention_factor": float(attention)}


def _frequencies(rope: Rope, base: float) -> dict[str, Any]:
    """Express divisors of the frequencies as Llama 3's formula where it gives them, else factor by factor."""
    factors = list(rope.tensors[FREQUENCIES])
    if all(abs(x - 1) < 1e-7 for x in factors):
        return {"rope_type": "default"}
    lengths = sorted({8192, *(1 << i for i in range(4, 18))})
    for original in (8192, *lengths):
        right = _llama3(base, rope.rotated, max(factors), original)
        if all(abs(a - b) <= 2e-6 * b for a, b in zip(factors, right, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": max(factors),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",  # the same factors at every length, and no other scale
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": rope.context,
    }


def _llama3(base: float, rotated: int, factor: float, original: int) -> list[float]:
    """Return Llama 3's divisors of the frequencies, with its own bounds of 1 and 4 rotations."""
    found = []
    for i in range(rotated // 2):
        rotations = original / (2 * math.pi * base ** (2 * i / rotated))
        smooth = min(max((rotations - 1.0) / 3.0, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found
