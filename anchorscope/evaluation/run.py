"""`evaluate`: a model dense and sparse side by side, on prompts and on tasks; resumable by prompt, sample and arm.

All sparse arms share one dense pass. What each arm did is saved under parts/ as soon as it is known; tables, figures
and evaluation.json are made from those files alone, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from anchorscope import views
from anchorscope.errors import DumpError, InputError
from anchorscope.evaluation.lanes import Lane, LaneOptions, run_prompt, run_sample, spans
from anchorscope.evaluation.parts import Part
from anchorscope.evaluation.report import ANSWERS, PROMPTS, TASKS, VERSION, make_report, make_tables, prompt_proofs
from anchorscope.evaluation.request import WARNING, EvaluateRequest, EvaluationPlan
from anchorscope.evaluation.tasks import Sample
from anchorscope.evaluation.units import EvaluationUnit, LongPrompt
from anchorscope.files import MAX_JSON_BYTES, read_json
from anchorscope.models.placement import model_device
from anchorscope.notebook import InNotebook
from anchorscope.pictures import picture_patterns, pictures_in
from anchorscope.runs.executors import Context, Executor, InTurn
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import BaseCommand, Parts, RunOptions, Summary, run
from anchorscope.runs.request import planned, split, takes
from anchorscope.shapes import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT, PARTS, FIGURES = "evaluation.json", "parts", "figures"
FOLDER = RunFolder(
    what="an evaluation",
    command="evaluate",
    format="anchorscope-evaluation-run",
    version=VERSION,
    report=REPORT,
    tables=(PROMPTS, TASKS, ANSWERS),
    parts=((PARTS, "*-arm*.safetensors"), *picture_patterns(FIGURES)),
    kept=("prefill", f"{PARTS}/*-arm*.safetensors"),
)
_REPORT_SHAPE = {
    "format": "anchorscope-evaluation",
    "version": VERSION,
    "model": dict,
    "settings": dict,
    **{name: [dict] for name in ("arms", "prompts", "tasks", "depths", "answers")},
}


@dataclass(frozen=True, repr=False)
class Evaluation(InNotebook):
    """A finished run.

    Attributes:
        path: the output folder.
        report: what evaluation.json holds.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any] = field(repr=False)
    figures: tuple[Path, ...] = ()
    look = views.evaluation

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """One object per prompt, length and sparse arm."""
        return list(self.report["prompts"])

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """One object per task, length and sparse arm."""
        return list(self.report["tasks"])


@takes(EvaluateRequest, None)
def plan_evaluation(
    model: PreTrainedModel | str, *, notify: Callable[[str], None] | None = None, **request: Any
) -> EvaluationPlan:
    """Check a request, load the model, and say what a run will take: `EvaluateRequest(model, ...).plan(notify)`."""
    return EvaluateRequest(model, **request).plan(notify)


@takes(EvaluateRequest)
def evaluate(
    model: PreTrainedModel | str, out: Path | str, *, plan: EvaluationPlan | None = None, **options: Any
) -> Evaluation:
    """Run a model dense and sparse on the same prompts and tasks, and report what sparse costs and gains.

    Args:
        model: a loaded transformers model (with `tokenizer`), or what `capture_model` takes.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        plan: a plan made beforehand; what it decides must then not be given again.
        **options: the fields of `EvaluateRequest`, of which `arms` is needed, and of `RunOptions`. `notify` is told
            what the run will take, unless there is a plan that says so, and warnings, which begin with "warning: ".

    Returns:
        The finished run. `out` then holds evaluation.json, prompts.csv, tasks.csv, answers.csv, parts/ and figures/.

    Raises:
        InputError, MissingBackendError: see `EvaluateRequest.plan`; also an `out` that is in use.
        RunFailure: out of memory, full disk.
    """
    how, asked = split(options)
    if plan is None:
        FOLDER.refuse_early(Path(out), how.asked, **how.replacing)
        plan = EvaluateRequest(model, **asked).plan(how.tell)
        how.tell(f"{plan.extent}; {plan.needs(figures=how.figures, formats=how.pictures)}")
    else:
        plan = planned(EvaluateRequest, plan, model, asked)
    doubting = replace(how, notify=lambda sentence: how.tell(WARNING + sentence))
    done = run(EvaluateCommand(plan, doubting), out)
    return Evaluation(done.path, done.report, done.figures)


