"""`capture_model`: run a model on prompts and write what its attention consumed as a dump."""

from __future__ import annotations

import contextlib
import logging
import platform
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.capture.recorder import LayersDone, LayerShape, Recorder, ShapeProbe
from anchorscope.devices import is_out_of_memory
from anchorscope.dtypes import torch_dtype
from anchorscope.dumps.format import read_manifest
from anchorscope.dumps.reader import Dump
from anchorscope.dumps.writer import (
    DumpWriter,
    check_disk,
    check_output,
    prompt_record,
)
from anchorscope.errors import AnchorScopeError, InputError, Interrupted, RunFailure
from anchorscope.files import human_bytes
from anchorscope.models.chunking import CacheWatch, check_chunks
from anchorscope.models.facts import model_facts, text_config
from anchorscope.models.hook import AttentionCall, intercept
from anchorscope.models.language import language_only
from anchorscope.models.load import LoadedModel, ready_model, require_transformers
from anchorscope.models.memory import Curve, free_bytes, logits_bytes, prefill_curve, weight_bytes
from anchorscope.models.placement import model_device
from anchorscope.models.positions import model_positions
from anchorscope.models.prefill import Prefill, prefill
from anchorscope.models.prompts import PromptInput, TokenizedPrompt, prompt_from_file, tokenize, unique_names
from anchorscope.models.proof import NextTokens, keeps_few_rows, prove_model, prove_prompt, runs_to_end
from anchorscope.proof import SCORED

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PROBE_TOKENS = 2


@dataclass(frozen=True)
class CaptureProgress:
    """Where a capture is: `done` of `total` layers (over all prompts) are on disk; `prompt` is being run."""

    prompt: str
    done: int
    total: int


