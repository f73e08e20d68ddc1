"""One attention head as methods see it: queries, keys and the few quantities that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from anchorscope.kernels.torch_backend import capped
from anchorscope.params import visible_pairs
from anchorscope.ranges import working_dtype

T = TypeVar("T")

CHUNK_ROWS = 128  # on the CPU; GPUs take more rows at a time
GPU_CHUNK_ELEMENTS = 1 << 26


class Chunk(NamedTuple):
    """Scores of queries first..last-1 with keys low..last-1, hidden ones -inf."""

    first: int
    last: int
    low: int
    scores: Tensor


class Head:
    """Queries and keys of one query head, and what scores mean for it.

    Attributes:
        q: (N, d) queries, *already multiplied by the softmax scale*, float32 or float64.
        k: (N, d) keys of its kv head.
        n, d: N and d.
        window: sliding window in tokens, or None.
        softcap: logit soft-cap in nats, or None; it applies to every score, pooled or not.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` None means float32, and float64 where scores are too large or small for it.

        Raises:
            InputError: NaN or infinity in a tensor, or scores that overflow float32.
        """
        needed = working_dtype(q, k, None, scale, softcap)
        dtype = needed if dtype is None else dtype
        self.q = q.to(dtype) * scale
        self.k = k.to(dtype)
        self.n, self.d = q.shape
        self.window = None if window is None or window >= self.n else window
        self.softcap = softcap
        self._known: dict[tuple[Any, ...], Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.k.device

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return visible_pairs(self.n, self.window)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """`make()`, computed once per head and key: what a sweep's settings share."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def cap(self, scores: Tensor) -> Tensor:
        """Scores under the soft-cap (changed in place)."""
        return capped(scores, self.softcap)

    def low(self, row: int) -> int:
        """First key that query `row` sees."""
        return 0 if self.window is None else max(row - self.window + 1, 0)

    def scores(self, first: int, last: int, low: int, high: int) -> Tensor:
        """Scores of queries first..last-1 with keys low..high-1, hidden ones -inf: (last - first, high - low)."""
        s = self.cap(self.q[first:last] @ self.k[low:high].T)
        i = torch.arange(first, last, device=self.device)[:, None]
        later = max(first + 1, low)  # earlier keys are later than none of these queries
        if high > later:
            s[:, later - low :].masked_fill_(torch.arange(later, high, device=self.device) > i, -math.inf)
        if self.window is not None and low <= last - 1 - self.window:
            s.masked_fill_(torch.arange(low, high, device=self.device) <= i - self.window, -math.inf)
        return s

    def chunks(self) -> Iterator[Chunk]:
        """All scores, a run of queries at a time (whole multiples of 128 queries, but for the last)."""
        rows = chunk_rows(self.device, self.n)
        for first in range(0, self.n, rows):
            last = min(first + rows, self.n)
            low = self.low(first)
            yield Chunk(first, last, low, self.scores(first, last, low, last))

    def pooled_queries(self, block: int) -> Tensor:
        """Mean (scaled) query of each block, (ceil(N / block), d); the last block may be short."""
        return self.once(("q", block), lambda: pool(self.q, block))

    def pooled_keys(self, block: int) -> Tensor:
        """Mean key of each block, (ceil(N / block), d)."""
        return self.once(("k", block), lambda: pool(self.k, block))

    def visible_blocks(self, query_block: int, key_block: int) -> Tensor:
        """(ceil(N / query_block), ceil(N / key_block)) bool: some query of the block sees some key of the block."""

        def make() -> Tensor:
            i0 = torch.arange(0, self.n, query_block, device=self.device)[:, None]
            j0 = torch.arange(0, self.n, key_block, device=self.device)
            i1, j1 = (i0 + query_block).clamp_max(self.n) - 1, (j0 + key_block).clamp_max(self.n) - 1
            seen = j0 <= i1
            return seen if self.window is None else seen & (i0 - j1 < self.window)

        return self.once(("visible", query_block, key_block), make)

    def block_scores(self, query_block: int, key_block: int) -> Tensor:
        """Scores of pooled queries with pooled keys, -inf where no pair is visible; shape of `visible_blocks`."""

        def make() -> Tensor:
            s = self.cap(self.pooled_queries(query_block) @ self.pooled_keys(key_block).T)
            return s.masked_fill_(~self.visible_blocks(query_block, key_block), -math.inf)

        return self.once(("scores", query_block, key_block), make)


def chunk_rows(device: torch.device, n: int) -> int:
    """Queries whose scores are held at a time, a multiple of 128: few on a CPU (caches), up to 2048 on a GPU."""
    if device.type == "cpu":
        return CHUNK_ROWS
    return CHUNK_ROWS * max(1, min(16, GPU_CHUNK_ELEMENTS // (CHUNK_ROWS * n)))


def pool(x: Tensor, block: int) -> Tensor:
    """Means of runs of `block` rows, (N, d) -> (ceil(N / block), d); the last run may be short."""
    whole = len(x) // block * block
    parts = [x[:whole].view(-1, block, x.shape[1]).mean(1)]
    if whole < len(x):
        parts.append(x[whole:].mean(0, keepdim=True))
    return torch.cat(parts)


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums of runs of `block` entries along the last axis; the last run may be short."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def ranks(x: Tensor) -> Tensor:
    """Place of each entry in descending order along the last axis, ties lowest index first, int64."""
    order = x.argsort(stable=True, dim=-1, descending=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


def covering(x: Tensor, target: Tensor | float) -> Tensor:
    """The fewest largest entries along the last axis that sum to at least `target`, bool; ties lowest index first.

    x is not negative. An entry is kept while the sum of those before it, in float64, is still below the target;
    entries of zero never help and are never kept.
    """
    order = x.argsort(stable=True, dim=-1, descending=True)
    sorted_x = x.double().gather(-1, order)
    before = torch.nn.functional.pad(sorted_x.cumsum(-1)[..., :-1], (1, 0))
    target = torch.as_tensor(target, dtype=torch.float64, device=x.device)
    keep = (before < (target[..., None] if target.ndim else target)) & (sorted_x > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