class EvaluateCommand(BaseCommand[EvaluationUnit, tuple[Part, ...]]):
    """See `anchorscope.runs.life.BaseCommand`. A unit's part is one file per arm, and arms that are there are kept."""

    folder: ClassVar[RunFolder] = FOLDER
    stage: ClassVar[str] = "evaluate"
    plan: EvaluationPlan

    def __init__(self, plan: EvaluationPlan, options: RunOptions | None = None) -> None:
        super().__init__(plan, options)
        self._key = hashlib.sha256(json.dumps(plan.identity["request"]).encode()).hexdigest()
        self._warm: set[str] = set()  # the kinds of units whose kernels are compiled

    def executor(self) -> Executor:
        return InTurn(self.plan.device)

    def files(self, root: Path, unit: EvaluationUnit) -> tuple[Path, ...]:
        return tuple(root / PARTS / f"{unit.stem}-arm{arm:02d}.safetensors" for arm in range(unit.arms))

    def missing(self, root: Path, unit: EvaluationUnit) -> tuple[Path, ...]:
        return tuple(file for file in self.files(root, unit) if Part.load(file, self._key) is None)

    def load(self, root: Path, unit: EvaluationUnit) -> tuple[Part, ...] | None:
        found = [Part.load(file, self._key) for file in self.files(root, unit)]
        whole = tuple(part for part in found if part is not None)
        return whole if len(whole) == unit.arms else None

    def make(self, root: Path, unit: EvaluationUnit, context: Context) -> None:
        missing = set(self.missing(root, unit))
        files = {i: file for i, file in enumerate(self.files(root, unit)) if file in missing}
        options = replace(self.plan.options_of(unit), tick=lambda tokens: context.tick(tokens, unit.label))
        self._warm_up(unit)
        if isinstance(unit.content, Sample):
            self._answer(unit, unit.content, options, files)
        else:
            self._predict(unit, unit.content, options, files)

    def _warm_up(self, unit: EvaluationUnit) -> None:
        """Run the first two chunks once in every arm on a GPU, so that compiling kernels is in nobody's time."""
        if unit.kind in self._warm or self.plan.device.type != "cuda":
            return
        self._warm.add(unit.kind)
        options, model = self.plan.options_of(unit), self.plan.loaded.model
        ids = torch.tensor(unit.content.token_ids, dtype=torch.long, device=model_device(model))
        with torch.inference_mode():
            for arm in self.plan.arms:
                lane = Lane(model, arm, options, measure=False)
                for start, stop in spans(len(ids), options.chunk)[:2]:
                    lane.step(ids[start:stop], every=False, cached=True)

    def _predict(self, unit: EvaluationUnit, prompt: LongPrompt, options: LaneOptions, files: dict[int, Path]) -> None:
        """Score a prompt's tokens in the arms whose files are missing, beside one dense pass."""
        arms, measure = self.plan.arms, self.plan.measured(unit)
        wanted = [arms[i] for i in files if i]
        results = run_prompt(self.plan.loaded.model, wanted, prompt.token_ids, options, measure=measure)
        for i, file in files.items():
            Part(*results[arms[i].name]).save(file, self._key)

    def _answer(self, unit: EvaluationUnit, sample: Sample, options: LaneOptions, files: dict[int, Path]) -> None:
        """Answer a question in the arms whose files are missing, and dense, since its logits are compared with."""
        model, tokenizer = self.plan.loaded.model, self.plan.loaded.tokenizer
        assert tokenizer is not None

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))

        measure, dense = self.plan.measured(unit), None
        for i, arm in enumerate(self.plan.arms):
            if i and i not in files:
                continue
            answer = run_sample(model, arm, sample, options, measure=measure, dense=dense, decode=decode)
            dense = dense or answer
            if i in files:
                Part(answer.scores, answer.work, answer.text, answer.score).save(files[i], self._key)

    def summarize(self, parts: Parts[EvaluationUnit, tuple[Part, ...]], run: Run) -> Summary:
        read = list(parts)
        proofs = prompt_proofs(self.plan, read)
        for name, _, proof in proofs:
            if (doubt := proof.warning(name)) is not None:
                self.options.tell(doubt)
        report = make_report(self.plan, read, run.state["started"], proofs)
        return Summary(report, make_tables(report))

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        from anchorscope.evaluation.figures import draw_all

        return draw_all(summary.report, run.path / FIGURES, formats=run.pictures)

    def out_of_memory(self) -> str:
        return "out of memory: use a smaller --chunk, shorter --lengths or fewer arms at a time"


def load_evaluation(out: Path | str) -> Evaluation:
    """A finished run, read again from its folder.

    Raises:
        DumpError: the folder holds none.
    """
    path = Path(out)
    FOLDER.check_finished(path)
    try:
        report = read_json(path / REPORT, MAX_JSON_BYTES, "report")
        check(report, _REPORT_SHAPE, str(path / REPORT))
    except InputError as error:
        raise DumpError(f"{path} holds no finished evaluation ({error}): run evaluate first") from None
    return Evaluation(path, report, pictures_in(path / FIGURES))
