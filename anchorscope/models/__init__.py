"""This package loads a transformers model, runs it over a prompt, and watches or replaces its attention."""

from __future__ import annotations

from anchorscope.models.calls import AttentionCall
from anchorscope.models.facts import model_facts
from anchorscope.models.hook import intercept
from anchorscope.models.load import LoadedModel, load_model
from anchorscope.models.prefill import prefill
from anchorscope.models.prompts import PromptInput, prompt_from_file, token_ids_from_file

__all__ = [
    "AttentionCall",
    "LoadedModel",
    "PromptInput",
    "intercept",
    "load_model",
    "model_facts",
    "prefill",
    "prompt_from_file",
    "token_ids_from_file",
]
