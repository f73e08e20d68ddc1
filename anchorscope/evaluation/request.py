"""What `evaluate` is asked for, and what that will take: checked before the first prefill, and most before loading."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.devices import resolve_backend_name, resolve_device
from anchorscope.errors import InputError
from anchorscope.evaluation.chunking import Chunking, choose_chunks
from anchorscope.evaluation.lanes import DENSE, Arm, LaneOptions
from anchorscope.evaluation.tasks import BY_DEPTH, PERPLEXITY, Sample, check_tasks, make_samples
from anchorscope.evaluation.text import OWN_TEXT, Pieces, own_text
from anchorscope.evaluation.units import TASKS, EvaluationUnit, LongPrompt, check_length, cut_prompt
from anchorscope.files import human_bytes
from anchorscope.models import (
    AttentionCall,
    LoadedModel,
    PromptInput,
    intercept,
    model_facts,
    prefill,
    prompt_from_file,
)
from anchorscope.models.load import ready_model, require_transformers
from anchorscope.models.locate import check_source
from anchorscope.models.memory import free_bytes
from anchorscope.models.placement import model_device
from anchorscope.models.positions import model_positions
from anchorscope.models.prompts import unique_names
from anchorscope.models.proof import prove_model
from anchorscope.params import AnchorParams
from anchorscope.parse import check_word
from anchorscope.proof import ModelProof
from anchorscope.runs.life import Plan
from anchorscope.shown import counted, partly_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTHS = (2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4
WARNING = "warning: "  # begins what is told and casts doubt
FIGURE_BYTES = 37_000  # as measured


@dataclass(frozen=True)
class EvaluateRequest:
    """Which model to run dense and sparse, on what.

    Attributes:
        model: a loaded transformers model (with `tokenizer`), or what `capture_model` takes.
        arms: the sparse arms by name; each an `AnchorConfig`, or one theta for all heads (with `params`). All share one
            dense arm.
        prompts: files or `PromptInput`s, in which every next token is predicted: perplexity, divergence, agreement.
        tasks: "needle", "multi-needle", "variable-tracking", "common-words"; "perplexity" is of the project's own text.
        lengths: tokens; by default prompts are whole, and tasks have 2,048, 4,096 and 8,192 if the model goes so far.
        depths: where the needle stands, as shares from 0 (before the text) to 1 (behind it).
        samples: questions per task, length and depth.
        seed: the seed of tasks and intervals.
        chunk: tokens prefilled at a time, rounded up to what keeps the groups of all arms in place; by default 2,048
            for prompts, whose logits take memory, and tasks whole. Models that cannot prefill in chunks run whole.
        chat: put tasks into the tokenizer's chat template.
        measure: measure the recall reached while running, in an extra exact pass; by default for prompts only.
        params: groups of arms given as a theta.
        backend: the back end of the sparse attention: "auto", "torch" or "triton".
        tokenizer: the tokenizer of a loaded model.
        device, model_dtype, revision, trust_remote_code: as for `capture_model`.
        force: accept configurations made for another model of the same shape.
    """

    model: PreTrainedModel | str
    arms: Mapping[str, AnchorConfig | float] | None = None
    prompts: Sequence[PromptInput | Path | str] = ()
    tasks: Sequence[str] = ()
    lengths: Sequence[int] | None = None
    depths: Sequence[float] = DEPTHS
    samples: int = SAMPLES
    seed: int = 0
    chunk: int | None = None
    chat: bool = False
    measure: bool | None = None
    params: AnchorParams | None = None
    backend: str = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    device: str = "auto"
    model_dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    force: bool = False

    def plan(self, notify: Callable[[str], None] | None = None) -> EvaluationPlan:
        """Check the request, load the model, and say what the run will take.

        Args:
            notify: told what is done and what there is to warn of, while planning. Without it, the plan's `warnings`
                hold the latter.

        Raises:
            InputError: an unknown task, a configuration of another model, a length beyond the model's positions, a
                prompt that is too short, nothing to evaluate.
            MissingBackendError: transformers, the device or the back end is missing.
        """
        warnings: list[str] = []
        tell = notify or (lambda sentence: _keep(warnings, sentence))
        inputs = self.check()
        require_transformers()
        loaded = self._load(tell)
        proof = prove_model(loaded.model, loaded.loading or None)
        for sentence in proof.warnings:
            tell(WARNING + sentence)
        facts, device = model_facts(loaded.model, loaded.name, loaded.revision), model_device(loaded.model)
        layers = attention_layers(loaded.model)
        arms = self._arms(layers, facts, tell)
        contents = self._contents(loaded, inputs, tell)
        prompts = [x.token_ids for x in contents if isinstance(x, LongPrompt)]
        samples = [x for x in contents if isinstance(x, Sample)]
        sliding = [i for i, x in layers.items() if x.slides]
        chunks = choose_chunks(loaded, sorted(layers), sliding, arms, prompts, samples, self.chunk, tell)
        if chunks.prompts is None and prompts:
            _check_logits(loaded, max(map(len, prompts)))
        backend = resolve_backend_name(self.backend, device)
        settings = {**self._settings(contents, chunks), "backend": backend, "device": device.type}
        units = tuple(EvaluationUnit(i, content, 1 + len(arms)) for i, content in enumerate(contents))
        logits, caches = _logits_bytes(loaded, units, chunks.prompts), _cache_bytes(loaded, units)
        return EvaluationPlan(
            request=self,
            units=units,
            identity=_identity(facts, arms, settings, units),
            device=device,
            memory=logits + (caches or 0),
            disk=_disk_bytes(units, len(layers)),
            pictures=FIGURE_BYTES * _figures(units),
            warnings=tuple(warnings),
            loaded=loaded,
            sparse=arms,
            heads=query_heads(layers),
            options=LaneOptions(None, backend, self.force, stepwise=chunks.stepwise),
            settings=settings,
            proof=proof,
            logits=logits,
            caches=caches,
        )

    def check(self) -> list[PromptInput]:
        """Refuse what can be refused before a model is loaded; the prompts, read from their files.

        Raises:
            InputError, MissingBackendError: as `plan`.
        """
        self._check_arms()
        if not self.prompts and not self.tasks:
            raise InputError("nothing to evaluate: give prompts or tasks")
        check_tasks(self.tasks)
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError("a task is named twice")
        if short := [x for x in self.lengths or () if x < 2]:
            raise InputError(f"a length must be at least 2 tokens, not {short[0]}")
        if outside := [x for x in self.depths if not 0 <= x <= 1]:
            raise InputError(f"a depth must be between 0 and 1, not {outside[0]:g}")
        for name, many in (("lengths", self.lengths), ("depths", self.depths)):
            if many is not None and not many:
                raise InputError(f"{name} must name at least one")
        for name, number in (("samples", self.samples), ("chunk", self.chunk)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InputError(f"{name} must be a whole number of at least 1, not {number!r}")
        if self.chat and all(task == PERPLEXITY for task in self.tasks):
            raise InputError("chat puts tasks into the model's chat template, and there is no task: leave it out")
        if self.model_dtype is not None:
            check_word("--model-dtype", self.model_dtype, ("bf16", "fp16", "fp32"))
        if isinstance(self.model, str):  # a loaded model is where it is
            resolve_backend_name(self.backend, resolve_device(self.device))
            check_source(self.model, self.revision)
        return unique_names([p if isinstance(p, PromptInput) else prompt_from_file(p) for p in self.prompts])

    def _check_arms(self) -> None:
        if not self.arms:
            raise InputError("give at least one sparse arm: a configuration or a theta")
        if DENSE in self.arms:
            raise InputError("an arm cannot be called dense: that is the model's own attention")
        for name, arm in self.arms.items():
            if not isinstance(arm, AnchorConfig) and math.isnan(arm):
                raise InputError(f"arm {name}: theta must be a number of nats (inf and -inf are legal), not NaN")

    def _load(self, tell: Callable[[str], None]) -> LoadedModel:
        return ready_model(
            self.model,
            self.tokenizer,
            device=self.device,
            model_dtype=self.model_dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            notify=tell,
        )

    def _arms(
        self, layers: Mapping[int, AttentionLayer], facts: Mapping[str, Any], tell: Callable[[str], None]
    ) -> tuple[Arm, ...]:
        """Every arm with a configuration that fits the model; a theta is for all layers without a sliding window."""
        ready = []
        for name, arm in (self.arms or {}).items():
            if not isinstance(arm, AnchorConfig):
                groups, theta = self.params or AnchorParams(), float(arm)
                chosen = [(i, x.heads) for i, x in sorted(layers.items()) if not x.slides]
                arm = AnchorConfig(tuple(LayerAnchors(i, groups, (theta,) * heads) for i, heads in chosen))
            try:
                arm.check_model(facts, force=self.force)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if (part := partly_sparse(arm.coverage(query_heads(layers)))) is not None:
                tell(f"{WARNING}{name} runs {part}: what it costs is what a partly sparse model costs")
            ready.append(Arm(name, arm))
        return tuple(ready)

    def _contents(
        self, loaded: LoadedModel, inputs: Sequence[PromptInput], tell: Callable[[str], None]
    ) -> list[LongPrompt | Sample]:
        """Everything to run: prompts cut to each length, then samples."""
        positions, lengths = model_positions(loaded.model), self.lengths
        for length in lengths or ():
            check_length(loaded.name, length, positions, tell)
        most = positions.trained
        own = tuple(lengths or [x for x in LENGTHS if most is None or x <= most] or [most or LENGTHS[0]])
        contents: list[LongPrompt | Sample] = []
        for prompt in inputs:
            contents += cut_prompt(loaded, prompt, lengths, positions, tell)
        if PERPLEXITY in self.tasks:
            contents += cut_prompt(loaded, PromptInput(OWN_TEXT, own_text()), own, positions, tell)
        if any(t != PERPLEXITY for t in self.tasks):
            pieces = Pieces(loaded, chat=self.chat)
            contents += make_samples(pieces, self.tasks, own, self.depths, self.samples, self.seed)
        return contents

    def _settings(self, contents: Iterable[LongPrompt | Sample], chunks: Chunking) -> dict[str, Any]:
        """The request as JSON."""
        return {
            "lengths": sorted({x.length for x in contents}),
            "depths": list(self.depths) if any(t in BY_DEPTH for t in self.tasks) else [],
            "tasks": list(self.tasks),
            "samples": self.samples,
            "seed": self.seed,
            "chat": self.chat,
            "chunk": {"prompts": chunks.prompts, "tasks": chunks.tasks},
            "measure": {"prompts": self.measure is not False, "tasks": bool(self.measure)},
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(Plan[EvaluationUnit]):
    """The plan of an evaluation. It holds the model, loaded.

    Attributes:
        loaded: the model and its tokenizer.
        sparse: the sparse arms.
        heads: query heads of every attention layer, by its index.
        options: how arms run; `options_of` says how they run a unit.
        settings: the request as JSON.
        proof: what the model's weights show.
        logits: bytes of the logits of one chunk and two arms.
        caches: bytes of the KV caches of all arms at the longest length, or None if the model does not say.
    """

    loaded: LoadedModel = field(repr=False)
    sparse: tuple[Arm, ...]
    heads: Mapping[int, int]
    options: LaneOptions
    settings: dict[str, Any]
    proof: ModelProof
    logits: int
    caches: int | None

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, the dense one first."""
        return Arm(DENSE, None), *self.sparse

    @property
    def extent(self) -> str:
        """What there is to run, in words."""
        prefills = sum(unit.arms for unit in self.units)
        return f"{counted(prefills, 'prefill')}, {counted(sum(unit.work for unit in self.units), 'token')} in all"

    def options_of(self, unit: EvaluationUnit) -> LaneOptions:
        """How arms run a unit."""
        return replace(self.options, chunk=self.settings["chunk"][unit.kind])

    def measured(self, unit: EvaluationUnit) -> bool:
        """Whether recall is measured on a unit."""
        return bool(self.settings["measure"][unit.kind])

    def memory_words(self) -> str:
        caches = "of unknown size" if self.caches is None else f"up to {human_bytes(self.caches)}"
        logits = human_bytes(self.logits)
        return f"{super().memory_words()} beside the model (logits {logits}, KV caches {caches})"


