"""One model, several arms: dense and sparse go through a prompt in lockstep, each with its own KV cache."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anchorscope import runtime
from anchorscope.anchors import AnchorConfig
from anchorscope.evaluation.metrics import Reference, TokenScores
from anchorscope.evaluation.tasks import Sample
from anchorscope.models.kvcache import continuation, result_cache
from anchorscope.models.placement import model_device
from anchorscope.models.positions import reset_rotations, rotation_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"


@dataclass(frozen=True)
class Arm:
    """One way to run the model: `config` None is its own attention."""

    name: str
    config: AnchorConfig | None


@dataclass
class LayerWork:
    """What one layer's attention did, summed over chunks: pairs over all heads, recall weighted by queries."""

    kind: str = DENSE
    queries: int = 0
    visible_pairs: int = 0
    kept_pairs: int = 0
    recall: float | None = None
    seconds: float = 0.0


@dataclass
class PrefillWork:
    """What one arm's prefill cost: seconds in all, and layer by layer in attention."""

    tokens: int = 0
    seconds: float = 0.0
    layers: dict[int, LayerWork] = field(default_factory=dict)

    @property
    def attention_seconds(self) -> float:
        """Seconds inside attention, all layers."""
        return sum(x.seconds for x in self.layers.values())

    @property
    def density(self) -> float:
        """Kept pairs / visible pairs over all heads of all attention layers, those left dense included."""
        return sum(x.kept_pairs for x in self.layers.values()) / max(
            1, sum(x.visible_pairs for x in self.layers.values())
        )

    @property
    def recall(self) -> float | None:
        """Attention mass kept, mean over the attention layers; None unless measured."""
        known = [x.recall for x in self.layers.values()]
        return None if not known or None in known else float(np.mean([x for x in known if x is not None]))

    def leave_out_measuring(self, dense: PrefillWork) -> None:
        """Set the seconds to those in attention, plus what the dense arm spent outside it.

        Measuring recall runs between the attention calls; attention's own seconds do not include it.
        """
        self.seconds = dense.seconds - dense.attention_seconds + self.attention_seconds

    def to_json(self) -> dict[str, Any]:
        """The JSON value that part files hold."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "layers": [{"layer": i, **asdict(x)} for i, x in sorted(self.layers.items())],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PrefillWork:
        """The same, read from its JSON."""
        layers = {x["layer"]: LayerWork(**{k: v for k, v in x.items() if k != "layer"}) for x in value["layers"]}
        return cls(value["tokens"], value["seconds"], layers)


@dataclass(frozen=True)
class LaneOptions:
    """How arms run.

    Attributes:
        chunk: tokens prefilled at a time, or None for whole prompts.
        backend: the back end of the sparse attention.
        force: accept a configuration of another model of that shape.
        stepwise: decode one token at a time: a recurrent layer may carry its state through single ones only.
        tick: called with the tokens of every chunk that an arm has prefilled.
    """

    chunk: int | None
    backend: str = "auto"
    force: bool = False
    stepwise: bool = False
    tick: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Answer:
    """What one arm makes of a sample.

    Attributes:
        text: generated, greedily.
        score: share of the expected strings in it.
        scores: the correct answer's tokens, given the prompt (and the answer so far), scored against dense.
        work: what the prefill cost; the answer is decoded with the model's own attention in every arm.
        reference: the dense arm's logits at the answer.
    """

    text: str
    score: float
    scores: TokenScores
    work: PrefillWork
    reference: Reference


class Lane:
    """One arm on its way through one prompt."""

    def __init__(self, model: PreTrainedModel, arm: Arm, options: LaneOptions, *, measure: bool) -> None:
        self.work = PrefillWork()
        self._cache: Any = None
        self._held = 0  # tokens in the cache
        self._model, self._arm, self._options, self._measure = model, arm, options, measure

    def step(self, ids: torch.Tensor, *, every: bool, cached: bool) -> torch.Tensor:
        """Prefill the next ids.

        Args:
            ids: (n,) int64.
            every: logits of every position, else of the last one.
            cached: keep a KV cache for what follows.

        Returns:
            (n or 1, vocabulary) in the model's dtype.
        """
        if self._arm.config is None:
            attention = runtime.attention_clock(self._model)
        else:
            attention = runtime.sparse_attention(
                self._model,
                self._arm.config,
                backend=self._options.backend,
                measure=self._measure,
                force=self._options.force,
            )
        if self._cache is None:
            reset_rotations(self._model)
        with contextlib.ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the plan has said it
                run = stack.enter_context(attention)
            before = self._now()
            logits = self._forward(ids, every, cached)
            self.work.seconds += self._now() - before
        for use in run.layers():
            self._add(use)
        self.work.tokens += len(ids)
        self._options.tick(len(ids))
        return logits

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Continue with the model's own attention: logits (n, vocabulary) of every one of the ids (n,)."""
        pieces = ids.split(1) if self._options.stepwise else [ids]
        return torch.cat([self._forward(piece, True, True) for piece in pieces])

    def bookmark(self) -> Callable[[], None]:
        """Note where the lane is; the function returned, called once, leads back there."""
        cache, held, put_back = copy.deepcopy(self._cache), self._held, rotation_state(self._model)

        def back() -> None:
            self._cache, self._held = cache, held
            put_back()

        return back

    def _forward(self, ids: torch.Tensor, every: bool, cached: bool) -> torch.Tensor:
        options = continuation(self._model, self._cache, self._held, ids[None])
        if not every and "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = 1
        result = self._model(input_ids=ids[None], use_cache=cached, **options)
        if cached:
            self._cache, self._held = result_cache(result), self._held + len(ids)
        return result.logits[0] if every else result.logits[0, -1:]

    def _now(self) -> float:
        if model_device(self._model).type == "cuda":
            torch.cuda.synchronize(model_device(self._model))
        return time.perf_counter()

    def _add(self, use: Any) -> None:
        layer = self.work.layers.setdefault(use.layer, LayerWork(use.kind))
        layer.kind = use.kind if layer.kind == DENSE else layer.kind
        if self._measure:
            recall = 1.0 if use.recall is None else use.recall  # dense layers are not measured: they keep everything
            before, now = layer.queries, use.queries
            layer.recall = ((layer.recall or 0.0) * before + recall * now) / max(1, before + now)
        layer.queries += use.queries
        layer.visible_pairs += use.visible_pairs
        layer.kept_pairs += use.kept_pairs
        layer.seconds += use.seconds


