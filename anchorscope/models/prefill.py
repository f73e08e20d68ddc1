"""This module runs a model over a prompt, whole or in chunks with a KV cache, and never makes N x vocabulary logits."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.errors import InputError
from anchorscope.models.kvcache import continuation, result_cache
from anchorscope.models.placement import model_device
from anchorscope.models.positions import reset_rotations

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prefill:
    """How a prompt will be prefilled in chunks.

    Attributes:
        tokens: the prompt length N.
        chunk: the tokens of a full chunk.
        stops: the ends of the chunks; by default all but the last are full.
    """

    tokens: int
    chunk: int
    stops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stops:
            object.__setattr__(self, "stops", (*range(self.chunk, self.tokens, self.chunk), self.tokens))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the tokens of each chunk."""
        return tuple(b - a for a, b in pairwise((0, *self.stops)))

    def small(self, piece: int, most: int) -> tuple[int, ...]:
        """Return fewer and smaller chunks: none is longer than `piece`, and they hold at most `most` tokens.

        Sizes that do not exceed `piece` stay as they are, the last chunk's included.
        """
        size, last = min(self.chunk, piece), min(self.sizes[-1], piece)
        return (*[size] * min((most - last) // size, len(self.stops) - 1), last)


def forwards(model: PreTrainedModel, token_ids: Sequence[int], sizes: Sequence[int] | None = None) -> Iterator[Any]:
    """Run forwards over the ids, whole without a cache or in chunks of these sizes with one. Yield what each returns.

    Models that accept `logits_to_keep` compute one row of logits; for others the body runs without its head, so an N x
    vocabulary tensor never exists. Rotary modules that remember the longest prompt are reset.

    Raises:
        InputError: the model keeps no cache.
    """
    ids = torch.tensor([list(token_ids)], dtype=torch.long, device=model_device(model))
    runner = prefill_module(model)
    options: dict[str, Any] = {"logits_to_keep": 1} if runner is model else {}
    reset_rotations(model)
    if sizes is None or len(sizes) <= 1:
        with torch.inference_mode():
            result = runner(input_ids=ids, use_cache=False, **options)
        yield result
        return
    cache, start = None, 0
    for part in ids.split(list(sizes), dim=1):
        with torch.inference_mode():  # not around the `yield`: it would be the caller's mode too
            behind = continuation(runner, cache, start, part)
            result = runner(input_ids=part, use_cache=True, **behind, **options)
        cache, start = result_cache(result), start + part.shape[1]
        if cache is None:
            raise InputError(f"{type(model).__name__} keeps no KV cache: it cannot run in chunks")
        yield result


def last_forward(model: PreTrainedModel, token_ids: Sequence[int], sizes: Sequence[int] | None = None) -> Any:
    """Run all `forwards`, and return what the last one returns."""
    return deque(forwards(model, token_ids, sizes), maxlen=1).pop()


def prefill(model: PreTrainedModel, token_ids: Sequence[int], *, chunk: int | None = None) -> torch.Tensor | None:
    """Run the model over the ids; return the last position's logits (1, 1, vocabulary), or None if it cannot make one
    row.

    Models that accept `logits_to_keep` compute one row of logits; for others the body runs without its head, so an N x
    vocabulary tensor never exists. With `chunk`, a KV cache links chunks of that many tokens.
    """
    sizes = None if chunk is None else Prefill(len(token_ids), chunk).sizes
    return getattr(last_forward(model, token_ids, sizes), "logits", None)


def keeps_few_rows(model: PreTrainedModel) -> bool:
    """Return whether the model's forward can compute the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def prefill_module(model: PreTrainedModel) -> nn.Module:
    """Return the module whose forward makes one row of logits at most: the model, or its body without the head."""
    return model if keeps_few_rows(model) else model.base_model