def _keep(warnings: list[str], sentence: str) -> None:
    if sentence.startswith(WARNING):
        warnings.append(sentence.removeprefix(WARNING))


@dataclass(frozen=True)
class AttentionLayer:
    """What arms need to know of an attention layer: its query heads, and whether its window slides."""

    heads: int
    slides: bool


def query_heads(layers: Mapping[int, AttentionLayer]) -> dict[int, int]:
    """Query heads by layer."""
    return {i: x.heads for i, x in sorted(layers.items())}


def attention_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    """The attention layers of a model by index, from a trial run."""
    found: dict[int, AttentionLayer] = {}

    def look(call: AttentionCall) -> None:
        if call.layer is not None:
            found[call.layer] = AttentionLayer(call.q.shape[1], bool(call.options.get("sliding_window")))

    with intercept(model, look):
        prefill(model, (0, 0))
    return found


def _identity(
    facts: Mapping[str, Any], arms: Sequence[Arm], settings: Mapping[str, Any], units: Sequence[EvaluationUnit]
) -> dict[str, Any]:
    """What makes two runs measure the same."""
    identity = {
        "request": {
            "model": dict(facts),
            "arms": {arm.name: arm.config.sha256 for arm in arms if arm.config is not None},
            "settings": settings,
            "units": hashlib.sha256(repr([u.content.token_ids for u in units]).encode()).hexdigest(),
            "names": [u.label for u in units],
        },
    }
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def _row_bytes(loaded: LoadedModel) -> int:
    """Bytes of the logits of one token."""
    config = loaded.model.config.get_text_config(decoder=True)
    return int(getattr(config, "vocab_size", 0)) * loaded.model.dtype.itemsize


