"""The parameters of anchor attention and the integer geometry that follows from them.

Everything here is exact integer arithmetic on token positions: which keys form the anchor region of a query, which are
candidates for stripes, and how many (query, key) pairs that makes. No tensor is built; numpy arrays of length N at
most. Source: Zhang et al., AnchorAttention (EMNLP 2025), section 3, with the partition stated in docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anchorscope.errors import InputError


@dataclass(frozen=True)
class AnchorParams:
    """Block size, step and anchor region of anchor attention (theta is given apart: one pass serves many thetas).

    Attributes:
        block: queries pooled together (tokens).
        step: query blocks that share one selection of stripes; a *group* is `block * step` queries.
        init: first tokens that are always kept; `None` means `block`.
        lookback: tokens before the group's first query that are always kept; `None` means `block`.

    Raises:
        InputError: block or step below 1, init or lookback negative.
    """

    block: int = 128
    step: int = 16
    init: int | None = None
    lookback: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("block", 1), ("step", 1), ("init", 0), ("lookback", 0)):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, self.block)
            elif isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(f"{name} must be a whole number of at least {low}, not {value!r}")

    @property
    def group(self) -> int:
        """Queries per group."""
        return self.block * self.step

    @property
    def init_tokens(self) -> int:
        """`init` with its default filled in (typed as an int)."""
        return self.block if self.init is None else self.init

    @property
    def lookback_tokens(self) -> int:
        """`lookback` with its default filled in (typed as an int)."""
        return self.block if self.lookback is None else self.lookback

    def groups(self, n: int) -> int:
        """Number of groups of n queries; the last may be short."""
        return math.ceil(n / self.group)

    def blocks(self, n: int) -> int:
        """Number of query blocks of n queries; the last may be short."""
        return math.ceil(n / self.block)


def visible_pairs(n: int, window: int | None = None) -> int:
    """Causal (query, key) pairs of n tokens: j <= i and, with a sliding window, i - j < window."""
    if window is None or window >= n:
        return n * (n + 1) // 2
    return window * (window + 1) // 2 + (n - window) * window


def row_visible(n: int, window: int | None = None) -> np.ndarray:
    """Visible keys per query, (n,) int64."""
    rows = np.arange(1, n + 1, dtype=np.int64)
    return rows if window is None else np.minimum(rows, window)


def row_anchor(n: int, params: AnchorParams, window: int | None = None) -> np.ndarray:
    """Visible keys in the anchor region A(i) = {j <= i : j < init or j >= G(g) - lookback}, (n,) int64."""
    i = np.arange(n, dtype=np.int64)
    low = np.zeros(n, dtype=np.int64) if window is None else np.maximum(i - window + 1, 0)
    start = np.maximum(i // params.group * params.group - params.lookback_tokens, 0)  # first local key
    init_end = np.minimum(params.init_tokens, i + 1)
    local = i + 1 - np.maximum(start, low)
    first = np.minimum(init_end, start) - low  # init keys that are not local already
    return local + np.maximum(first, 0)


def anchor_pairs(n: int, params: AnchorParams, window: int | None = None) -> int:
    """(query, key) pairs in all anchor regions: what theta = -inf keeps."""
    return int(row_anchor(n, params, window).sum())


def candidate_range(group: int, params: AnchorParams) -> tuple[int, int]:
    """Candidate columns C(g) = [init, G(g) - lookback) of a group, as (start, stop); empty when stop <= start."""
    return params.init_tokens, max(group * params.group - params.lookback_tokens, params.init_tokens)


def column_pairs(group: int, n: int, params: AnchorParams, window: int | None = None) -> np.ndarray:
    """Queries of the group that see each candidate column, (stop - start,) int64; zero where the window hides it."""
    start, stop = candidate_range(group, params)
    first = group * params.group
    last = min(first + params.group, n)
    if window is None:
        return np.full(stop - start, last - first, dtype=np.int64)
    seen = np.minimum(np.arange(start, stop, dtype=np.int64) + window, last) - first
    return np.maximum(seen, 0)


def recommend_groups(n: int, window: int | None = None, budget: float = 0.25) -> AnchorParams | None:
    """The largest customary block x step whose anchor region costs at most `budget` of the visible pairs, if any."""
    for block, step in ((128, 16), (128, 8), (128, 4), (64, 8), (64, 4), (64, 2), (32, 4), (32, 2), (16, 2), (16, 1)):
        params = AnchorParams(block, step)
        if anchor_pairs(n, params, window) <= budget * visible_pairs(n, window):
            return params
    return None
