"""Values as our JSON and CSV files hold them."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A CSV field: nine significant digits, `inf`, `-inf`, empty for NaN."""
    return "" if math.isnan(value) else f"{float(value):.9g}"


def jsonable(value: float | None) -> float | str | None:
    """JSON has no infinities: `inf` and `-inf` become text, NaN and None become null."""
    if value is None or math.isnan(value):
        return None
    return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
