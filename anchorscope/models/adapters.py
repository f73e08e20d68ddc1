"""Adapters of weights (LoRA and similar) count as part of a model with PEFT adapters; others are refused.

An adapter of weights sits inside the base model's modules, so the base model runs it. Everything else that PEFT offers
happens in its wrapper or beside attention: virtual tokens before the prompt, a second attention, weights mixed per
prompt. Q, K and V of the base model would then not be those of the model that the user runs.

PEFT is never imported: a model that has its modules brought it along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.errors import InputError
from anchorscope.models.placement import stored_values

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

TRIED = 8  # tokens on which a wrapper and its base model must agree
VALUES = 4096  # at most so many values of each matrix enter a fingerprint
PER_PROMPT = ("XLORA", "POLY")


def unwrapped(model: Any) -> Any:
    """Return the model that attends, without the wrappers of torch.compile and PEFT around it.

    Raises:
        InputError: an adapter is at work that its base model does not contain.
    """
    model = getattr(model, "_orig_mod", model)
    while _from_peft(model) and not hasattr(model, "get_base_model"):  # PeftMixedModel, and tuners without a wrapper
        parts = dict(model.named_children())
        model = parts["base_model"] if "base_model" in parts else parts["model"]
    if _from_peft(model) and hasattr(model, "get_base_model"):
        model = _unwrapped_peft(model)
    if isinstance(model, torch.nn.Module):
        for module in model.modules():
            if type(module).__module__.startswith("peft.tuners.adaption_prompt"):
                raise _refused("ADAPTION_PROMPT", "adds a second attention, to learned tokens, to that of each layer")
    return model


def parameters_of(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of the model as it is without adapters, sorted by name."""
    inside = _inside(model)
    return sorted(((base, parameter) for base, owner, _, parameter in inside if owner is None), key=lambda x: x[0])


def adapters_at_work(model: PreTrainedModel) -> str:
    """Return a hash of the adapters that change what the model computes, or '' where there are none.

    It covers the kind of each adapted layer, and names, shapes, scaling and the first values of its parameters, rounded
    to bf16. Adapters that are loaded but not active, or disabled, do not count; ones merged into the weights do.
    """
    digest = hashlib.sha256()
    found, stored = False, stored_values(model)
    for base, owner, rest, parameter in sorted(_inside(model), key=lambda x: (x[0], x[2])):
        if owner is None:
            continue
        names = _effective(owner)
        used = [name for name in names if name in rest.split(".")]
        if not used:
            continue
        found = True
        scaling = getattr(owner, "scaling", None)
        scale = scaling.get(used[0]) if isinstance(scaling, dict) else None
        plain = ".".join("*" if part == used[0] else part for part in rest.split("."))  # its name does not count
        digest.update(f"{base}{type(owner).__name__}{plain}{tuple(parameter.shape)}{scale}".encode())
        value = stored(parameter)
        if value.device.type != "meta":
            values = _first(value, VALUES).to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if found else ""


def signs_of(parameter: Tensor) -> bytes:
    """Return the signs of a matrix's first values as bytes. No dtype changes them; merging or training does."""
    if not parameter.is_floating_point() or parameter.device.type == "meta":
        return b""
    return bytes(torch.signbit(_first(parameter, VALUES).float()).to("cpu", torch.uint8).numpy())


def _first(parameter: Tensor, count: int) -> Tensor:
    """Return the first values of a tensor, without copying all of it."""
    part = parameter.detach()
    while part.ndim > 2:
        part = part[0]
    if part.ndim == 2:
        part = part[: -(-count // max(1, part.shape[1]))]
    return part.reshape(-1)[:count]


def _unwrapped_peft(wrapper: Any) -> Any:
    base = wrapper.get_base_model()
    if getattr(wrapper, "_adapters_disabled", False):
        return base
    active = getattr(wrapper, "active_adapters", None) or [wrapper.active_adapter]
    for name in [active] if isinstance(active, str) else active:
        config = wrapper.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise _refused(kind, "puts learned tokens before the prompt, which are not among the prompt's own")
        if config.is_adaption_prompt:
            raise _refused(kind, "adds a second attention, to learned tokens, to that of each layer")
        if kind in PER_PROMPT or getattr(config, "alora_invocation_tokens", None):
            raise _refused(kind, "decides for each prompt what it does, outside of the model's layers")
    if not wrapper.training and _differs(wrapper, base):
        raise _refused("/".join(str(c.peft_type) for c in wrapper.peft_config.values()), "changes what comes out of it")
    return base


def _differs(wrapper: nn.Module, base: PreTrainedModel) -> bool:
    """Return whether the wrapper's logits differ from its base model's."""
    ids = torch.arange(1, TRIED + 1, device=base.device)[None]
    with torch.inference_mode():
        ours, theirs = (x(input_ids=ids, use_cache=False).logits for x in (base, wrapper))
    return ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)


def _refused(kind: str, what: str) -> InputError:
    return InputError(
        f"the {kind} adapter {what}, so Q, K and V of the base model are not those of this model: merge it if it can be"
        " merged, take an adapter of weights (LoRA and its kin), or give the base model (get_base_model(), or disable"
        " the adapter)"
    )


def _from_peft(module: Any) -> bool:
    return type(module).__module__.split(".")[0] == "peft"


def _inside(model: PreTrainedModel) -> Iterator[tuple[str, Any, str, nn.Parameter]]:
    """Yield each parameter's name without wrappers, the layer that it adapts (or None), its name there, and itself."""
    wrappers = {name: m for name, m in model.named_modules() if _from_peft(m) and _wraps(m) is not None}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        plain: list[str] = []
        path: list[str] = []
        owner: Any = None
        rest = ""
        for i, part in enumerate(parts):
            around = wrappers.get(".".join(path))
            path.append(part)
            if around is None:
                plain.append(part)
            elif part != _wraps(around):
                owner, rest = around, ".".join(parts[i:])
                break
        yield ".".join(plain), owner, rest, parameter


def _wraps(module: Any) -> str | None:
    """Return the attribute in which an adapted layer keeps the layer it adapts, or None."""
    return next((x for x in ("base_layer", "original_module") if x in dict(module.named_children())), None)


def _effective(layer: Any) -> list[str]:
    """Return the names of the adapters that change what a layer computes."""
    if getattr(layer, "disable_adapters", False):
        return []
    merged = list(getattr(layer, "merged_adapters", None) or [])
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or []
    return merged or ([active] if isinstance(active, str) else list(active))
