"""A tiny random model and a tokenizer of single bytes, so that a token's place in the text is known."""

from __future__ import annotations

from typing import Any

import transformers
from families import tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token per byte; sequences begin with <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<bos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")
    made.chat_template = TEMPLATE
    return made


def byte_model(family: str = "llama", **changes: Any) -> Any:
    """A tiny model with a token per byte and 2,048 positions, never ending an answer."""
    return tiny(family, vocab_size=260, max_position_embeddings=2048, eos_token_id=None, **changes)
