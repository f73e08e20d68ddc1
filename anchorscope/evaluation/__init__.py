"""Evaluation: a model run dense and sparse side by side, on prompts and on synthetic tasks."""

from __future__ import annotations

from anchorscope.evaluation.request import EvaluateRequest, EvaluationPlan
from anchorscope.evaluation.run import Evaluation, evaluate, load_evaluation, plan_evaluation

__all__ = ["EvaluateRequest", "Evaluation", "EvaluationPlan", "evaluate", "load_evaluation", "plan_evaluation"]
