"""These checks read the loader's report on a checkpoint's tensors, and refuse random numbers in their place by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from anchorscope.errors import InputError
from anchorscope.models.placement import stored_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 4  # tensor names in one sentence
PREFIXES = {  # what other programs put before a tensor's name
    "_orig_mod.": "it was saved from a compiled model",
    "base_model.model.": "it was saved from a model with an adapter",
    "module.": "it was saved from a parallel wrapper",
    "_fsdp_wrapped_module.": "it was saved from a parallel wrapper",
}

SCALES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".SCB",
    ".scales",
    ".qzeros",
)  # quantization


def check_report(report: Mapping[str, Any], source: str, notify: Callable[[str], None]) -> list[str]:
    """Refuse a checkpoint that left parts of the model untouched, since the loader fills those with random numbers.

    Tied weights, buffers that are computed, and what the model's class declares optional are no part of the report.

    Args:
        report: the `output_loading_info` of `from_pretrained`.
        source: the model, as the user named it.
        notify: told about tensors that the model has no use for.

    Returns:
        The checkpoint's tensors that the model does not use, sorted.

    Raises:
        InputError: tensors are missing, have another shape than the model's, or are quantized without the config's
            knowledge, so that their scales would be dropped.
    """
    missing = sorted(report.get("missing_keys", ()))
    unexpected = sorted(report.get("unexpected_keys", ()))
    mismatched = sorted(
        (name, tuple(found), tuple(wanted)) for name, found, wanted in report.get("mismatched_keys", ())
    )
    wrong = []
    if missing:
        wrong.append(f"{_count(missing, 'tensor')} missing ({listed(missing)})")
    if mismatched:
        shapes = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in mismatched]
        wrong.append(f"{_count(mismatched, 'tensor')} of another shape ({listed(shapes)})")
    if wrong:
        hint = _hint(unexpected) if missing else ""
        raise InputError(
            f"the weights of model {source} are not whole: {' and '.join(wrong)}{hint};"
            " random numbers would stand in their place, so give a checkpoint that matches its config"
        )
    scales = [name for name in unexpected if name.endswith(SCALES)]
    if scales:
        raise InputError(
            f"the weights of model {source} are quantized and their scales would be left out ({listed(scales)}), since"
            " its config names no matching quantization_config: give the config.json that was saved with these weights"
        )
    if unexpected:
        notify(
            f"warning: model {source} does not use {_count(unexpected, 'tensor')} of its checkpoint"
            f" ({listed(unexpected)}): check that its config is the right one"
        )
    return unexpected


def check_materialized(model: PreTrainedModel, name: str) -> None:
    """Refuse a loaded model if some of its weights have no values.

    Raises:
        InputError: tensors are on the meta device, and no hook of accelerate brings their values.
    """
    empty = []
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.device.type == "meta" and stored_tensor(hook, key) is None:
                empty.append(f"{prefix}.{key}" if prefix else key)
    if empty:
        raise InputError(
            f"{name} has {_count(empty, 'weight')} without values, on the device meta ({listed(empty)}):"
            " load it with from_pretrained"
        )


def listed(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _count(things: list[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _hint(unexpected: list[str]) -> str:
    """Say why the names do not match, where the checkpoint's own names show it."""
    for prefix, reason in PREFIXES.items():
        if any(prefix in name for name in unexpected):
            return f", while the checkpoint's names hold {prefix!r}: {reason}; save it again without"
    if unexpected:
        return f", while {_count(unexpected, 'tensor')} of the checkpoint fit nowhere ({listed(unexpected)})"
    return ""
