"""This package runs a transformers model with anchor attention in place of its own prefill attention."""

from __future__ import annotations

from anchorscope.runtime.attend import SparseRun
from anchorscope.runtime.run import attention_clock, register_attention, sparse_attention
from anchorscope.runtime.usage import LayerUse

__all__ = ["LayerUse", "SparseRun", "attention_clock", "register_attention", "sparse_attention"]
