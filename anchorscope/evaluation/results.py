"""From parts to results: the objects of evaluation.json and the rows of its tables. Column names are API."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anchorscope.evaluation.lanes import PrefillWork, join_scores
from anchorscope.evaluation.metrics import (
    TokenScores,
    by_position,
    mean_interval,
    summarize_tokens,
    token_intervals,
    wilson,
)
from anchorscope.evaluation.parts import Part
from anchorscope.evaluation.tasks import Sample
from anchorscope.proof import PromptProof
from anchorscope.runs.values import number

METRICS = ("perplexity_dense", "perplexity_sparse", "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement")
WITH_INTERVAL = ("perplexity_ratio", "kl_mean", "top1_agreement")
TIMES = ("prefill_seconds", "attention_seconds", "attention_share", "tokens_per_second")
SCORES = ("score", "logprob")
SHARE = "sparse_heads_share"  # of the model's query heads; the others ran dense
PROMPT_COLUMNS = (
    "prompt",
    "length",
    "arm",
    *METRICS,
    *(f"{name}_{end}" for name in WITH_INTERVAL for end in ("low", "high")),
    "recall",
    "density",
    *(f"last_half_{name}" for name in METRICS),
    *(f"{side}_{name}" for side in ("dense", "sparse") for name in TIMES),
    SHARE,
)
TASK_COLUMNS = (
    "task",
    "length",
    "depth",
    "arm",
    "samples",
    *(f"{name}_{side}" for name in SCORES for side in ("dense", "sparse")),
    *(f"score_{side}_{end}" for side in ("dense", "sparse") for end in ("low", "high")),
    "logprob_difference",
    *METRICS,
    "recall",
    "density",
    *(f"{side}_{name}" for side in ("dense", "sparse") for name in TIMES),
    SHARE,
)
ANSWER_COLUMNS = ("task", "length", "depth", "sample", "arm", "expected", "answer", "score", "logprob")


def prompt_result(name: str, length: int, arm: str, dense: Part, part: Part, seed: int) -> dict[str, Any]:
    """One prompt at one length in one arm, against dense."""
    reference, scores = dense.scores.nll, part.scores
    half = len(reference) // 2
    late = TokenScores(scores.nll[half:], scores.kl[half:], scores.agree[half:], scores.right[half:])
    return {
        "prompt": name,
        "length": length,
        "arm": arm,
        **summarize_tokens(reference, scores),
        "recall": part.work.recall,
        "density": part.work.density,
        "intervals": token_intervals(reference, scores, seed),
        "last_half": summarize_tokens(reference[half:], late),
        "by_position": by_position(reference, scores),
        "layers": _layers(dense.work, part.work),
        "times": _times([dense.work], [part.work]),
    }


def proof_result(unit: str, length: int, proof: PromptProof) -> dict[str, Any]:
    """How well the dense model predicts the end of a prompt."""
    return {"prompt": unit, "length": length, **proof.to_json(), "near_chance": proof.near_chance}


def task_result(
    arm: str, samples: Sequence[Sample], dense: Sequence[Part], parts: Sequence[Part], seed: int
) -> dict[str, Any]:
    """Samples of one task and length, and of one depth or all of them, in one arm, against dense.

    The metrics of tokens are those of the correct answers, given the prompt.
    """
    one = samples[0]
    depths = {s.depth for s in samples}
    reference = join_scores([p.scores for p in dense]).nll
    recalls = [p.work.recall for p in parts]
    result: dict[str, Any] = {
        "task": one.task,
        "length": one.length,
        "depth": one.depth if len(depths) == 1 else None,
        "arm": arm,
        "samples": len(samples),
    }
    intervals: dict[str, Any] = {}
    logprobs = {side: [_logprob(p) for p in some] for side, some in (("dense", dense), ("sparse", parts))}
    for side, some in (("dense", dense), ("sparse", parts)):
        result[f"score_{side}"] = float(np.mean([p.score for p in some]))
        result[f"logprob_{side}"] = float(np.mean(logprobs[side]))
        intervals[f"score_{side}"] = wilson(result[f"score_{side}"], len(samples))
        intervals[f"logprob_{side}"] = mean_interval(logprobs[side], seed)
    gains = {
        "score_difference": [(p.score or 0.0) - (d.score or 0.0) for d, p in zip(dense, parts, strict=True)],
        "logprob_difference": [p - d for d, p in zip(logprobs["dense"], logprobs["sparse"], strict=True)],
    }
    for name, values in gains.items():
        result[name] = float(np.mean(values))
        intervals[name] = mean_interval(values, seed)
    return {
        **result,
        **summarize_tokens(reference, join_scores([p.scores for p in parts])),
        "recall": None if None in recalls else float(np.mean([r for r in recalls if r is not None])),
        "density": float(np.mean([p.work.density for p in parts])),
        "intervals": intervals,
        "times": _times([p.work for p in dense], [p.work for p in parts]),
    }


def answer_result(arm: str, sample: Sample, part: Part) -> dict[str, Any]:
    """One generated answer."""
    return {
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "sample": sample.index,
        "arm": arm,
        "expected": list(sample.expected),
        "answer": part.text,
        "score": part.score,
        "logprob": _logprob(part),
    }


def prompt_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of prompts.csv."""
    flat = {**result, **_flat_times(result), **{f"last_half_{k}": v for k, v in result["last_half"].items()}}
    for name in WITH_INTERVAL:
        flat[f"{name}_low"], flat[f"{name}_high"] = result["intervals"][name]
    return _row(PROMPT_COLUMNS, flat)


