"""The parameters of anchor attention: block, step and anchor region.

What follows from them for a prompt (groups, key ranges, pairs) is the `Geometry` that `AnchorParams.at` gives: exact
integer arithmetic, which the kernels share.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from anchorscope.errors import InputError
from anchorscope.kernels.geometry import Geometry, Placement, geometry, visible_pairs

__all__ = ["AnchorParams", "anchor_pairs", "recommend_groups", "visible_pairs"]


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

    def at(self, n: int, window: int | None = None, offset: int = 0, softcap: float | None = None) -> Geometry:
        """Groups, key ranges and pairs of one head for n queries from position `offset` on (tokens).

        Its softmax scale is 1, for queries that are multiplied by theirs already.
        """
        place: Placement = {"block": self.block, "step": self.step, "init": self.init, "lookback": self.lookback}
        return geometry((1, 1, n, 1), (1, 1, offset + n, 1), window=window, offset=offset, softcap=softcap, **place)


def anchor_pairs(n: int, params: AnchorParams, window: int | None = None) -> int:
    """(query, key) pairs in all anchor regions: what theta = -inf keeps."""
    return params.at(n, window).anchor_pairs


def candidate_range(group: int, params: AnchorParams) -> tuple[int, int]:
    """Former place of `Geometry.candidates`, without a window; it goes with the next release."""
    warnings.warn("candidate_range is AnchorParams.at(n).candidates now", DeprecationWarning, stacklevel=2)
    return params.at((group + 1) * params.group).candidates(group)


CUSTOMARY = tuple(
    AnchorParams(*sizes)
    for sizes in ((128, 16), (128, 8), (128, 4), (64, 8), (64, 4), (64, 2), (32, 4), (32, 2), (16, 2), (16, 1))
)


def recommend_groups(n: int, window: int | None = None, budget: float = 0.25) -> AnchorParams | None:
    """The largest customary block x step whose anchor region costs at most `budget` of the visible pairs, if any."""
    fitting = (p for p in CUSTOMARY if anchor_pairs(n, p, window) <= budget * visible_pairs(n, window))
    return next(fitting, None)


def cheapest_groups(n: int, window: int | None = None) -> AnchorParams:
    """The customary block x step whose anchor region costs least, the largest of equals."""
    return min(CUSTOMARY, key=lambda p: anchor_pairs(n, p, window))
