"""Evaluation: a model run dense and sparse side by side, on prompts and on synthetic tasks."""

from __future__ import annotations

from anchorscope.evaluation.run import Evaluation, evaluate, load_evaluation

__all__ = ["Evaluation", "evaluate", "load_evaluation"]