def _check_logits(loaded: LoadedModel, tokens: int) -> None:
    """Refuse a prompt whose logits, of two arms, do not fit at once."""
    needed, free = 2 * tokens * _row_bytes(loaded), free_bytes(model_device(loaded.model))
    if free is not None and needed > free:
        raise InputError(
            f"{loaded.name} cannot prefill in chunks, and its logits need {human_bytes(needed)} where"
            f" {human_bytes(free)} are free: lower --lengths"
        )


def _logits_bytes(loaded: LoadedModel, units: Sequence[EvaluationUnit], chunk: int | None) -> int:
    """Bytes of the logits of two arms: of a chunk of a prompt, or of one token of a task."""
    lengths = [u.content.length for u in units if u.kind != TASKS]
    return 2 * max((min(n, chunk or n) for n in lengths), default=1) * _row_bytes(loaded)


def _cache_bytes(loaded: LoadedModel, units: Sequence[EvaluationUnit]) -> int | None:
    """Bytes of the KV caches of all arms at the longest length, or None if the model does not say."""
    facts = model_facts(loaded.model)
    sizes = [facts[name] for name in ("layers", "kv_heads", "head_dim")]
    if None in sizes:
        return None
    longest = max(len(u.content.token_ids) for u in units)
    return 2 * math.prod(sizes) * longest * loaded.model.dtype.itemsize * max(2, units[0].arms)


def _disk_bytes(units: Sequence[EvaluationUnit], layers: int) -> int:
    """Bytes of parts, tables and report, about, as measured: parts hold four float64 a token, and a record."""
    total = 10_000
    for unit in units:
        part, row = 1_100 + 270 * layers, 350
        if unit.kind != TASKS:
            part, row = part + 32 * unit.content.length, 3_800 + 270 * layers
        total += unit.arms * part + (unit.arms - 1) * row
    return total


def _figures(units: Sequence[EvaluationUnit]) -> int:
    """Pictures drawn: two and one per prompt and length; two of all tasks and two of each with depths."""
    prompts = [u for u in units if u.kind != TASKS]
    tasks = {u.content.task for u in units if isinstance(u.content, Sample)}
    drawn = 2 + len(prompts) if prompts else 0
    return drawn + (2 + 2 * len(tasks & set(BY_DEPTH)) if tasks else 0)
