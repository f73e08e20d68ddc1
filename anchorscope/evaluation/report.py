"""What evaluation.json and the tables hold, made of the saved parts alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from anchorscope.evaluation.lanes import DENSE, Arm
from anchorscope.evaluation.parts import Part
from anchorscope.evaluation.request import EvaluationPlan
from anchorscope.evaluation.results import (
    ANSWER_COLUMNS,
    PROMPT_COLUMNS,
    SHARE,
    TASK_COLUMNS,
    answer_result,
    answer_row,
    prompt_result,
    prompt_row,
    proof_result,
    task_result,
    task_row,
)
from anchorscope.evaluation.tasks import Sample
from anchorscope.evaluation.units import LongPrompt
from anchorscope.files import csv_text
from anchorscope.models.proof import prove_prompt, summarize
from anchorscope.proof import PromptProof
from anchorscope.runs.environment import installed, versions
from anchorscope.runs.values import jsonable

VERSION = 1
PROMPTS, TASKS, ANSWERS = "prompts.csv", "tasks.csv", "answers.csv"

UnitParts = Sequence[Part]  # one of each arm, dense first


def make_report(
    plan: EvaluationPlan, parts: Sequence[UnitParts], started: str, proofs: Sequence[tuple[str, int, PromptProof]]
) -> dict[str, Any]:
    """What evaluation.json holds.

    Args:
        plan: what was asked for.
        parts: the saved parts of every unit, in order.
        started: when the run began.
        proofs: what `prompt_proofs` found.
    """
    tasks, depths = _task_results(plan, parts)
    return {
        "format": "anchorscope-evaluation",
        "version": VERSION,
        "started": started,
        "model": plan.identity["request"]["model"],
        "settings": plan.settings,
        "environment": _environment(plan.device),
        "arms": [{"name": arm.name, **_described(arm, plan.heads)} for arm in plan.sparse],
        "prompts": _prompt_results(plan, parts),
        "tasks": tasks,
        "depths": depths,
        "answers": _answer_results(plan, parts),
        "proof": {**plan.proof.to_json(), "prompts": [proof_result(*each) for each in proofs]},
    }


def make_tables(report: Mapping[str, Any]) -> dict[str, str]:
    """The CSV files by name."""
    shares = {arm["name"]: arm["coverage"]["sparse_share"] for arm in report["arms"]}

    def rows(*names: str) -> list[dict[str, Any]]:
        return [{**row, SHARE: shares[row["arm"]]} for name in names for row in report[name]]

    return {
        PROMPTS: csv_text(PROMPT_COLUMNS, map(prompt_row, rows("prompts"))),
        TASKS: csv_text(TASK_COLUMNS, map(task_row, rows("tasks", "depths"))),
        ANSWERS: csv_text(ANSWER_COLUMNS, map(answer_row, report["answers"])),
    }


def prompt_proofs(plan: EvaluationPlan, parts: Sequence[UnitParts]) -> list[tuple[str, int, PromptProof]]:
    """How well the dense arm predicts the end of each prompt, (name, length, proof); without prompts, that of a sample.

    A prompt's scores are there already; of a sample, a short run scores the text that the question is about.
    """
    model = plan.loaded.model
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 0))
    found = []
    for unit, (dense, *_) in zip(plan.units, parts, strict=True):
        if isinstance(unit.content, LongPrompt):
            prompt, scores = unit.content, dense.scores
            found.append((prompt.prompt, prompt.length, summarize(scores.nll, scores.right, prompt.length, vocabulary)))
    if not found:
        first = plan.units[0].content
        found.append((first.name, len(first.token_ids), prove_prompt(model, first.token_ids)))
    return found


def _prompt_results(plan: EvaluationPlan, parts: Sequence[UnitParts]) -> list[dict[str, Any]]:
    """One object per prompt, length and sparse arm."""
    return [
        prompt_result(unit.content.prompt, unit.content.length, arm.name, dense, part, plan.request.seed)
        for unit, (dense, *others) in zip(plan.units, parts, strict=True)
        if isinstance(unit.content, LongPrompt)
        for arm, part in zip(plan.sparse, others, strict=True)
    ]


def _answer_results(plan: EvaluationPlan, parts: Sequence[UnitParts]) -> list[dict[str, Any]]:
    """One object per sample and arm."""
    return [
        answer_result(arm.name, unit.content, part)
        for unit, mine in zip(plan.units, parts, strict=True)
        if isinstance(unit.content, Sample)
        for arm, part in zip(plan.arms, mine, strict=True)
    ]


def _task_results(
    plan: EvaluationPlan, parts: Sequence[UnitParts]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One object per task, length and sparse arm, over all depths; and one for each depth."""
    groups: dict[tuple[str, int, float | None], list[tuple[Sample, UnitParts]]] = {}
    for unit, mine in zip(plan.units, parts, strict=True):
        if isinstance(unit.content, Sample):
            for depth in dict.fromkeys((None, unit.content.depth)):
                groups.setdefault((unit.content.task, unit.content.length, depth), []).append((unit.content, mine))
    tasks: list[dict[str, Any]] = []
    depths: list[dict[str, Any]] = []
    for (_, _, depth), members in groups.items():
        samples = [sample for sample, _ in members]
        for a, arm in enumerate(plan.arms):
            if arm.name == DENSE:
                continue
            dense, sparse = ([mine[side] for _, mine in members] for side in (0, a))
            result = task_result(arm.name, samples, dense, sparse, plan.request.seed)
            (tasks if depth is None else depths).append({**result, "depth": depth})
    return tasks, depths


def _described(arm: Arm, heads: Mapping[int, int]) -> dict[str, Any]:
    """What a reader needs to recognize an arm; the whole of it is in its anchors.json."""
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
        "coverage": arm.config.coverage(heads),
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """What times depend on."""
    found: dict[str, Any] = {**versions(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    found["transformers"] = installed("transformers")
    found["machine"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found
