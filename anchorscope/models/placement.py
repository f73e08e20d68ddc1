"""These functions find a model's device, and its weights where accelerate keeps them outside the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_device(model: PreTrainedModel) -> torch.device:
    """Return the device where a model takes its input, even if accelerate keeps the weights elsewhere."""
    if model.device.type != "meta":
        return model.device
    inputs = model.get_input_embeddings()
    for module in (inputs, *model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return model.device


def stored_values(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a parameter of the model to its values, wherever accelerate keeps them.

    Parameters without values are returned as they are.
    """
    keepers = {
        id(parameter): (module._hf_hook, key)
        for module in model.modules()
        if hasattr(module, "_hf_hook")
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.device.type == "meta"
    }

    def values(parameter: torch.Tensor) -> torch.Tensor:
        hook, key = keepers.get(id(parameter), (None, ""))
        found = stored_tensor(hook, key)
        return parameter if found is None else found

    return values


def stored_tensor(hook: Any, key: str) -> torch.Tensor | None:
    """Return the values of a module's tensor `key` that accelerate keeps on the CPU or on disk, or None."""
    for one in getattr(hook, "hooks", (hook,)):  # accelerate chains several hooks in a SequentialHook
        weights = getattr(one, "weights_map", None)
        if weights is None:
            continue
        try:
            found: torch.Tensor = weights[key]
        except KeyError:
            continue
        if found.device.type != "meta":
            return found
    return None
