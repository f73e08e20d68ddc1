"""`evaluate`: a model dense and sparse side by side, on prompts and on tasks; resumable by prompt, sample and arm.

All sparse arms share one dense pass. What each arm did is saved under parts/ as soon as it is known; tables, figures
and evaluation.json are made from those files alone, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.devices import is_out_of_memory, resolve_backend_name
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.evaluation.chunking import choose_chunks
from anchorscope.evaluation.lanes import DENSE, Arm, Lane, Options, run_prompt, run_sample, spans
from anchorscope.evaluation.parts import Part
from anchorscope.evaluation.results import (
    ANSWER_COLUMNS,
    PROMPT_COLUMNS,
    TASK_COLUMNS,
    answer_result,
    answer_row,
    prompt_result,
    prompt_row,
    proof_result,
    task_result,
    task_row,
)
from anchorscope.evaluation.tasks import BY_DEPTH, PERPLEXITY, Sample, check_tasks, make_samples
from anchorscope.evaluation.text import OWN_TEXT, Pieces, own_text
from anchorscope.files import MAX_JSON_BYTES, again_remark, csv_text, human_bytes, read_json, write_atomic
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
from anchorscope.models.memory import free_bytes
from anchorscope.models.placement import model_device
from anchorscope.models.positions import Positions, model_positions
from anchorscope.models.prompts import tokenize, unique_names
from anchorscope.models.proof import prove_model, prove_prompt, summarize
from anchorscope.params import AnchorParams
from anchorscope.proof import PromptProof
from anchorscope.runs.environment import installed, versions
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.progress import Progress, ProgressCallback
from anchorscope.runs.values import jsonable
from anchorscope.shapes import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATE, REPORT, PARTS, FIGURES = "run.json", "evaluation.json", "parts", "figures"
TABLES = ("prompts.csv", "tasks.csv", "answers.csv")
VERSION = 1
FOLDER = RunFolder(
    what="an evaluation",
    command="evaluate",
    format="anchorscope-evaluation-run",
    version=VERSION,
    state=STATE,
    report=REPORT,
    tables=TABLES,
    parts=((PARTS, "*-arm*.safetensors"), (FIGURES, "*.png")),
    kept=("finished parts (one for each prompt or sample and arm)", f"{PARTS}/*-arm*.safetensors"),
)
LENGTHS = (2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4


@dataclass(frozen=True)
class LongPrompt:
    """The first `length` tokens of a prompt."""

    prompt: str
    length: int
    token_ids: tuple[int, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """What progress shows."""
        return f"{self.prompt}, {self.length:,}"


Unit = LongPrompt | Sample


def _kind(unit: Unit) -> str:
    return "tasks" if isinstance(unit, Sample) else "prompts"


@dataclass(frozen=True)
class Evaluation:
    """A finished run.

    Attributes:
        path: the output folder.
        report: what evaluation.json holds.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any] = field(repr=False)
    figures: tuple[Path, ...] = ()

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """One object per prompt, length and sparse arm."""
        return list(self.report["prompts"])

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """One object per task, length and sparse arm."""
        return list(self.report["tasks"])


@dataclass(frozen=True)
class _Request:
    """Everything decided before the first prefill."""

    loaded: LoadedModel
    arms: tuple[Arm, ...]
    units: tuple[Unit, ...]
    options: Options
    seed: int
    settings: dict[str, Any]

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    def options_of(self, unit: Unit) -> Options:
        return replace(self.options, chunk=self.settings["chunk"][_kind(unit)])

    def measured(self, unit: Unit) -> bool:
        return bool(self.settings["measure"][_kind(unit)])


