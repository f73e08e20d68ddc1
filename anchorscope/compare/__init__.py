"""Every method on one chart: score a line-up of methods on the heads of a dump with one engine (docs/methods.md)."""

from __future__ import annotations

from anchorscope.compare.request import ComparePlan, CompareRequest
from anchorscope.compare.run import Comparison, compare, load_comparison, plan_compare
from anchorscope.compare.score import Score, score, score_lineup

__all__ = [
    "ComparePlan",
    "CompareRequest",
    "Comparison",
    "Score",
    "compare",
    "load_comparison",
    "plan_compare",
    "score",
    "score_lineup",
]