def task_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of tasks.csv; an empty depth means all of them."""
    flat = {**result, **_flat_times(result)}
    for name in ("score_dense", "score_sparse"):
        flat[f"{name}_low"], flat[f"{name}_high"] = result["intervals"][name]
    return _row(TASK_COLUMNS, flat)


def answer_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of answers.csv."""
    return _row(ANSWER_COLUMNS, {**result, "expected": " | ".join(result["expected"])})


def _row(columns: Iterable[str], values: Mapping[str, Any]) -> tuple[str, ...]:
    def field(value: Any) -> str:
        if value is None:
            return ""
        return number(value) if isinstance(value, float) else str(value)

    return tuple(field(values[name]) for name in columns)


def _flat_times(result: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{side}_{name}": value for side, times in result["times"].items() for name, value in times.items()}


def _logprob(part: Part) -> float:
    """Mean log-probability of the correct answer's tokens, nats per token."""
    return -float(part.scores.nll.mean())


def _layers(dense: PrefillWork, sparse: PrefillWork) -> list[dict[str, Any]]:
    return [
        {
            "layer": index,
            "kind": x.kind,
            "density": x.kept_pairs / max(1, x.visible_pairs),
            "recall": x.recall,
            "seconds_dense": dense.layers[index].seconds if index in dense.layers else None,
            "seconds_sparse": x.seconds,
        }
        for index, x in sorted(sparse.layers.items())
    ]


def _times(dense: Sequence[PrefillWork], sparse: Sequence[PrefillWork]) -> dict[str, dict[str, float]]:
    """Mean seconds of a prefill, those in attention, and tokens per second, of both sides."""
    return {side: _mean_times(works) for side, works in (("dense", dense), ("sparse", sparse))}


def _mean_times(works: Sequence[PrefillWork]) -> dict[str, float]:
    seconds = math.fsum(w.seconds for w in works)
    attention = math.fsum(w.attention_seconds for w in works)
    return {
        "prefill_seconds": seconds / len(works),
        "attention_seconds": attention / len(works),
        "attention_share": attention / seconds if seconds else 0.0,
        "tokens_per_second": sum(w.tokens for w in works) / seconds if seconds else 0.0,
    }
