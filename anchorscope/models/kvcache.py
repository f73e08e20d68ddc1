"""These functions hand a KV cache to a model, and take it back, by the name that the installed transformers uses.

The name was `past_key_values` until transformers changed it to `cache`; models that bring their own code keep the old
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
    """Return the keyword argument that hands `cache` to the module's forward; none for None."""
    return {} if cache is None else {_forward(module)[0]: cache}


def continuation(module: nn.Module, cache: Any, held: int, ids: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments that continue a cache: the cache, and the positions of the next ids.

    Some hybrids would count positions by the cache of their first layer, which is recurrent and counts nothing. Without
    a cache, the model counts positions itself.

    Args:
        module: the module that runs.
        cache: the cache that the last forward returned; None before the first.
        held: how many tokens the cache holds.
        ids: (1, n) int64.
    """
    options = cache_option(module, cache)
    if options and "position_ids" in _forward(module)[1]:
        options["position_ids"] = torch.arange(held, held + ids.shape[1], device=ids.device)[None]
    return options


def _forward(module: nn.Module) -> tuple[str, Collection[str]]:
    """Return the name of the cache among a forward's parameters, and all their names.

    A wrapper (an adapter, a compiled model) passes keywords on, so the first module inside that names a cache decides.
    """
    for inner in module.modules():
        parameters = inspect.signature(inner.forward).parameters
        for name in NAMES:
            if name in parameters:
                return name, parameters.keys()
    return NAMES[-1], ()


def result_cache(result: Any) -> Any:
    """Return the KV cache in a forward's result, or None where the model keeps none."""
    for name in NAMES:
        # a renamed field can still be read by its old name, with a warning, so the new name is asked first
        cache = getattr(result, name, None)
        if cache is not None:
            return cache
    return None
