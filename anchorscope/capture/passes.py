"""One prompt's pass through a model, whoever stores its layers, and what its failures are called."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anchorscope.capture.recorder import LayersDone, LayerStore, Recorder, Storage
from anchorscope.capture.request import CapturePlan
from anchorscope.devices import is_out_of_memory
from anchorscope.errors import AnchorScopeError, InputError, RunFailure, type_and_line
from anchorscope.models.calls import AttentionCall
from anchorscope.models.chunking import CacheWatch
from anchorscope.models.hook import intercept
from anchorscope.models.language import language_only
from anchorscope.models.memory import Forecast, out_of_memory
from anchorscope.models.prefill import keeps_few_rows, prefill
from anchorscope.models.prompts import TokenizedPrompt
from anchorscope.models.proof import NextTokens, prove_prompt, runs_to_end
from anchorscope.proof import PromptProof


def pass_over(
    plan: CapturePlan,
    prompt: TokenizedPrompt,
    store: LayerStore,
    layers: Sequence[int],
    *,
    storage: Storage,
    asked: Sequence[int] | None = None,
    prove: bool = True,
    on_layer: Callable[[int], None] | None = None,
) -> PromptProof | None:
    """Run one prompt and store its layers as they pass; the model stops where nothing more is needed of it.

    Args:
        plan: the model, and how prompts run.
        prompt: the prompt.
        store: where the layers go.
        layers: those to store; they may be none.
        storage: what is stored of each.
        asked: all layers that the request is about, stored before or not; None means all of the model.
        prove: find out how well the model predicts the prompt's last tokens.
        on_layer: called after each completed layer with its index.

    Returns:
        The proof, or None without `prove`.

    Raises:
        InputError: a layer makes no attention call, or Q, K and V do not determine it.
        RunFailure: the disk is full.
    """
    model, chunk, ids = plan.loaded.model, plan.request.chunk, prompt.token_ids
    to_end = prove and runs_to_end(model, len(ids), asked)
    scores = NextTokens(model, ids) if to_end and keeps_few_rows(model) else None
    recorder = Recorder(store, prompt.name, len(ids), layers, storage, stop_early=not to_end, on_layer=on_layer)
    sink = recorder if chunk is None else _in_turn(CacheWatch(layers), recorder)
    try:
        with intercept(model, language_only(model, sink)), scores or contextlib.nullcontext():
            if layers or scores is not None:
                prefill(model, ids, chunk=chunk)
    except LayersDone:
        pass
    finally:
        missing = recorder.missing
        recorder.abort()
    if missing:
        raise InputError(f"layers {sorted(missing)} of {plan.loaded.name} made no attention call for {prompt.name}")
    if not prove:
        return None
    return prove_prompt(model, ids) if scores is None else scores.proof()


@contextlib.contextmanager
def model_failures(known: Callable[[], Forecast | None] = lambda: None) -> Iterator[None]:
    """Turn whatever a model's own code raises into one sentence.

    Args:
        known: gives the estimate of the memory that the prefill takes, or None before there is one.

    Raises:
        InputError, RunFailure: what was raised, or what it means.
    """
    try:
        yield
    except AnchorScopeError:
        raise
    except Exception as error:  # the model's own code ran; what is ours is raised again below
        if is_out_of_memory(error):
            raise RunFailure(out_of_memory(error, known())) from None
        if _is_foreign(error):
            raise RunFailure(f"the model failed in its own code: {type_and_line(error)}") from error
        raise


def _in_turn(*sinks: Callable[[AttentionCall], None]) -> Callable[[AttentionCall], None]:
    """Return one sink that hands each call to several."""

    def sink(call: AttentionCall) -> None:
        for each in sinks:
            each(call)

    return sink


def _is_foreign(error: BaseException) -> bool:
    """Return whether an error was raised outside AnchorScope's own code (by the model, transformers or torch)."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(__file__).parents[1] not in Path(frames[-1].filename).parents
