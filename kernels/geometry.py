"""One geometry for the reference, the torch and the Triton back end: sizes of a call, positions of its queries and
keys, and the integers that follow from them.

Positions are absolute, in tokens. Groups start at the first query of the call, at position `offset`. Source: Zhang et
al., AnchorAttention (EMNLP 2025), section 3, with the partition of docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Placement(TypedDict, total=False):
    """The keyword parameters that every stage shares.

    Keys:
        block: queries pooled together; 128 by default.
        step: blocks that share one selection; 16 by default.
        init: first tokens that are always kept; `block` by default.
        lookback: tokens before each group that are always kept; `block` by default.
        scale: softmax scale; d ** -0.5 by default.
        window: key j is visible to query i only if i - j < window; None means full causal attention.
        softcap: every score s becomes c * tanh(s / c), in nats; None means no soft-cap.
        offset: absolute position of the first query; N - n by default.
    """

    block: int
    step: int
    init: int | None
    lookback: int | None
    scale: float | None
    window: int | None
    softcap: float | None
    offset: int | None


class Geometry(NamedTuple):
    """Checked sizes and positions of one call; `geometry` makes it.

    Attributes:
        batch, heads, kv_heads: B, H and Hkv; query head h reads kv head h // (H // Hkv).
        queries, keys: n and N.
        dim: head dimension d.
        block, step, init, lookback, offset, window: see `Placement`, all filled in; tokens (step: blocks).
        scale: softmax scale.
        softcap: nats, or None.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    block: int
    step: int
    init: int
    lookback: int
    offset: int
    window: int | None
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        """Queries per group."""
        return self.block * self.step

    @property
    def blocks(self) -> int:
        """Query blocks; the last may be short."""
        return -(-self.queries // self.block)

    @property
    def groups(self) -> int:
        """Groups; the last may be short."""
        return -(-self.queries // self.group)

    @property
    def repeats(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def dim_pad(self) -> int:
        """Head dimension rounded up to a power of two of at least 16, as tiles need it."""
        return max(16, 1 << (self.dim - 1).bit_length())

    @property
    def effective_window(self) -> int:
        """The window, or the number of keys: key j is visible to queries at positions below j + effective_window."""
        return self.keys if self.window is None else self.window

    @property
    def cap(self) -> float:
        """The soft-cap as kernels take it: 0 without one."""
        return self.softcap or 0.0

    def rows(self, group: int) -> tuple[int, int]:
        """Queries [first, last) of a group, counted from the first query of the call."""
        return group * self.group, min((group + 1) * self.group, self.queries)

    def local_start(self, group: int) -> int:
        """First key of the group's local region, G(g) - lookback."""
        return max(self.offset + group * self.group - self.lookback, 0)

    def candidates(self, group: int) -> tuple[int, int]:
        """Candidate keys [start, stop) that some query of the group sees."""
        start = self.init
        if self.window is not None:
            start = max(start, self.offset + group * self.group - self.window + 1)
        return start, max(self.local_start(group), start)

    def anchor_keys(self, group: int, last: int) -> tuple[slice, slice]:
        """Keys of a group's anchor region up to its query `last` - 1: the first ones, and those near the group.

        Keys that a window hides from the whole group are left out. The two ranges never overlap.
        """
        lowest = max(self.offset + group * self.group - self.effective_window + 1, 0)
        local = self.local_start(group)
        return slice(lowest, max(min(self.init, local), lowest)), slice(max(local, lowest), self.offset + last)

    def column_pairs(self, columns: Any, first: Any, last: Any) -> Any:
        """How many of the queries first..last-1 of a group see each candidate column; without a window, all of them.

        Args:
            columns: key positions, an int64 tensor or NumPy array.
            first, last: queries, counted from the first query of the call: numbers, or tensors like `columns`.
        """
        first, last = first + self.offset, last + self.offset
        return (columns + self.effective_window).clip(first, last) - first

    @property
    def visible_pairs(self) -> int:
        """Causal (query, key) pairs of one head, within the window if there is one."""
        return visible_pairs(self.queries, self.window, self.offset)

    @property
    def candidate_pairs(self) -> int:
        """Pairs of the queries of one head with the candidate columns of their group that they see."""
        return _candidate_pairs(self)

    @property
    def anchor_pairs(self) -> int:
        """Pairs of one head in the anchor regions, which theta = -inf keeps: all visible pairs but the candidates."""
        return self.visible_pairs - self.candidate_pairs

    @property
    def most_stripes(self) -> int:
        """Candidate columns over all groups and heads, whatever the window: no selection is larger."""
        least = max(0, (self.lookback + self.init - self.offset) // self.group + 1)  # first group with candidates
        count = self.groups - least
        if count <= 0:
            return 0
        spare = self.offset - self.lookback - self.init
        each = count * spare + self.group * (self.groups * (self.groups - 1) - least * (least - 1)) // 2
        return self.batch * self.heads * each

    def flat(self) -> tuple[list[int], float, float]:
        """The geometry as a registered op takes it: integers, scale and soft-cap; 0 for no window or no soft-cap."""
        return [*self[:11], self.window or 0], self.scale, self.cap

    @classmethod
    def unflat(cls, integers: Sequence[int], scale: float, cap: float) -> Geometry:
        """The geometry that `flat` took apart."""
        *sizes, window = integers
        return cls._make((*sizes, window or None, scale, cap or None))


def visible_pairs(n: int, window: int | None = None, offset: int = 0) -> int:
    """Causal (query, key) pairs of n queries from position `offset` on: j <= i and, with a window, i - j < window."""
    hidden = 0
    if window is not None:
        hidden = _triangle(offset + n - window) - _triangle(offset - window)
    return _triangle(offset + n) - _triangle(offset) - hidden


def _triangle(x: int) -> int:
    """1 + 2 + ... + x; zero for x < 1."""
    return x * (x + 1) // 2 if x > 0 else 0


@lru_cache(maxsize=1024)
def _candidate_pairs(geo: Geometry) -> int:
    total = 0
    for group in range(geo.groups):
        (start, stop), (first, last) = geo.candidates(group), geo.rows(group)
        # With w the window, column j is seen by max(j + w - first, 0) - max(j + w - last, 0) queries.
        for sign, edge in ((1, first), (-1, last)):
            ahead = geo.effective_window - geo.offset - edge - 1
            total += sign * (_triangle(stop + ahead) - _triangle(start + ahead))
    return total


@lru_cache(maxsize=256)
def geometry(q_shape: Sequence[int], k_shape: Sequence[int], **place: Unpack[Placement]) -> Geometry:
    """Check the sizes and parameters of one call and fill in the defaults of `Placement`.

    Lengths beyond the sequence change nothing and are cut, so that position arithmetic stays within 32 bits.

    Args:
        q_shape: (B, H, n, d).
        k_shape: (B, Hkv, N, d).
        **place: see `Placement`.

    Raises:
        TypeError: a parameter that `Placement` does not have.
        ValueError: the shapes do not fit together, a parameter is out of range, or queries lie beyond the last key.
    """
    if unknown := place.keys() - Placement.__annotations__.keys():
        raise TypeError(f"there is no parameter {min(unknown)!r}; there are {', '.join(Placement.__annotations__)}")
    batch, heads, kv_heads, n, keys, dim = _sizes(q_shape, k_shape)
    block, step = place.get("block", 128), place.get("step", 16)
    init, lookback = (block if x is None else x for x in (place.get("init"), place.get("lookback")))
    scale, offset = place.get("scale"), place.get("offset")
    scale = dim**-0.5 if scale is None else float(scale)
    offset = keys - n if offset is None else offset
    window, softcap = place.get("window"), place.get("softcap")
    geo = Geometry(
        batch, heads, kv_heads, n, keys, dim, block, step, init, lookback, offset, window, scale, softcap
    )  # fmt: skip
    _check(geo)
    if block > n:
        block, step = n, 1
    elif step * block > n + block:
        step = -(-n // block)
    return geo._replace(
        block=block,
        step=step,
        init=min(init, 2 * keys),
        lookback=min(lookback, 2 * keys),
        window=None if window is None or window >= keys else window,
        softcap=None if softcap is None else float(softcap),
    )


def _sizes(q_shape: Sequence[int], k_shape: Sequence[int]) -> tuple[int, int, int, int, int, int]:
    """B, H, Hkv, n, N and d."""
    if len(q_shape) != 4 or len(k_shape) != 4:
        raise ValueError(f"q and k must be (batch, heads, tokens, d), not {tuple(q_shape)} and {tuple(k_shape)}")
    (batch, heads, n, dim), (k_batch, kv_heads, keys, k_dim) = q_shape, k_shape
    if k_batch != batch or k_dim != dim or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"k {tuple(k_shape)} does not fit q {tuple(q_shape)}: both need the same batch and head_dim, and the query"
            " heads must be a multiple of the kv heads"
        )
    return batch, heads, kv_heads, n, keys, dim


def _check(geo: Geometry) -> None:
    for name, value in (("block", geo.block), ("step", geo.step)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if geo.init < 0 or geo.lookback < 0:
        raise ValueError(f"init and lookback must not be negative, not {geo.init} and {geo.lookback}")
    if geo.window is not None and geo.window < 1:
        raise ValueError(f"window must be at least 1 or None, not {geo.window}")
    if not (geo.scale > 0 and math.isfinite(geo.scale)):
        raise ValueError(f"scale must be a positive number, not {geo.scale}")
    if geo.softcap is not None and not (geo.softcap > 0 and math.isfinite(geo.softcap)):
        raise ValueError(f"softcap must be a positive number or None, not {geo.softcap}")
    if geo.queries < 1 or geo.offset < 0 or geo.offset + geo.queries > geo.keys:
        raise ValueError(f"{geo.queries} queries from offset {geo.offset} on do not lie within the {geo.keys} keys")
