"""Capture: run a transformers model and write the Q, K and V its attention consumed as a dump."""

from __future__ import annotations

from anchorscope.capture.hook import AttentionCall, intercept
from anchorscope.capture.models import LoadedModel, load_model, model_facts
from anchorscope.capture.prompts import PromptInput, prompt_from_file, token_ids_from_file
from anchorscope.capture.run import CaptureProgress, capture_model, prefill
from anchorscope.capture.sdpa import capture_sdpa

__all__ = [
    "AttentionCall",
    "CaptureProgress",
    "LoadedModel",
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
