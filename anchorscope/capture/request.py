"""A request says what to capture; its plan holds what is decided before the prompts run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.capture.recorder import LayerShape, ShapeProbe, Storage
from anchorscope.devices import resolve_device
from anchorscope.dtypes import torch_dtype
from anchorscope.dumps.writer import prompt_record, texts_record
from anchorscope.errors import InputError
from anchorscope.models.chunking import check_chunks
from anchorscope.models.config import text_config
from anchorscope.models.facts import model_facts
from anchorscope.models.hook import intercept
from anchorscope.models.language import language_only
from anchorscope.models.load import LoadedModel, ready_model, transformers_version
from anchorscope.models.locate import check_source
from anchorscope.models.placement import model_device
from anchorscope.models.positions import model_positions
from anchorscope.models.prefill import Prefill, prefill
from anchorscope.models.prompts import PromptInput, TokenizedPrompt, prompt_from_file, tokenize, unique_names
from anchorscope.models.proof import prove_model
from anchorscope.proof import ModelProof
from anchorscope.tokens import tokenizer_texts

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 2


@dataclass(frozen=True)
class CaptureRequest:
    """The prompts, layers and heads to capture, how they are stored, and how the model is loaded.

    Attributes:
        model: a preset, a `.gguf` file, a folder or a Hugging Face id, or a loaded transformers model.
        prompts: file paths or `PromptInput`s.
        tokenizer: the tokenizer of a loaded model.
        tokens: the prompt length N; longer prompts are cut, shorter ones are used whole. None uses each prompt whole.
        layers: layer indices; None means all that use softmax attention.
        kv_heads: the kv heads to keep, with the query heads that read them; None means all.
        dtype: the stored dtype "bf16", "fp16" or "fp32"; by default the run's.
        model_dtype: what the model computes in; by default its checkpoint's (ignored for a loaded model).
        device: "auto", "cpu", "cuda" or "cuda:i" (ignored for a loaded model).
        values: whether to keep V, which output errors need.
        chunk: prefill in chunks of this many tokens with a KV cache, for prompts that do not fit otherwise.
        chat: make each text a user's message in the tokenizer's chat template.
        special_tokens: let the tokenizer add its special tokens to texts, like one that begins a sequence.
        revision: the revision of a Hugging Face id.
        trust_remote_code: allow code that comes with the model.
    """

    model: str | PreTrainedModel
    prompts: Sequence[PromptInput | str | os.PathLike[str]]
    tokenizer: PreTrainedTokenizerBase | None = None
    tokens: int | None = None
    layers: Sequence[int] | None = None
    kv_heads: Sequence[int] | None = None
    dtype: str | None = None
    model_dtype: str | None = None
    device: str = "auto"
    values: bool = True
    chunk: int | None = None
    chat: bool = False
    special_tokens: bool = True
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def storage(self) -> Storage:
        """Return the part of each layer that the dump will hold."""
        kv_heads = None if self.kv_heads is None else tuple(sorted(set(self.kv_heads)))
        return Storage(kv_heads, self.dtype, self.values)

    def check(self) -> None:
        """Refuse what is wrong for every model.

        Raises:
            InputError: the argument is named.
        """
        for name, number, least in (("tokens", self.tokens, 2), ("chunk", self.chunk, 1)):
            if number is not None and (not isinstance(number, int) or number < least):
                raise InputError(f"{name} must be a whole number of at least {least}, not {number!r}")
        for name, chosen in (("layers", self.layers), ("kv_heads", self.kv_heads)):
            if chosen is not None and not chosen:
                raise InputError(f"{name} must name at least one")
        for dtype in (self.dtype, self.model_dtype):
            if dtype is not None:
                torch_dtype(dtype)
        if self.chat and not self.special_tokens:
            raise InputError("a chat template writes its own special tokens: drop --no-special-tokens or --chat")
        if not self.prompts:
            raise InputError("give at least one prompt")
        if self.chat and all(isinstance(p, PromptInput) and p.token_ids is not None for p in self.prompts):
            raise InputError("a chat template is for texts, and all prompts are token ids: leave out --chat")
        if isinstance(self.model, str):  # a loaded model is where it is
            resolve_device(self.device)
            check_source(self.model, self.revision)

    def read_prompts(self) -> list[PromptInput]:
        """Read the prompts from their files, and give them distinct names.

        Raises:
            InputError: a file cannot be read, or is not text.
        """
        return unique_names([p if isinstance(p, PromptInput) else prompt_from_file(p) for p in self.prompts])

    def plan(self, prompts: Sequence[PromptInput], tell: Callable[[str], None], *, refuse: bool = True) -> CapturePlan:
        """Load the model and try it on a few tokens: what cannot be captured is refused before the real work.

        Args:
            prompts: the result of `read_prompts`.
            tell: receives warnings and facts worth a line.
            refuse: where all layers are asked for, refuse a model that has one which cannot be captured. False leaves
                such layers out and to the caller, in `CapturePlan.refused`.

        Raises:
            InputError: the model, a prompt or a layer cannot be captured.
            MissingBackendError: transformers or the device is missing.
        """
        loaded = ready_model(
            self.model,
            self.tokenizer,
            device=self.device,
            model_dtype=self.model_dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            notify=tell,
        )
        known = prove_model(loaded.model, loaded.loading or None)
        for sentence in known.warnings:
            tell(f"warning: {sentence}")
        ready = self._tokenized(loaded, prompts, tell)
        shapes, refused = probe(loaded.model, ready[0].token_ids[:PROBE_TOKENS], self.layers, refuse=refuse)
        wanted = _pick_layers(loaded.model, shapes, self.layers, tell, refused)
        plan = CapturePlan(self, loaded, known, ready, {layer: shapes[layer] for layer in wanted}, refused)
        if self.chunk is not None:
            pieces = [Prefill(len(p.token_ids), self.chunk) for p in ready]
            check_chunks(loaded.model, plan.longest, wanted, pieces)
        _check_kv_heads(plan.shapes, self.kv_heads)
        return plan

    def _tokenized(
        self, loaded: LoadedModel, prompts: Sequence[PromptInput], tell: Callable[[str], None]
    ) -> tuple[TokenizedPrompt, ...]:
        ready = tuple(
            tokenize(
                prompt,
                loaded.tokenizer,
                tokens=self.tokens,
                positions=model_positions(loaded.model),
                vocabulary=getattr(loaded.model.get_input_embeddings(), "num_embeddings", None),
                chat=self.chat,
                special_tokens=self.special_tokens,
                notify=tell,
            )
            for prompt in prompts
        )
        seen: dict[tuple[int, ...], str] = {}
        for prompt in ready:
            first = seen.setdefault(prompt.token_ids, prompt.name)
            if first != prompt.name:
                tell(f"warning: prompts {first} and {prompt.name} are the same tokens")
        return ready


@dataclass(frozen=True)
class CapturePlan:
    """A capture whose model is loaded and has been tried.

    Attributes:
        request: what was asked for.
        loaded: the model.
        known: what is known about where its weights came from.
        prompts: what the model will read.
        shapes: the wanted layers in ascending order, and what their attention looks like.
        refused: why other layers cannot be captured, by index.
    """

    request: CaptureRequest
    loaded: LoadedModel
    known: ModelProof
    prompts: tuple[TokenizedPrompt, ...]
    shapes: dict[int, LayerShape]
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def longest(self) -> tuple[int, ...]:
        """Return the token ids of the longest prompt."""
        return max(self.prompts, key=lambda p: len(p.token_ids)).token_ids

    @property
    def total(self) -> int:
        """Return how many tensor files the dump will have: one for each layer of each prompt."""
        return len(self.prompts) * len(self.shapes)

    @property
    def bytes(self) -> int:
        """Return the size of the dump's tensor files."""
        storage = self.request.storage
        return sum(shape.bytes(len(p.token_ids), storage) for p in self.prompts for shape in self.shapes.values())

    def header(self) -> dict[str, Any]:
        """Return the manifest without its entries."""
        request, storage = self.request, self.request.storage
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        first = next(iter(self.shapes.values()))
        stored = {storage.dtype or shape.dtype for shape in self.shapes.values()}
        return {
            "model": {
                **model_facts(model, self.loaded.name, self.loaded.revision),
                "query_heads": first.heads,
                "kv_heads": first.kv_heads,
                "head_dim": first.head_dim,
            },
            "tokenizer": None if tokenizer is None else _tokenizer_facts(tokenizer),
            "dtype": stored.pop() if len(stored) == 1 else None,
            "capture": {
                "layers": list(self.shapes),
                "kv_heads": None if storage.kv_heads is None else list(storage.kv_heads),
                "values": storage.values,
                "chunk": request.chunk,
                "device": model_device(model).type,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers_version(),
                "chat": request.chat,
                "special_tokens": request.special_tokens,
            },
            "prompts": [
                prompt_record(p.name, len(p.token_ids), text=p.text, token_ids=p.token_ids) for p in self.prompts
            ],
            "proof": self.known.to_json(),
            **self._texts(),
        }

    def _texts(self) -> dict[str, Any]:
        """What the tokens of the prompts say, where a tokenizer knows it."""
        tokenizer = self.loaded.tokenizer
        used = {i for p in self.prompts for i in p.token_ids}
        return {} if tokenizer is None else texts_record(tokenizer_texts(tokenizer, used), used)


