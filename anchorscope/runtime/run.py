"""These context managers run a loaded model sparse, or only time its attention, and leave it as it was."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anchorscope.devices import BACKENDS
from anchorscope.errors import InputError
from anchorscope.models.calls import AttentionInputs, Own
from anchorscope.models.hook import divert, register
from anchorscope.models.language import Language
from anchorscope.models.load import pretrained, require_transformers
from anchorscope.models.proof import prove_model
from anchorscope.parse import check_word
from anchorscope.runtime.assignment import Assignment, Configuration
from anchorscope.runtime.attend import SparseRun, outer_contexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "anchorscope"
VARIABLE = "ANCHORSCOPE_ANCHORS"


@contextlib.contextmanager
def sparse_attention(
    model: PreTrainedModel,
    config: Configuration,
    *,
    backend: str = "auto",
    measure: bool = False,
    force: bool = False,
) -> Iterator[SparseRun]:
    """Prefill with anchor attention inside the context; decoding and layers without anchors stay the model's own.

        with anchorscope.sparse_attention(model, "anchors.json") as run:
            model.generate(**inputs)
        print([(x.layer, x.density) for x in run.layers()])

    The model is tried on two tokens first. Of several contexts on one model the last one opened decides alone; they may
    be left in any order. Pieces of up to `block` queries behind a KV cache, and candidates of speculative decoding in
    `generate`, are decoding and run dense. What runs sparse and what dense is specified in docs/sparse.md.

    Args:
        model: a loaded transformers model, compiled or not.
        config: an AnchorConfig, the path of an anchors.json, or one theta in nats for every head of every layer
            without a sliding window, in groups of 128 x 16 queries.
        backend: "triton" (the GPU kernels), "torch" (any device, float32), or "auto": Triton on a GPU.
        measure: compute the recall of each sparse call, which costs a second exact pass over all keys.
        force: accept anchors that were calibrated on another model of the same shape.

    Yields:
        The run: `layers()` says what each layer computed, kept and took.

    Raises:
        InputError: before the run, if the anchors do not fit the model or name attention that cannot run sparse, or
            weights of the model have no values (some that no checkpoint held are a warning, and so are layers that
            the anchors do not name);
            during it, for calls that the kernels would compute wrongly (packed or bidirectional masks, dropout). While
            another thread has a context open on the model.
        MissingBackendError: transformers is missing, or there is no GPU for "triton".
    """
    require_transformers()
    check_word("backend", backend, BACKENDS)
    model = _loaded(model)
    for sentence in prove_model(model).warnings:
        warnings.warn(sentence, stacklevel=3)  # the caller's line, above this generator and its context manager
    assignment = Assignment(config)
    with outer_contexts("pass"):
        doubt = assignment.check(model, force)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=3)
    run = SparseRun(assignment, backend, measure, Language(model))
    with divert(model, run.attend):
        yield run


@contextlib.contextmanager
def attention_clock(model: PreTrainedModel) -> Iterator[SparseRun]:
    """Count and time the model's own attention as `sparse_attention` does: the dense arm of a comparison.

    Raises:
        MissingBackendError: transformers is missing.
    """
    require_transformers()
    model = _loaded(model)
    run = SparseRun(None, language=Language(model))
    with divert(model, run.attend):
        yield run


def register_attention(
    config: Configuration | None = None,
    *,
    dense: str = "sdpa",
    backend: str = "auto",
    measure: bool = False,
    force: bool = False,
) -> SparseRun:
    """Make `attn_implementation="anchorscope"` known to transformers, for models loaded or switched afterwards.

        anchorscope.register_attention("anchors.json")
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="anchorscope")

    The anchors are checked at the model's first call, by its type and the shapes there (`sparse_attention` also tries
    the model beforehand, and tells other weights of the same shape). Registering again replaces them.

    Args:
        config: as in `sparse_attention`; by default the path in the environment variable ANCHORSCOPE_ANCHORS.
        dense: the implementation of whatever does not run sparse: "sdpa", "eager", "flash_attention_2", ...
        backend, measure, force: as in `sparse_attention`.

    Returns:
        The run, shared by all models of this implementation: use one at a time where its counts matter.

    Raises:
        InputError: there are no anchors, they cannot be read, or the implementation is unknown.
        MissingBackendError: transformers is missing.
    """
    require_transformers()
    check_word("backend", backend, BACKENDS)
    config = os.environ.get(VARIABLE) if config is None else config
    if config is None or config == "":
        raise InputError(
            f"no anchors for {IMPLEMENTATION}: give register_attention a configuration, or set {VARIABLE} to the path"
            " of an anchors.json"
        )
    assignment = Assignment(config)
    run = SparseRun(assignment, backend, measure)
    known: set[int] = set()

    def attend(call: AttentionInputs, own: Own) -> Any:
        if run.foreign(call):
            return run.attend(call, own)
        facts = getattr(call.module, "config", None)
        if id(facts) not in known:
            depth = getattr(facts, "num_hidden_layers", None)
            assignment.check_facts(
                {"class": type(call.module).__name__, "type": getattr(facts, "model_type", None), "layers": depth},
                force,
            )
            known.add(id(facts))
        return run.attend(call, own)

    register(IMPLEMENTATION, attend, dense)
    return run


def _loaded(model: Any) -> PreTrainedModel:
    """Return the model without wrappers. Contexts around this one do not see the trial of an adapter.

    Raises:
        InputError: as `pretrained`.
    """
    with outer_contexts("pass"):
        return pretrained(model)
