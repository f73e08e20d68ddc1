"""Every method on one chart: score a line-up of methods on the heads of a dump with one engine (docs/methods.md)."""

from __future__ import annotations

from anchorscope.compare.run import Comparison, compare, load_comparison, plan_compare, score_lineup
from anchorscope.compare.score import Score, score

__all__ = ["Comparison", "Score", "compare", "load_comparison", "plan_compare", "score", "score_lineup"]
