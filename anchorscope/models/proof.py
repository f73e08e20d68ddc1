"""These functions prove that a loaded model has its weights and predicts text (see anchorscope/proof.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anchorscope.models.config import text_config
from anchorscope.models.placement import model_device
from anchorscope.models.positions import reset_rotations
from anchorscope.models.prefill import keeps_few_rows, last_forward
from anchorscope.models.weights import check_materialized, listed
from anchorscope.proof import CONTEXT, SCORED, ModelProof, PromptProof

if TYPE_CHECKING:
    from types import TracebackType

    from transformers import PreTrainedModel

SLICE_BYTES = 2 << 20  # of float32 logits scored at a time: the copy stays in a CPU's cache


def prove_model(model: PreTrainedModel, loading: Mapping[str, Any] | None = None) -> ModelProof:
    """Look at a model's weights without running it.

    Args:
        model: a loaded model.
        loading: what its loader reported, or None where the caller loaded it.

    Raises:
        InputError: weights have no values (they are on the device meta, and no offloading brings them).
    """
    check_materialized(model, type(model).__name__)
    found = _from_no_checkpoint(model)
    if not found:
        return ModelProof(loading)
    return ModelProof(
        loading,
        (
            f"{len(found)} weights of {type(model).__name__} were in no checkpoint ({listed(found)}): transformers made"
            " them at random when it loaded the model; ignore this only if you have set them since",
        ),
    )


def _from_no_checkpoint(model: PreTrainedModel) -> list[str]:
    """Return the weights that `from_pretrained` made at random: those without the mark of the others.

    Weights that accelerate keeps elsewhere have no marks either: they are put on the meta device afterwards.
    """
    marked: list[str] = []
    others: list[str] = []
    for name, x in model.named_parameters():
        if x.device.type == "meta":
            continue
        (marked if getattr(x, "_is_hf_initialized", False) else others).append(name)
    return [name for name in others if not _is_added(model, name)] if marked else []


def _is_added(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter belongs to an adapter, which has a file of its own."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        return True
    return any(
        hasattr(model.get_submodule(".".join(parts[:i])), "base_layer") and parts[i] != "base_layer"
        for i in range(len(parts))
    )


class NextTokens:
    """While this context is open, scores how well a model predicts the last tokens of the prompt it runs.

    The model may run the prompt whole or in consecutive pieces. Of its logits, only the rows that are scored are made
    (where its forward takes `logits_to_keep`).

    Args:
        model: a causal language model, called by keyword.
        token_ids: the prompt, at least 2 ids.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Sequence[int]) -> None:
        self._model = model
        self._ids = token_ids
        self._first = max(0, len(token_ids) - 1 - SCORED)  # the first position whose successor is scored
        self._position = 0
        self._found: list[tuple[np.ndarray, np.ndarray]] = []
        self._vocabulary = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> NextTokens:
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def proof(self) -> PromptProof:
        """Return the result, once the prompt has run."""
        nll, right = (np.concatenate(x) for x in zip(*self._found, strict=True)) if self._found else (np.zeros(0),) * 2
        wanted = len(self._ids) - 1 - self._first
        if len(nll) != wanted:
            return PromptProof(0, len(self._ids), reason=f"{type(self._model).__name__} returns no logits")
        return summarize(nll, right, len(self._ids), self._vocabulary)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        stop, scored = self._span(kwargs)
        if not scored or not keeps_few_rows(self._model):
            return None
        return args, {**kwargs, "logits_to_keep": stop - scored.start}

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        stop, scored = self._span(kwargs)
        self._position = stop
        logits = getattr(output, "logits", None)
        if logits is None or not scored:
            return
        self._vocabulary = logits.shape[-1]
        rows = logits[0, scored.start - stop :][: len(scored)]
        targets = [self._ids[i + 1] for i in scored]
        self._found.append(score(rows, torch.tensor(targets, dtype=torch.long, device=logits.device)))

    def _span(self, kwargs: dict[str, Any]) -> tuple[int, range]:
        """Return where a chunk ends, and those of its positions whose successors are scored."""
        stop = self._position + kwargs["input_ids"].shape[1]
        return stop, range(max(self._position, self._first), min(stop, len(self._ids) - 1))


def summarize(nll: np.ndarray, right: np.ndarray, context: int, vocabulary: int) -> PromptProof:
    """Return the proof of tokens that are scored already; the last `SCORED` of them count.

    Args:
        nll: (T,) negative log-likelihoods, nats.
        right: (T,) 1 where the true token was the model's first choice, else 0.
        context: tokens of the run.
        vocabulary: how many tokens the model chooses from.
    """
    nll, right = nll[-SCORED:], right[-SCORED:]
    mean = float(nll.mean())
    if not np.isfinite(mean):
        return PromptProof(len(nll), context, vocabulary, reason="its logits hold NaN or infinity")
    # rounding can make a certain prediction's likelihood exceed 1 by a hair
    return PromptProof(len(nll), context, vocabulary, max(0.0, mean), float(right.mean()))


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Score each true next token: its negative log-likelihood (nats), and 1 if it is the most likely one, else 0.

    Args:
        logits: (T, vocabulary), any floating dtype; sums of exponentials are taken in float64.
        targets: (T,) int64.

    Returns:
        (T,) float64 each.
    """
    nll, right = [], []
    for rows in row_slices(logits, SLICE_BYTES):
        z, true = logits[rows].float(), targets[rows]
        nll.append(log_sum_exp(z) - z.gather(1, true[:, None])[:, 0].double())
        right.append((z.argmax(1) == true).double())
    return torch.cat(nll).cpu().numpy(), torch.cat(right).cpu().numpy()


def log_sum_exp(z: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials of each row of z (T, vocabulary) float32, in float64."""
    top = z.amax(1, keepdim=True)
    return (z - top).exp_().sum(1, dtype=torch.float64).log_() + top[:, 0].double()


def row_slices(logits: torch.Tensor, size: int) -> Iterator[slice]:
    """Return slices of consecutive rows whose float32 copies take about `size` bytes."""
    rows = max(1, size // (4 * logits.shape[1]))
    return (slice(i, i + rows) for i in range(0, logits.shape[0], rows))


def prove_prompt(model: PreTrainedModel, token_ids: Sequence[int]) -> PromptProof:
    """Run the last `CONTEXT` tokens of a prompt at most, and score the last `SCORED` of them.

    Args:
        model: a causal language model.
        token_ids: the prompt, at least 2 ids.
    """
    ids = token_ids[-CONTEXT:]
    if model.get_output_embeddings() is None:
        return PromptProof(0, len(ids), reason=f"{type(model).__name__} has no language-model head")
    scores = NextTokens(model, ids)
    with torch.inference_mode(), scores:
        if keeps_few_rows(model):
            last_forward(model, ids)
        else:  # `prefill` would leave the head out
            reset_rotations(model)
            model(input_ids=torch.tensor([list(ids)], dtype=torch.long, device=model_device(model)), use_cache=False)
    return scores.proof()


def runs_to_end(model: PreTrainedModel, tokens: int, layers: Sequence[int] | None) -> bool:
    """Return whether a capture should run the model beyond the last wanted layer, for the sake of its logits.

    It should where that costs no more than a short run of `CONTEXT` tokens (`prove_prompt`) would. The answer depends
    only on what was asked for, so an interrupted capture ends with the same proof.

    Args:
        model: the model.
        tokens: the prompt length N.
        layers: the wanted layers, or None for all.
    """
    if layers is None:
        return True
    count = int(getattr(text_config(model), "num_hidden_layers", 0) or 0)
    return (count - 1 - max(layers)) * tokens <= count * CONTEXT