def group_multiple(arms: Sequence[Arm]) -> int:
    """The least chunk, tokens, whose multiples keep every layer's groups where an unchunked prefill has them."""
    groups = {x.params.group for arm in arms if arm.config is not None for x in arm.config.layers}
    return math.lcm(*groups)


def spans(tokens: int, chunk: int | None) -> list[tuple[int, int]]:
    """The chunks of a prompt; a last one of a single token, which would count as decoding, joins the one before."""
    if chunk is None:
        return [(0, tokens)]
    starts = list(range(0, tokens, chunk))
    if len(starts) > 1 and tokens - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], tokens], strict=True))


@torch.inference_mode()
def run_prompt(
    model: PreTrainedModel, arms: Sequence[Arm], token_ids: Sequence[int], options: LaneOptions, *, measure: bool
) -> dict[str, tuple[TokenScores, PrefillWork]]:
    """Run a prompt in every arm, chunk by chunk, so that whole logits exist for one chunk and two arms at a time.

    Returns:
        By arm, "dense" the first: the scores of the N - 1 predicted tokens, and what the prefill cost.
    """
    ids = torch.tensor(token_ids, dtype=torch.long, device=model_device(model))
    dense = Lane(model, Arm(DENSE, None), options, measure=False)
    lanes = {arm.name: Lane(model, arm, options, measure=measure) for arm in arms}
    scores: dict[str, list[TokenScores]] = {name: [] for name in (DENSE, *lanes)}
    chunks = spans(len(ids), options.chunk)
    cached = len(chunks) > 1
    for start, stop in chunks:
        targets = ids[start + 1 : stop + 1]
        reference = Reference(dense.step(ids[start:stop], every=True, cached=cached)[: len(targets)], targets)
        scores[DENSE].append(reference.scores)
        for name, lane in lanes.items():
            logits = lane.step(ids[start:stop], every=True, cached=cached)[: len(targets)]
            scores[name].append(reference.compare(logits))
            del logits  # before the next arm makes its own
    if measure:
        for lane in lanes.values():
            lane.work.leave_out_measuring(dense.work)
    return {name: (join_scores(scores[name]), lane.work) for name, lane in {DENSE: dense, **lanes}.items()}


@torch.inference_mode()
def run_sample(
    model: PreTrainedModel,
    arm: Arm,
    sample: Sample,
    options: LaneOptions,
    *,
    measure: bool,
    dense: Answer | None,
    decode: Callable[[list[int]], str],
) -> Answer:
    """Prefill a sample in one arm, then answer: the model's own words, and its probability of the right ones.

    Args:
        model, arm, options, measure: as for a prompt.
        sample: the question.
        dense: the dense arm's answer, or None for that arm itself.
        decode: ids to text.
    """
    ids = torch.tensor(sample.token_ids, dtype=torch.long, device=model_device(model))
    lane = Lane(model, arm, options, measure=measure)
    for start, stop in spans(len(ids), options.chunk):
        last = lane.step(ids[start:stop], every=False, cached=True)
    answer = torch.tensor(sample.answer_ids, dtype=torch.long, device=model_device(model))
    back = lane.bookmark()
    logits = last if len(answer) == 1 else torch.cat([last, lane.decode(answer[:-1])])
    back()
    text = _greedy(lane, last, sample, decode, _stops(model))
    reference = Reference(logits, answer) if dense is None else dense.reference
    scores = reference.scores if dense is None else reference.compare(logits)
    if measure and dense is not None:
        lane.work.leave_out_measuring(dense.work)
    return Answer(text, sample.score(text), scores, lane.work, reference)


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of consecutive tokens as one."""
    return TokenScores(*(np.concatenate([getattr(x, name) for x in parts]) for name in ("nll", "kl", "agree", "right")))


def _greedy(lane: Lane, last: torch.Tensor, sample: Sample, decode: Callable[[list[int]], str], stops: set[int]) -> str:
    """The most likely token, again and again, until the budget, an end token or everything expected is reached."""
    ids: list[int] = []
    while True:
        ids.append(int(last.argmax()))
        text = decode(ids)
        if ids[-1] in stops or len(ids) == sample.budget or sample.score(text) == 1:
            return text
        last = lane.decode(torch.tensor(ids[-1:], dtype=torch.long, device=last.device))


def _stops(model: PreTrainedModel) -> set[int]:
    """Ids that end an answer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set() if found is None else set(found) if isinstance(found, (list, tuple)) else {found}
