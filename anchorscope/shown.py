"""Numbers and names as people are shown them: rounding must not turn what was measured into something it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_DIGITS = 7


def share_text(value: float | None, digits: int = 3, *, below: float = 1.0) -> str:
    """A share with `digits` decimals, and more where rounding would make it 0, 1, or `below` or more, and it is not.

    0.9996 is not "1.000", 0.0002 not "0.000", and 0.94997 that falls short of `below` 0.95 not "0.950"; "-" for None
    and NaN.
    """
    if value is None or math.isnan(value):
        return "-"
    for more in range(digits, MOST_DIGITS + 1):
        text = f"{value:.{more}f}"
        risen = any(value < limit <= float(text) for limit in {below, max(below, 1.0)})
        if not risen and (value <= 0 or float(text) > 0):
            return text
    return f"{value:.1e}" if 0 < value < 0.1 else f"{value:.{digits}f}"


def theta_text(value: float | str | None) -> str:
    """A theta to be typed again: two decimals at least, rounded up, so that it selects no less than what was measured.

    "inf", "-inf" and texts as they are; "-" for None.
    """
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf"
    if abs(value) > 1e15:  # beyond any score, and beyond two decimals of a float
        return f"{value:.3g}"
    up = math.ceil(value * 100 - 1e-6) / 100
    return f"{up:.2f}" if up >= value else f"{up + 0.01:.2f}"


def exact_theta(value: float | str | None) -> str:
    """A theta as a user types it: `8`, `7.25`, `inf`, `-inf`; texts as they are, "-" for None."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.10g}" if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def short_name(name: str, most: int = 44, gap: str = "...") -> str:
    """A name in at most `most` characters, cut in the middle."""
    room = most - len(gap)
    return name if len(name) <= most else f"{name[: room - room // 2]}{gap}{name[-(room // 2) :]}"


def counted(number: int, noun: str, many: str | None = None) -> str:
    """A number of things in words: "1 head", "2,048 tokens", "2 benches".

    Args:
        number: how many.
        noun: one of them.
        many: more of them; by default `noun` with an s.
    """
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def partly_sparse(coverage: Mapping[str, Any]) -> str | None:
    """That only a part of the model runs sparse, in words that follow the configuration's name; None where all does.

    Args:
        coverage: see `AnchorConfig.coverage`.
    """
    if not coverage["dense_heads"]:
        return None
    share = share_text(100 * coverage["sparse_share"], 0, below=100)
    text = f"{coverage['sparse_heads']:,} of the model's {counted(coverage['heads'], 'head')} sparse ({share}%)"
    if coverage["unnamed"]:
        named = coverage["layers"] - len(coverage["unnamed"])
        text = f"{text}, naming {named} of {counted(coverage['layers'], 'layer')}"
    return f"{text}; the rest runs dense"


def threads_text(count: int) -> str:
    """Processor threads in words: "1 thread", "2 threads"."""
    return counted(count, "thread")
