"""The KV cache in a model's forward and in its result, by the name that the installed transformers uses.

It was called `past_key_values` until transformers renamed it to `cache`; models that bring their own code keep the old
name.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

NAMES = ("cache", "past_key_values")


def cache_option(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to the module's forward; none for None."""
    return {} if cache is None else {_forward(module)[0]: cache}


def continuation(module: nn.Module, cache: Any, held: int, ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a forward over `ids` behind a cache: the cache, and the positions of the ids.

    Some hybrids would count positions by the cache of their first layer, which is a recurrent one and counts nothing.
    At the beginning, positions are the model's own.

    Args:
        module: whose forward it is.
        cache: what the forward before returned; None at the beginning.
        held: tokens that it holds.
        ids: (1, n) int64.
    """
    options = cache_option(module, cache)
    if options and "position_ids" in _forward(module)[1]:
        options["position_ids"] = torch.arange(held, held + ids.shape[1], device=ids.device)[None]
    return options


def _forward(module: nn.Module) -> tuple[str, Collection[str]]:
    """What a forward calls its cache, and the names of all it takes.

    A wrapper (an adapter, a compiled model) passes keywords on, so the first module inside that names a cache decides.
    """
    for inner in module.modules():
        parameters = inspect.signature(inner.forward).parameters
        for name in NAMES:
            if name in parameters:
                return name, parameters.keys()
    return NAMES[-1], ()


def result_cache(result: Any) -> Any:
    """The KV cache in what a forward returned, None where it keeps none."""
    for name in NAMES:
        # a renamed field is still readable by its old name, with a warning, so the new one is asked first
        cache = getattr(result, name, None)
        if cache is not None:
            return cache
    return None
