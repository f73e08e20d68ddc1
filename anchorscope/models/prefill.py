"""The forward over a prompt: whole, or in chunks with a KV cache between them; never with N x vocabulary logits."""

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
    """A prefill to come, in pieces.

    Attributes:
        tokens: of the prompt.
        chunk: tokens of a piece.
        stops: where the pieces end; by default all but the last are full.
    """

    tokens: int
    chunk: int
    stops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stops:
            object.__setattr__(self, "stops", (*range(self.chunk, self.tokens, self.chunk), self.tokens))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each piece."""
        return tuple(b - a for a, b in pairwise((0, *self.stops)))

    def small(self, piece: int, most: int) -> tuple[int, ...]:
        """Fewer and smaller pieces of the same kind: none is longer than `piece`, and they hold at most `most` tokens.

        Sizes that do not exceed `piece` are the real ones, the last piece's included.
        """
        size, last = min(self.chunk, piece), min(self.sizes[-1], piece)
        return (*[size] * min((most - last) // size, len(self.stops) - 1), last)


def feed(model: PreTrainedModel, token_ids: Sequence[int], sizes: Sequence[int] | None = None) -> Iterator[Any]:
    """Forwards over the ids, whole without a cache or in pieces of these sizes with one; yields what each returns.

    Models that accept `logits_to_keep` compute one row of logits; for others the body runs without its head, so an N x
    vocabulary tensor never exists. Rotations that remember the longest prompt begin anew.

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


def run(model: PreTrainedModel, token_ids: Sequence[int], sizes: Sequence[int] | None = None) -> Any:
    """`feed` to its end; returns what the last forward does."""
    return deque(feed(model, token_ids, sizes), maxlen=1).pop()


def prefill(model: PreTrainedModel, token_ids: Sequence[int], *, chunk: int | None = None) -> torch.Tensor | None:
    """One forward over the ids; logits of the last position (1, 1, vocabulary), or None where the model has no such
    option.

    Models that accept `logits_to_keep` compute one row of logits; for others the body runs without its head, so an N x
    vocabulary tensor never exists. With `chunk`, a KV cache carries the prompt forward piece by piece.
    """
    sizes = None if chunk is None else Prefill(len(token_ids), chunk).sizes
    return getattr(run(model, token_ids, sizes), "logits", None)


def keeps_few_rows(model: PreTrainedModel) -> bool:
    """Whether the model's forward can make the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def prefill_module(model: PreTrainedModel) -> nn.Module:
    """The module whose forward is a prefill without N x vocabulary logits: the model itself if it can keep one row of
    them, else its body without the head.
    """
    return model if keeps_few_rows(model) else model.base_model