def probe(
    model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[int] | None, *, refuse: bool = True
) -> tuple[dict[int, LayerShape], dict[int, str]]:
    """Learn the shape of every layer that makes a softmax attention call, in a trial run of a few tokens.

    Returns:
        The shapes, and why other layers cannot be captured, both by index.

    Raises:
        InputError: no layer makes one, or Q, K and V cannot represent a wanted layer (all are wanted where `layers` is
            None, unless `refuse` is off).
    """
    sink = ShapeProbe()
    with intercept(model, language_only(model, sink)):
        prefill(model, token_ids)
    for layer, reason in sorted(sink.refused.items()):
        if (layers is None and (refuse or not sink.shapes)) or (layers is not None and layer in layers):
            raise InputError(reason)
    if not sink.shapes:
        raise InputError(
            f"{type(model).__name__} never called transformers' attention interface,"
            " so there is nothing to capture:"
            " its attention is not softmax attention, or its code does not use the interface"
        )
    return sink.shapes, sink.refused


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)}


def _pick_layers(
    model: PreTrainedModel,
    shapes: dict[int, LayerShape],
    layers: Sequence[int] | None,
    tell: Callable[[str], None],
    refused: Mapping[int, str],
) -> list[int]:
    count = getattr(text_config(model), "num_hidden_layers", None) or max(shapes) + 1
    if layers is None:
        others = sorted(set(range(count)) - shapes.keys() - refused.keys())
        if others:
            tell(f"layers {', '.join(map(str, others))} use no softmax attention and are left out")
        return sorted(shapes)
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer} is out of range: the model has layers 0 to {count - 1}")
        if layer not in shapes:
            raise InputError(f"layer {layer} uses no softmax attention; layers {sorted(shapes)} do")
    return sorted(set(layers))


def _check_kv_heads(shapes: dict[int, LayerShape], kv_heads: Sequence[int] | None) -> None:
    for layer, shape in shapes.items():
        for head in kv_heads or ():
            if not 0 <= head < shape.kv_heads:
                last = shape.kv_heads - 1
                raise InputError(f"kv head {head} is out of range: layer {layer} has kv heads 0 to {last}")