def evaluate(
    model: PreTrainedModel | str,
    out: Path | str,
    *,
    arms: Mapping[str, AnchorConfig | float],
    prompts: Sequence[PromptInput | Path | str] = (),
    tasks: Sequence[str] = (),
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    chunk: int | None = None,
    chat: bool = False,
    measure: bool | None = None,
    params: AnchorParams | None = None,
    backend: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    model_dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    figures: bool = True,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Run a model dense and sparse on the same prompts and tasks, and report what sparse costs and gains.

    Args:
        model: a loaded transformers model (with `tokenizer`), or what `capture_model` takes.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        arms: the sparse arms by name; each an `AnchorConfig`, or one theta for all heads (with `params`). All share one
            dense arm.
        prompts: files or `PromptInput`s whose next tokens are predicted: perplexity, divergence, agreement.
        tasks: "needle", "multi-needle", "variable-tracking", "common-words"; "perplexity" is of the project's own text.
        lengths: tokens; by default prompts are whole, and tasks have 2,048, 4,096 and 8,192 if the model goes so far.
        depths: of the needle, shares from 0 (before the text) to 1 (behind it).
        samples: questions per task, length and depth.
        seed: of tasks and intervals.
        chunk: tokens prefilled at a time, rounded up to what keeps the groups of all arms in place; by default 2,048
            for prompts, whose logits take memory, and tasks whole. Models that cannot prefill in chunks run whole.
        chat: put tasks into the tokenizer's chat template.
        measure: measure the recall reached while running, in an extra exact pass; by default for prompts only.
        params: groups of arms given as a theta.
        backend: of the sparse attention: "auto", "torch" or "triton".
        tokenizer: of a loaded model.
        device, model_dtype, revision, trust_remote_code: as for `capture_model`.
        force: accept configurations made for another model of the same shape.
        figures: draw the figures.
        overwrite: replace an earlier run in `out`.
        progress: called as work proceeds.
        notify: told what the run will take, and warnings.

    Returns:
        The finished run. `out` then holds evaluation.json, prompts.csv, tasks.csv, answers.csv, parts/ and figures/.

    Raises:
        InputError: anything the caller can fix: an unknown task, a configuration of another model, a length beyond the
            model's positions, a prompt that is too short, nothing to evaluate, an `out` that is in use.
        MissingBackendError: transformers, the device or the back end is missing.
        RunFailure: out of memory, full disk.
    """
    tell, report = notify or (lambda _: None), progress or (lambda _: None)
    path = Path(out)
    _check_request(arms, prompts, tasks, lengths, depths, samples, chunk)
    inputs = unique_names([p if isinstance(p, PromptInput) else prompt_from_file(p) for p in prompts])
    asked = {"figures": figures}
    _check_folder(path, asked, overwrite)
    require_transformers()
    loaded = ready_model(
        model,
        tokenizer,
        device=device,
        model_dtype=model_dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        notify=tell,
    )
    known = prove_model(loaded.model, loaded.loading or None)
    for sentence in known.warnings:
        tell(f"warning: {sentence}")
    facts = model_facts(loaded.model, loaded.name, loaded.revision)
    layers = _layers(loaded.model)
    ready = _arms(arms, params, layers, facts, force)
    units = _units(loaded, inputs, tasks, lengths, depths, samples, seed, chat, tell)
    prompt_ids = [u.token_ids for u in units if isinstance(u, LongPrompt)]
    chunks = choose_chunks(
        loaded,
        sorted(layers),
        [i for i, x in layers.items() if x.slides],
        ready,
        prompt_ids,
        [u for u in units if isinstance(u, Sample)],
        chunk,
        tell,
    )
    if chunks.prompts is None and prompt_ids:
        _check_logits(loaded, max(map(len, prompt_ids)))
    request = _Request(
        loaded,
        ready,
        units,
        Options(None, resolve_backend_name(backend, model_device(loaded.model)), force, stepwise=chunks.stepwise),
        seed,
        {
            "lengths": sorted({u.length for u in units}),
            "depths": list(depths) if any(t in BY_DEPTH for t in tasks) else [],
            "tasks": list(tasks),
            "samples": samples,
            "seed": seed,
            "chat": chat,
            "chunk": {"prompts": chunks.prompts, "tasks": chunks.tasks},
            "measure": {"prompts": measure is not False, "tasks": bool(measure)},
            "backend": resolve_backend_name(backend, model_device(loaded.model)),
            "device": model_device(loaded.model).type,
        },
    )
    with FOLDER.run(path, _identity(request, facts), asked=asked, disk=_disk(request), overwrite=overwrite) as run:
        key = hashlib.sha256(json.dumps(run.state["request"]).encode()).hexdigest()
        for sentence in _outlook(request):
            tell(sentence)
        try:
            _run(path, key, request, report, tell)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailure(
                "out of memory: use a smaller --chunk, shorter --lengths or fewer arms at a time"
            ) from None
        proofs = _proofs(path, key, request)
        for name, _, proof in proofs:
            if (doubt := proof.warning(name)) is not None:
                tell(f"warning: {doubt}")
        result = _report(path, key, request, run.state)
        result["proof"] = {**known.to_json(), "prompts": [proof_result(*each) for each in proofs]}
        _write_tables(path, result)
        drawn: list[Path] = []
        if run.asked["figures"]:
            from anchorscope.evaluation.figures import draw_all

            drawn = draw_all(result, path / FIGURES)
        run.finish(result)
        return Evaluation(path, result, tuple(drawn))


def load_evaluation(out: Path | str) -> Evaluation:
    """A finished run, read again from its folder.

    Raises:
        DumpError: the folder holds none.
    """
    path = Path(out)
    FOLDER.check_finished(path)
    shape = {
        "format": "anchorscope-evaluation",
        "version": VERSION,
        "model": dict,
        "settings": dict,
        **{name: [dict] for name in ("arms", "prompts", "tasks", "depths", "answers")},
    }
    try:
        report = read_json(path / REPORT, MAX_JSON_BYTES, "report")
        check(report, shape, str(path / REPORT))
    except InputError as error:
        raise DumpError(f"{path} holds no finished evaluation ({error}): run evaluate first") from None
    return Evaluation(path, report, tuple(sorted((path / FIGURES).glob("*.png"))))


# ----------------------------------------------------------------------------------------------------------------
# before the run


def _check_request(
    arms: Mapping[str, AnchorConfig | float],
    prompts: Sequence[Any],
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    depths: Sequence[float],
    samples: int,
    chunk: int | None,
) -> None:
    """What can be refused before a model is loaded."""
    if not arms:
        raise InputError("give at least one sparse arm: a configuration or a theta")
    if DENSE in arms:
        raise InputError("an arm cannot be called dense: that is the model's own attention")
    for name, arm in arms.items():
        if not isinstance(arm, AnchorConfig) and math.isnan(arm):
            raise InputError(f"arm {name}: theta must be a number of nats (inf and -inf are legal), not NaN")
    if not prompts and not tasks:
        raise InputError("nothing to evaluate: give prompts or tasks")
    check_tasks(tasks)
    if len(set(tasks)) < len(tasks):
        raise InputError("a task is named twice")
    for length in lengths or ():
        if length < 2:
            raise InputError(f"a length must be at least 2 tokens, not {length}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"a depth must be between 0 and 1, not {depth:g}")
    if samples < 1 or (chunk is not None and chunk < 1) or not depths or (lengths is not None and not lengths):
        raise InputError("samples and chunk must be at least 1, and lengths and depths name at least one")


def _check_folder(path: Path, asked: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder that cannot be used, before minutes are spent."""
    if path.is_file():
        raise InputError(f"--out {path} is a file; name a folder")
    if not path.is_dir() or all(x.name.startswith(".") for x in path.iterdir()):
        return
    found = FOLDER.read(path)
    if found is None:
        raise InputError(f"--out {path} exists and is not an evaluation; name a new folder")
    if (path / REPORT).exists() and not overwrite and FOLDER.covers(found, asked):
        raise InputError(
            f"--out {path} holds a finished evaluation; add --overwrite to replace it, or name a new folder"
        )


@dataclass(frozen=True)
class _Layer:
    """An attention layer of the model."""

    heads: int
    slides: bool


def _layers(model: PreTrainedModel) -> dict[int, _Layer]:
    """The attention layers, from a trial run."""
    found: dict[int, _Layer] = {}

    def look(call: AttentionCall) -> None:
        if call.layer is not None:
            found[call.layer] = _Layer(call.q.shape[1], bool(call.options.get("sliding_window")))

    with intercept(model, look):
        prefill(model, (0, 0))
    return found


def _arms(
    arms: Mapping[str, AnchorConfig | float],
    params: AnchorParams | None,
    layers: Mapping[int, _Layer],
    facts: Mapping[str, Any],
    force: bool,
) -> tuple[Arm, ...]:
    """Every arm with a configuration that fits the model; a theta is for all layers without a sliding window."""
    ready = []
    for name, arm in arms.items():
        if not isinstance(arm, AnchorConfig):
            groups, theta = params or AnchorParams(), float(arm)
            chosen = [(i, x.heads) for i, x in sorted(layers.items()) if not x.slides]
            arm = AnchorConfig(tuple(LayerAnchors(i, groups, (theta,) * heads) for i, heads in chosen))
        try:
            arm.check_model(facts, force=force)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        ready.append(Arm(name, arm))
    return tuple(ready)


def _units(
    loaded: LoadedModel,
    inputs: Sequence[PromptInput],
    tasks: Sequence[str],
    lengths: Sequence[int] | None,
    depths: Sequence[float],
    samples: int,
    seed: int,
    chat: bool,
    tell: Callable[[str], None],
) -> tuple[Unit, ...]:
    """Everything to run: prompts cut to each length, then samples."""
    positions = model_positions(loaded.model)
    for length in lengths or ():
        _check_length(loaded.name, length, positions, tell)
    most = positions.trained
    own = tuple(lengths or [x for x in LENGTHS if most is None or x <= most] or [most or LENGTHS[0]])
    units: list[Unit] = []
    for prompt in inputs:
        units += _cut(loaded, prompt, lengths, positions, tell)
    if PERPLEXITY in tasks:
        units += _cut(loaded, PromptInput(OWN_TEXT, own_text()), own, positions, tell)
    if any(t != PERPLEXITY for t in tasks):
        units += make_samples(Pieces(loaded, chat=chat), tasks, own, depths, samples, seed)
    return tuple(units)


def _check_length(name: str, length: int, positions: Positions, tell: Callable[[str], None]) -> None:
    """Refuse a length that the model cannot run, and warn of one that it is not made for."""
    if positions.limit is not None and length > positions.limit:
        raise InputError(f"length {length:,} is beyond {name}'s positions: at most {positions.limit:,} tokens")
    if positions.trained is not None and length > positions.trained:
        tell(
            f"warning: length {length:,} is beyond the {positions.trained:,} tokens that {name} is made for: its"
            " positions reach further, but what it does there may be poor"
        )


def _cut(
    loaded: LoadedModel,
    prompt: PromptInput,
    lengths: Sequence[int] | None,
    positions: Positions,
    tell: Callable[[str], None],
) -> list[LongPrompt]:
    """A prompt at each length, or whole."""
    ready = tokenize(
        prompt,
        loaded.tokenizer,
        tokens=None,
        positions=None if lengths else positions,
        vocabulary=getattr(loaded.model.get_input_embeddings(), "num_embeddings", None),
        notify=tell,
    )
    found = len(ready.token_ids)
    for length in lengths or ():
        if length > found:
            raise InputError(
                f"prompt {prompt.name} has {found:,} tokens, fewer than the length {length:,}: lower --lengths"
            )
    return [LongPrompt(prompt.name, n, ready.token_ids[:n]) for n in lengths or (found,)]


def _check_logits(loaded: LoadedModel, tokens: int) -> None:
    """Refuse a prompt whose logits, of two arms, do not fit at once."""
    vocabulary = int(getattr(loaded.model.config.get_text_config(decoder=True), "vocab_size", 0))
    needed, free = 2 * tokens * vocabulary * loaded.model.dtype.itemsize, free_bytes(model_device(loaded.model))
    if free is not None and needed > free:
        raise InputError(
            f"{loaded.name} cannot prefill in chunks, and its logits need {human_bytes(needed)} where"
            f" {human_bytes(free)} are free: lower --lengths"
        )


def _outlook(request: _Request) -> Iterator[str]:
    """What the run will take."""
    model = request.model
    config = model.config.get_text_config(decoder=True)
    prefills = len(request.units) * (1 + len(request.arms))
    tokens = sum(len(u.token_ids) for u in request.units) * (1 + len(request.arms))
    longest = max(len(u.token_ids) for u in request.units)
    rows = max(
        (min(u.length, request.options_of(u).chunk or u.length) for u in request.units if isinstance(u, LongPrompt)),
        default=1,
    )
    facts = model_facts(model)
    logits = 2 * rows * int(getattr(config, "vocab_size", 0)) * model.dtype.itemsize
    sentence = f"{prefills} prefills, {tokens:,} tokens in all; logits take {human_bytes(logits)}"
    if None not in (facts["layers"], facts["kv_heads"], facts["head_dim"]):
        cache = 2 * facts["layers"] * facts["kv_heads"] * facts["head_dim"] * longest * model.dtype.itemsize
        sentence += f", KV caches up to {human_bytes(cache * max(2, 1 + len(request.arms)))}"
    yield sentence + " beside the model"


# ------------------------------------------------------------------------------------------------------------------
# folder


def _identity(request: _Request, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same."""
    identity = {
        "request": {
            "model": dict(facts),
            "arms": {arm.name: arm.config.sha256 for arm in request.arms if arm.config is not None},
            "settings": request.settings,
            "units": hashlib.sha256(repr([u.token_ids for u in request.units]).encode()).hexdigest(),
            "names": [u.name for u in request.units],
        },
    }
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def _disk(request: _Request) -> int:
    """Bytes a run may write, about: parts hold three float64 a token; tables and figures there is little of."""
    tokens = sum(len(u.token_ids) for u in request.units)
    arms = 1 + len(request.arms)
    return 24 * tokens * arms + 6_000 * len(request.units) * arms + 600_000


def _part(path: Path, index: int, arm: int) -> Path:
    """File of one arm (0: dense) of one unit."""
    return path / PARTS / f"{index:05d}-arm{arm:02d}.safetensors"


# ------------------------------------------------------------------------------------------------------------------
# the run


def _run(path: Path, key: str, request: _Request, report: ProgressCallback, tell: Callable[[str], None]) -> None:
    """Make the parts that are missing."""
    arms = (Arm(DENSE, None), *request.arms)
    total = sum(len(u.token_ids) for u in request.units) * len(arms)
    done = 0
    warm = set() if model_device(request.model).type == "cuda" else {"prompts", "tasks"}
    for index, unit in enumerate(request.units):
        missing = [i for i in range(len(arms)) if Part.load(_part(path, index, i), key) is None]
        if (remark := again_remark(_part(path, index, i) for i in missing)) is not None:
            tell(f"warning: {remark}")
        report(Progress("evaluate", done, total, unit.name))
        if missing and _kind(unit) not in warm:
            _warm_up(request, unit)
            warm.add(_kind(unit))
        so_far = done

        def tick(tokens: int, unit: Unit = unit) -> None:
            nonlocal so_far
            so_far += tokens
            report(Progress("evaluate", so_far, total, unit.name))

        options = replace(request.options_of(unit), tick=tick)
        if missing and isinstance(unit, LongPrompt):
            wanted = [arms[i] for i in missing if i]
            results = run_prompt(request.model, wanted, unit.token_ids, options, measure=request.measured(unit))
            for i in missing:
                Part(*results[arms[i].name]).save(_part(path, index, i), key)
        elif missing:
            _run_sample(path, key, request, options, index, missing)
        done += len(unit.token_ids) * len(arms)
    report(Progress("evaluate", total, total))


def _run_sample(path: Path, key: str, request: _Request, options: Options, index: int, missing: Sequence[int]) -> None:
    """One sample in the arms that are missing; dense always, since the others are compared with its logits."""
    unit = request.units[index]
    assert isinstance(unit, Sample)
    assert request.loaded.tokenizer is not None
    tokenizer = request.loaded.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    reference = None
    for i, arm in enumerate((Arm(DENSE, None), *request.arms)):
        if i and i not in missing:
            continue
        answer = run_sample(
            request.model,
            arm,
            unit,
            options,
            measure=request.measured(unit),
            dense=reference,
            decode=decode,
        )
        reference = reference or answer
        if i in missing:
            Part(answer.scores, answer.work, answer.text, answer.score).save(_part(path, index, i), key)


def _warm_up(request: _Request, unit: Unit) -> None:
    """The first two chunks once in every arm, so that compiling kernels is in nobody's time."""
    ids = torch.tensor(unit.token_ids, dtype=torch.long, device=model_device(request.model))
    with torch.inference_mode():
        for arm in (Arm(DENSE, None), *request.arms):
            lane = Lane(request.model, arm, request.options_of(unit), measure=False)
            for start, stop in spans(len(ids), request.options_of(unit).chunk)[:2]:
                lane.step(ids[start:stop], every=False, cached=True)


# ------------------------------------------------------------------------------------------------------------------
# results


def _proofs(path: Path, key: str, request: _Request) -> list[tuple[str, int, PromptProof]]:
    """How well the dense arm predicts the end of each prompt, (name, length, proof); without prompts, that of a sample.

    A prompt's scores are there already; of a sample, a short run scores the text that the question is about.
    """
    found = []
    vocabulary = int(getattr(request.model.config.get_text_config(decoder=True), "vocab_size", 0))
    for i, unit in enumerate(request.units):
        part = Part.load(_part(path, i, 0), key) if isinstance(unit, LongPrompt) else None
        if part is not None and isinstance(unit, LongPrompt):
            proof = summarize(part.scores.nll, part.scores.right, unit.length, vocabulary)
            found.append((unit.prompt, unit.length, proof))
    if not found:
        unit = request.units[0]
        found.append((unit.name, len(unit.token_ids), prove_prompt(request.model, unit.token_ids)))
    return found


def _report(path: Path, key: str, request: _Request, state: Mapping[str, Any]) -> dict[str, Any]:
    """evaluation.json, from the parts."""
    names = [arm.name for arm in request.arms]
    parts: dict[tuple[int, int], Part] = {}
    for i in range(len(request.units)):
        for a in range(len(names) + 1):
            part = Part.load(_part(path, i, a), key)
            if part is None:
                raise RunFailure(f"{_part(path, i, a)} cannot be read back: run the same command again")
            parts[i, a] = part
    prompts, answers = [], []
    groups: dict[tuple[str, int, float | None], list[int]] = {}
    for i, unit in enumerate(request.units):
        if isinstance(unit, LongPrompt):
            prompts += [
                prompt_result(unit.prompt, unit.length, name, parts[i, 0], parts[i, a], request.seed)
                for a, name in enumerate(names, 1)
            ]
        else:
            answers += [answer_result(name, unit, parts[i, a]) for a, name in enumerate([DENSE, *names])]
            for depth in dict.fromkeys((None, unit.depth)):
                groups.setdefault((unit.task, unit.length, depth), []).append(i)
    tasks: list[dict[str, Any]] = []
    depths: list[dict[str, Any]] = []
    for (_, _, depth), members in groups.items():
        units = [u for u in (request.units[i] for i in members) if isinstance(u, Sample)]
        for a, name in enumerate(names, 1):
            dense, sparse = ([parts[i, side] for i in members] for side in (0, a))
            result = task_result(name, units, dense, sparse, request.seed)
            (tasks if depth is None else depths).append({**result, "depth": depth})
    return {
        "format": "anchorscope-evaluation",
        "version": VERSION,
        "started": state["started"],
        "model": state["request"]["model"],
        "settings": request.settings,
        "environment": _environment(model_device(request.model)),
        "arms": [{"name": arm.name, **_described(arm)} for arm in request.arms],
        "prompts": prompts,
        "tasks": tasks,
        "depths": depths,
        "answers": answers,
    }


def _described(arm: Arm) -> dict[str, Any]:
    """What a reader needs to recognise an arm; the whole of it is in its anchors.json."""
    assert arm.config is not None
    thetas = [t for x in arm.config.layers for t in x.thetas]
    known = sorted(t for t in thetas if t is not None)
    return {
        "sha256": arm.config.sha256,
        "layers": len(arm.config.layers),
        "heads": len(thetas),
        "dense_heads": thetas.count(None),
        "theta_low": jsonable(known[0]) if known else None,
        "theta_high": jsonable(known[-1]) if known else None,
        "groups": sorted({f"{x.params.block}x{x.params.step}" for x in arm.config.layers}),
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """What times depend on."""
    found: dict[str, Any] = {**versions(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    found["transformers"] = installed("transformers")
    found["machine"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found


def _write_tables(path: Path, result: Mapping[str, Any]) -> None:
    tables = (
        (PROMPT_COLUMNS, map(prompt_row, result["prompts"])),
        (TASK_COLUMNS, map(task_row, [*result["tasks"], *result["depths"]])),
        (ANSWER_COLUMNS, map(answer_row, result["answers"])),
    )
    for name, (columns, rows) in zip(TABLES, tables, strict=True):
        write_atomic(path / name, csv_text(columns, rows).encode())
