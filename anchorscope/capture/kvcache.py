"""The KV cache in a model's forward and in its result, by the name that the installed transformers uses.

It was called `past_key_values` until transformers renamed it to `cache`; models that bring their own code keep the old
name.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NAMES = ("cache", "past_key_values")


def cache_option(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to the module's forward; none for None.

    A wrapper (an adapter, a compiled model) passes keywords on, so the first module inside that names one decides.
    """
    if cache is None:
        return {}
    for inner in module.modules():
        parameters = inspect.signature(inner.forward).parameters
        for name in NAMES:
            if name in parameters:
                return {name: cache}
    return {NAMES[-1]: cache}


def result_cache(result: Any) -> Any:
    """The KV cache in what a forward returned, None where it keeps none."""
    for name in NAMES:
        # a renamed field is still readable by its old name, with a warning, so the new one is asked first
        cache = getattr(result, name, None)
        if cache is not None:
            return cache
    return None
