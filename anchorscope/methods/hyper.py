"""HyperAttention: sort by locality-sensitive hash, attend within buckets, sample the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Buckets, Columns, Part, Selection


@dataclass(frozen=True)
class Hyper(Method):
    """Recursive halving: both halves on their own, and the later half's queries on the earlier half's keys by hashing.

    A range of at most `leaf` tokens is dense. Otherwise it is cut in two (the first half gets the odd token). If the
    second half has fewer than `leaf` queries, it attends to all keys of the first; else queries and keys of the two
    halves are sorted by an angular hash (`planes` random hyperplanes, sign patterns in Gray-code order, stable), cut
    into as many equal runs as the keys have blocks of `block`, and pairs in runs of the same number are kept, together
    with `samples` keys drawn uniformly (with replacement) for all queries of the half.

    Hash planes and samples come from a generator seeded with `seed`, so a run can be repeated. Simplified: kept pairs
    enter the softmax with weight one, where the authors weight sampled keys by the inverse of their share.
    """

    name: ClassVar = "hyper"
    parameter: ClassVar = "leaf"
    sweep: ClassVar = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "token"
    source: ClassVar = "Han et al., HyperAttention, ICLR 2024, arXiv 2310.05869"

    leaf: int = setting(4096, "range computed exactly, tokens", low=1)
    block: int = setting(256, "keys per run of the sorted order", low=1)
    samples: int = setting(256, "keys sampled for the rest", low=0)
    planes: int = setting(7, "random hyperplanes", low=1, high=30)
    seed: int = setting(0, "seed of planes and samples", low=0)

    def dense_at(self, tokens: int) -> float:
        return tokens

    def select(self, head: Head) -> Selection:
        codes = head.once(("hyper", self.planes, self.seed), lambda: self._codes(head))
        generator = torch.Generator().manual_seed(self.seed)
        parts: list[Part] = []
        products = 2 * head.n * self.planes
        ranges, hashed = [(0, head.n)], False
        while ranges:
            level = _Level(head)
            deeper = []
            for first, last in ranges:
                if last - first <= self.leaf:
                    level.keep(first, last, first, last)
                    continue
                middle = first + (last - first + 1) // 2
                deeper += [(first, middle), (middle, last)]
                if last - middle < self.leaf:
                    level.keep(middle, last, first, middle)
                    continue
                hashed = True
                level.hash(codes, first, middle, last, self.block)
                drawn = torch.randint(first, middle, (self.samples,), generator=generator)
                level.sample(middle, last, drawn)
            parts += level.parts()
            ranges = deeper
        return Selection(tuple(parts), identify=products if hashed else 0)

    def _codes(self, head: Head) -> tuple[Tensor, Tensor]:
        """Place of each query's and key's sign pattern in Gray-code order, (N,) int64 each."""
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(head.d, self.planes, generator=generator, dtype=torch.float64)
        return tuple(gray_place((x @ planes.to(x)) > 0) for x in (head.q, head.k))  # type: ignore[return-value]


class _Level:
    """The pairs kept at one depth of the recursion: columns per query range, and hash runs."""

    def __init__(self, head: Head) -> None:
        self.n, self.device = head.n, head.device
        self.bounds, self.columns = [0], list[Tensor]()
        self.query = torch.full((head.n,), -1, dtype=torch.int64, device=head.device)
        self.key = self.query.clone()
        self.runs = 0

    def keep(self, first: int, last: int, low: int, high: int) -> None:
        """Queries first..last-1 keep keys low..high-1."""
        j = torch.arange(self.n, device=self.device)
        self._add(first, last, (j >= low) & (j < high))

    def sample(self, first: int, last: int, drawn: Tensor) -> None:
        """Queries first..last-1 keep the keys drawn."""
        columns = torch.zeros(self.n, dtype=torch.bool, device=self.device)
        columns[drawn.to(self.device)] = True
        self._add(first, last, columns)

    def hash(self, codes: tuple[Tensor, Tensor], first: int, middle: int, last: int, block: int) -> None:
        """Queries middle..last-1 keep the keys of first..middle-1 in the same run of the sorted order."""
        count = math.ceil((middle - first) / block)
        self.query[middle:last] = _runs(codes[0][middle:last], count) + self.runs
        self.key[first:middle] = _runs(codes[1][first:middle], count) + self.runs
        self.runs += count

    def parts(self) -> list[Part]:
        """What was kept at this depth."""
        if self.bounds[-1] < self.n:
            self._add(self.n, self.n, torch.zeros(self.n, dtype=torch.bool, device=self.device))
        columns = Columns(torch.stack(self.columns), np.array(self.bounds, dtype=np.int64))
        return [columns, Buckets(self.query, self.key)] if self.runs else [columns]

    def _add(self, first: int, last: int, columns: Tensor) -> None:
        if first > self.bounds[-1]:
            self.bounds.append(first)
            self.columns.append(torch.zeros_like(columns))
        if last > first:
            self.bounds.append(last)
            self.columns.append(columns)


def gray_place(bits: Tensor) -> Tensor:
    """Place of bit patterns (N, r), most significant first, in the Gray code: neighbors differ in one bit."""
    place = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    parity = place.clone()
    for bit in bits.long().T:
        parity ^= bit
        place = place * 2 + parity
    return place


def _runs(codes: Tensor, count: int) -> Tensor:
    """Cut a stable sort by code into `count` runs of equal length (the last may be short): run of each entry."""
    size = math.ceil(len(codes) / count)
    run = torch.empty_like(codes)
    run[codes.argsort(stable=True)] = torch.arange(len(codes), device=codes.device) // size
    return run
