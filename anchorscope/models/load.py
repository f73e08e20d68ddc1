"""This module loads a model by its Hugging Face id, or from a local folder, a GGUF file or a preset."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from anchorscope.devices import resolve_device
from anchorscope.dtypes import torch_dtype
from anchorscope.errors import InputError, MissingBackendError
from anchorscope.files import visible
from anchorscope.models.adapters import unwrapped
from anchorscope.models.config import check_config
from anchorscope.models.facts import name_of
from anchorscope.models.gguf_config import Gguf, agree
from anchorscope.models.gguf_metadata import open_gguf
from anchorscope.models.hub import closed
from anchorscope.models.locate import Place, guarded, load_tokenizer, locate, no_conversion
from anchorscope.models.weights import check_materialized, check_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer (None if it has none) and the name to record.

    `loading` holds what the loader reported, JSON-able: `unexpected`, the names of the checkpoint's tensors that the
    model does not use, and `metadata`, what a GGUF file says about attention and what was made of it. It is empty for a
    model that was loaded elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    loading: Mapping[str, Any] = field(default_factory=dict)


OLDEST_TRANSFORMERS = (5, 22)  # pyproject.toml says the same


def require_transformers() -> None:
    """Make sure the extra `hf` is installed.

    Raises:
        MissingBackendError: it is not, or transformers is older than the oldest version that the tests cover.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingBackendError(f"capture needs transformers ({error}): pip install 'anchorscope[hf]'") from None
    if tuple(int(x) for x in transformers.__version__.split(".")[:2] if x.isdigit()) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MissingBackendError(
            f"capture needs transformers {oldest} or newer, not {transformers.__version__}:"
            " pip install -U 'anchorscope[hf]'"
        )


def transformers_version() -> str:
    """Return the version of transformers that runs the models."""
    import transformers

    return transformers.__version__


def quiet_transformers() -> None:
    """Keep transformers' own remarks and progress bars off the terminal. This is for programs that have their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(
    source: str,
    *,
    device: str = "auto",
    model_dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load model and tokenizer, in evaluation mode, on the device.

    Only safetensors and GGUF weights are read, never pickle. What the loader reports is part of the result.

    Args:
        source: a preset (`smollm2`), a `.gguf` file, a local folder, or a Hugging Face id; tried in this order.
        device: "auto", "cpu", "cuda" or "cuda:i".
        model_dtype: "bf16", "fp16" or "fp32"; by default what the checkpoint holds (fp32 for GGUF).
        revision: the revision of a Hugging Face id.
        trust_remote_code: run code that comes with the model; off unless the user says so.
        notify: receives remarks on downloads and on tensors of the checkpoint that the model does not use; None prints
            them on stderr.

    Raises:
        InputError: there is no such model, it is not a causal language model, its files are damaged, or its weights
            are missing, of another shape or stored as pickle.
        MissingBackendError: transformers, accelerate, gguf or the device is missing.
    """
    require_transformers()
    notify = notify or _on_stderr
    where = resolve_device(device)
    place = locate(source, revision, notify)
    dtype = "auto" if model_dtype is None else torch_dtype(model_dtype)
    if place.gguf is not None:
        dtype = torch_dtype(model_dtype or "fp32")
    common = {**place.options, "trust_remote_code": trust_remote_code}
    from transformers import AutoConfig

    file = None if place.gguf is None else Gguf.read(open_gguf(place.gguf), place.gguf)
    with closed(place.unreached):
        config = guarded(place, lambda: AutoConfig.from_pretrained(place.folder, **common))
        check_config(config, source)
        metadata = {} if file is None else agree(config, file)
        tokenizer = load_tokenizer(place, common, notify)
        with no_conversion():
            options = {"config": config, "dtype": dtype, "device_map": {"": str(where)}, **common}
            model, report = guarded(place, lambda: _weights(place, options))
    unexpected = check_report(report, source, notify)
    check_materialized(model, source)
    model.eval()
    return LoadedModel(
        model,
        tokenizer,
        place.name,
        getattr(config, "_commit_hash", None) or revision,
        {"unexpected": unexpected, "metadata": metadata},
    )


def _on_stderr(sentence: str) -> None:
    print(visible(sentence), file=sys.stderr)


def _weights(place: Place, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model with its weights, and the loader's report on them."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        place.folder,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are in the report, with their shapes
        output_loading_info=True,
        **options,
    )
    return cast("tuple[PreTrainedModel, dict[str, Any]]", found)


def ready_model(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **loading: Any) -> LoadedModel:
    """Load a model by name with `loading` (see `load_model`), or take one that is loaded already, with its tokenizer.

    Raises:
        InputError, MissingBackendError: as `load_model`.
    """
    if isinstance(model, str):
        return load_model(model, **loading)
    if isinstance(model, torch.nn.Module):
        check_materialized(model, name_of(model))
    base = pretrained(model)
    return LoadedModel(base, tokenizer, name_of(base), None)


def pretrained(model: Any) -> PreTrainedModel:
    """Return the transformers model itself, without the wrappers of torch.compile and PEFT.

    Raises:
        InputError: it is no decoder-only model of transformers, or an adapter is not part of its layers.
    """
    from transformers import PreTrainedModel

    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"AnchorScope needs a loaded transformers model, not {type(model).__name__}")
    check_config(model.config, name_of(model))
    return model