def capture_model(
    model: str | PreTrainedModel,
    prompts: Sequence[PromptInput | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int | None = None,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    dtype: str | None = None,
    model_dtype: str | None = None,
    device: str = "auto",
    values: bool = True,
    chunk: int | None = None,
    chat: bool = False,
    special_tokens: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[CaptureProgress], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Dump:
    """Prefill each prompt and write Q, K and V of the wanted layers, as attention consumed them.

    Every layer is checked as it passes (mask, options, a few output rows recomputed), streamed to the disk head by
    head and released, so the memory above a plain forward is about one head. Logits are computed for the last position
    at most. A trial run of two tokens learns the layers' shapes first: what cannot be captured, or does not fit on the
    disk, is refused before the real work.

    Args:
        model: a preset, a `.gguf` file, a folder or a Hugging Face id, or a loaded transformers model.
        prompts: file paths or `PromptInput`s.
        out: the dump's folder.
        tokenizer: for a loaded model.
        tokens: prompt length N; longer prompts are cut, shorter ones used whole. None: each prompt whole.
        layers: layer indices; None means all that use softmax attention.
        kv_heads: kv heads to keep, with the query heads that read them; None means all.
        dtype: stored dtype "bf16", "fp16" or "fp32"; by default the run's.
        model_dtype: what the model computes in; by default its checkpoint's (ignored for a loaded model).
        device: "auto", "cpu", "cuda" or "cuda:i" (ignored for a loaded model).
        values: whether to keep V (needed for output errors).
        chunk: prefill in chunks of this many tokens with a KV cache, for prompts that do not fit otherwise.
        chat: make each text a user's message in the tokenizer's chat template.
        special_tokens: let the tokenizer add its special tokens to texts, like one that begins a sequence.
        overwrite: replace a dump that is there.
        resume: continue an unfinished dump made with the same settings.
        revision: of a Hugging Face id.
        trust_remote_code: allow code that comes with the model.
        progress: called after each layer.
        notify: told warnings and facts worth a line; the default logs them.

    Returns:
        The finished dump, opened.

    Raises:
        InputError: anything the caller can fix, before or during the run.
        MissingBackendError: transformers or the device is missing.
        RunFailure: full disk or out of memory.
    """
    tell = notify or logger.warning
    outlook: Outlook | None = None
    folder = Path(out)
    require_transformers()
    _check_numbers(tokens, chunk, layers, kv_heads)
    for name in (dtype, model_dtype):
        if name is not None:
            torch_dtype(name)
    check_output(folder, overwrite=overwrite, resume=resume)
    if chat and not special_tokens:
        raise InputError("a chat template writes its own special tokens: drop --no-special-tokens or --chat")
    if not prompts:
        raise InputError("give at least one prompt")
    inputs = unique_names([p if isinstance(p, PromptInput) else prompt_from_file(p) for p in prompts])

    try:
        loaded = ready_model(
            model,
            tokenizer,
            device=device,
            model_dtype=model_dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            notify=tell,
        )
        net = loaded.model
        known = prove_model(net, loaded.loading or None)
        for sentence in known.warnings:
            tell(f"warning: {sentence}")
        ready = [
            tokenize(
                prompt,
                loaded.tokenizer,
                tokens=tokens,
                positions=model_positions(net),
                vocabulary=getattr(net.get_input_embeddings(), "num_embeddings", None),
                chat=chat,
                special_tokens=special_tokens,
                notify=tell,
            )
            for prompt in inputs
        ]
        _notice_twins(ready, tell)
        shapes = probe(net, ready[0].token_ids[:PROBE_TOKENS], layers)
        wanted = _pick_layers(net, shapes, layers, tell)
        longest = max(ready, key=lambda p: len(p.token_ids)).token_ids
        if chunk is not None:
            check_chunks(net, longest, wanted, [Prefill(len(p.token_ids), chunk) for p in ready])
        _check_kv_heads(shapes, wanted, kv_heads)
        picked = None if kv_heads is None else sorted(set(kv_heads))
        needed = sum(shapes[layer].bytes(len(p.token_ids), picked, dtype, values) for p in ready for layer in wanted)
        tell(f"{len(ready)} x {len(wanted)} layers need {human_bytes(needed)} in {folder}")
        check_disk(folder, needed)
        outlook = _outlook(net, longest, chunk, tell)

        header = _header(loaded, ready, shapes, wanted, picked, dtype, values, chunk)
        header["capture"].update(chat=chat, special_tokens=special_tokens)
        header["proof"] = known.to_json()
        total = len(ready) * len(wanted)
        with DumpWriter(folder, header, overwrite=overwrite, resume=resume, continues=True) as writer:
            for prompt in ready:
                left = [layer for layer in wanted if (prompt.name, layer) not in writer.done]
                if not left and prompt.name in writer.proven:
                    continue
                to_end = runs_to_end(net, len(prompt.token_ids), layers)
                scores = NextTokens(net, prompt.token_ids) if to_end and keeps_few_rows(net) else None

                def report(_: int, name: str = prompt.name) -> None:
                    if progress is not None:
                        progress(CaptureProgress(name, len(writer.done), total))

                if progress is not None:
                    progress(CaptureProgress(prompt.name, len(writer.done), total))
                recorder = Recorder(
                    writer,
                    prompt.name,
                    len(prompt.token_ids),
                    left,
                    kv_heads=picked,
                    dtype=dtype,
                    values=values,
                    stop_early=not to_end,
                    on_layer=report,
                )
                watch = CacheWatch(left)

                def see(call: AttentionCall, recorder: Recorder = recorder, watch: CacheWatch = watch) -> None:
                    watch(call)
                    recorder(call)

                try:
                    sink = language_only(net, recorder if chunk is None else see)
                    with intercept(net, sink), scores or contextlib.nullcontext():
                        if left or scores is not None:
                            prefill(net, prompt.token_ids, chunk=chunk)
                except LayersDone:
                    pass
                finally:
                    missing = recorder.missing
                    recorder.abort()
                if missing:
                    raise InputError(
                        f"layers {sorted(missing)} of {loaded.name} made no attention call for {prompt.name}"
                    )
                found = prove_prompt(net, prompt.token_ids) if scores is None else scores.proof()
                writer.prove(prompt.name, found.to_json())
                if (doubt := found.warning(prompt.name)) is not None:
                    tell(f"warning: {doubt}")
            return writer.finish()
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_kept(folder) or 'nothing was written'}") from None
    except RunFailure as error:
        kept = _kept(folder)
        raise RunFailure(f"{error}; {kept}" if kept else str(error)) from None
    except AnchorScopeError:
        raise
    except Exception as error:  # the model's own code ran; what is ours is raised again below
        if is_out_of_memory(error):
            raise RunFailure(_memory_advice(error, outlook)) from None
        if _is_foreign(error):
            what = next(iter(str(error).splitlines()), "")
            raise RunFailure(f"the model failed in its own code: {type(error).__name__}: {what}"[:400]) from error
        raise


def _kept(folder: Path) -> str | None:
    """What an unfinished capture leaves behind, in words."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        return None
    count = len(manifest["entries"])
    if manifest.get("complete", True) or not count:
        return None
    return f"{folder} keeps {count} finished layers: give the same command again with --resume to continue"


def probe(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[int] | None) -> dict[int, LayerShape]:
    """Shapes of every layer that makes a softmax attention call, from a trial run of a few tokens.

    Raises:
        InputError: no layer does, or a wanted one cannot be represented by Q, K and V.
    """
    sink = ShapeProbe()
    with intercept(model, language_only(model, sink)):
        prefill(model, token_ids)
    for layer, reason in sorted(sink.refused.items()):
        if layers is None or layer in layers:
            raise InputError(reason)
    if not sink.shapes:
        raise InputError(
            f"{type(model).__name__} never called transformers' attention interface,"
            " so there is nothing to capture:"
            " its attention is not softmax attention, or its code does not use the interface"
        )
    return sink.shapes


def _pick_layers(
    model: PreTrainedModel,
    shapes: dict[int, LayerShape],
    layers: Sequence[int] | None,
    tell: Callable[[str], None],
) -> list[int]:
    count = getattr(text_config(model), "num_hidden_layers", None) or max(shapes) + 1
    if layers is None:
        others = sorted(set(range(count)) - shapes.keys())
        if others:
            tell(f"layers {', '.join(map(str, others))} use no softmax attention and are left out")
        return sorted(shapes)
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer} is out of range: the model has layers 0 to {count - 1}")
        if layer not in shapes:
            raise InputError(f"layer {layer} uses no softmax attention; layers {sorted(shapes)} do")
    return sorted(set(layers))


def _notice_twins(ready: Sequence[TokenizedPrompt], tell: Callable[[str], None]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for prompt in ready:
        first = seen.setdefault(prompt.token_ids, prompt.name)
        if first != prompt.name:
            tell(f"warning: prompts {first} and {prompt.name} are the same tokens")


def _check_numbers(
    tokens: int | None, chunk: int | None, layers: Sequence[int] | None, kv_heads: Sequence[int] | None
) -> None:
    if tokens is not None and tokens < 2:
        raise InputError(f"tokens must be at least 2, not {tokens}")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, not {chunk}")
    for name, chosen in (("layers", layers), ("kv_heads", kv_heads)):
        if chosen is not None and not chosen:
            raise InputError(f"{name} must name at least one")


def _check_kv_heads(shapes: dict[int, LayerShape], wanted: Sequence[int], kv_heads: Sequence[int] | None) -> None:
    for layer in wanted:
        for head in kv_heads or ():
            if not 0 <= head < shapes[layer].kv_heads:
                last = shapes[layer].kv_heads - 1
                raise InputError(f"kv head {head} is out of range: layer {layer} has kv heads 0 to {last}")


def _header(
    loaded: LoadedModel,
    ready: Sequence[TokenizedPrompt],
    shapes: dict[int, LayerShape],
    wanted: Sequence[int],
    kv_heads: Sequence[int] | None,
    dtype: str | None,
    values: bool,
    chunk: int | None,
) -> dict[str, Any]:
    import transformers

    model, tokenizer = loaded.model, loaded.tokenizer
    first = shapes[wanted[0]]
    stored = {dtype or shapes[layer].dtype for layer in wanted}
    return {
        "model": {
            **model_facts(model, loaded.name, loaded.revision),
            "query_heads": first.heads,
            "kv_heads": first.kv_heads,
            "head_dim": first.head_dim,
        },
        "tokenizer": None if tokenizer is None else {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)},
        "dtype": stored.pop() if len(stored) == 1 else None,
        "capture": {
            "layers": list(wanted),
            "kv_heads": None if kv_heads is None else list(kv_heads),
            "values": values,
            "chunk": chunk,
            "device": model_device(model).type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompts": [prompt_record(p.name, len(p.token_ids), text=p.text, token_ids=p.token_ids) for p in ready],
    }


def _is_foreign(error: BaseException) -> bool:
    """Whether an error was raised outside AnchorScope's own code (by the model, transformers or torch)."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(__file__).parents[1] not in Path(frames[-1].filename).parents


@dataclass(frozen=True)
class Outlook:
    """What a capture will take of its device's memory, known before it starts."""

    curve: Curve
    weights: int
    free: int | None
    chunk: int | None

    @property
    def needed(self) -> int:
        """Bytes of the longest prompt's prefill, beyond the weights."""
        return self.curve.bytes(self.curve.tokens)

    def sentences(self) -> Iterator[str]:
        """What to tell before the run."""
        yield (
            f"memory: {human_bytes(self.weights)} of weights and about {human_bytes(self.needed)} for the prefill of"
            f" {self.curve.tokens} tokens"
        )
        if self.free is not None and self.needed > self.free:
            yield f"warning: only {human_bytes(self.free)} of memory are free: {self.advice()}"

    def advice(self) -> str:
        """What would fit, by the same estimate."""
        fits = 0 if self.free is None else self.curve.fitting(0.9 * self.free)
        how = f"in chunks of {self.chunk}" if self.chunk else "in one piece"
        smaller = f"a --chunk below {self.chunk}" if self.chunk else "--chunk 2048 (the prompt in pieces)"
        if fits >= self.curve.tokens or fits < 2:
            return f"try {smaller}, fewer --tokens, or --model-dtype bf16"
        return f"about {fits} tokens fit {how}; try {smaller}, --tokens {fits}, or --model-dtype bf16"


def _outlook(
    model: PreTrainedModel, token_ids: Sequence[int], chunk: int | None, tell: Callable[[str], None]
) -> Outlook | None:
    free = free_bytes(model_device(model))
    try:
        curve = prefill_curve(model, token_ids, len(token_ids), chunk, prefill)
        if keeps_few_rows(model):
            rows = min(SCORED + 1, len(token_ids), chunk or len(token_ids))
            curve = replace(curve, tail=logits_bytes(model, token_ids, rows))
    except Exception as error:  # tensors of any kind pass by; an estimate must not stop a capture, and that is said
        if isinstance(error, AnchorScopeError) or is_out_of_memory(error):
            raise
        tell(f"memory: unknown, the model's operations could not be watched ({type(error).__name__})")
        return None
    outlook = Outlook(curve, weight_bytes(model), free, chunk)
    for sentence in outlook.sentences():
        tell(sentence)
    return outlook


def _memory_advice(error: BaseException, outlook: Outlook | None) -> str:
    what = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else "out of memory"
    if outlook is None:
        return f"{what} before the prefill began: use --model-dtype bf16, a smaller --chunk or a smaller model"
    return f"{what}: the prefill needs about {human_bytes(outlook.needed)} beyond the weights; {outlook.advice()}"
