"""This package runs a transformers model and writes the Q, K and V that its attention consumed as a dump."""

from __future__ import annotations

from anchorscope.capture.run import CaptureProgress, capture_model
from anchorscope.capture.sdpa import capture_sdpa
from anchorscope.capture.source import ModelSource
from anchorscope.models import (
    AttentionCall,
    LoadedModel,
    PromptInput,
    intercept,
    load_model,
    model_facts,
    prefill,
    prompt_from_file,
    token_ids_from_file,
)
from anchorscope.moved import moved_modules

__all__ = [
    "AttentionCall",
    "CaptureProgress",
    "LoadedModel",
    "ModelSource",
    "PromptInput",
    "capture_model",
    "capture_sdpa",
    "intercept",
    "load_model",
    "model_facts",
    "prefill",
    "prompt_from_file",
    "token_ids_from_file",
]

_HOMES = {  # old module -> the modules of anchorscope.models that have its names now
    "adapters": ("adapters",),
    "check": ("check",),
    "chunking": ("prefill", "chunking"),
    "damage": ("damage",),
    "gguf_config": ("gguf_config",),
    "gguf_metadata": ("gguf_metadata",),
    "gguf_rope": ("gguf_rope",),
    "hook": ("calls", "hook"),
    "kvcache": ("kvcache",),
    "language": ("language",),
    "memory": ("memory",),
    "models": ("facts", "prefill", "config", "load"),
    "positions": ("positions",),
    "presets": ("presets",),
    "prompts": ("prompts",),
    "proof": ("proof",),
    "sources": ("locate",),
    "weights": ("placement", "weights"),
}
moved_modules(__name__, {old: [f"anchorscope.models.{x}" for x in new] for old, new in _HOMES.items()})
