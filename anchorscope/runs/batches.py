"""Heads of a layer that are measured together on a GPU: which, and their tensors there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

BATCH = 1 << 26  # (head, group, key) triples that are measured together; a single head may have more


class Batch(NamedTuple):
    """Some query heads, the same number for each kv head.

    Attributes:
        rows: rows of Q, ascending.
        kv_rows: rows of K and V; each is read by len(rows) / len(kv_rows) consecutive ones of `rows`.
    """

    rows: tuple[int, ...]
    kv_rows: tuple[int, ...]

    def of(self, q: Tensor, k: Tensor, v: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q (H, N, d) and K, V (Hkv, N, d) of the batch, on the device, from those of the layer."""
        values = None if v is None else _rows(v, self.kv_rows, device)
        return _rows(q, self.rows, device), _rows(k, self.kv_rows, device), values


def batches(kv_rows: Sequence[int], each: int) -> Iterator[Batch]:
    """Query heads, a batch after the other: whole kv heads with as many query heads, or a part of one kv head's.

    Args:
        kv_rows: (H,) which row of K each query head reads, ascending.
        each: heads of a batch, at most; a batch has at least one.
    """
    each = max(1, each)
    owners = [(kv, [row for row, _ in pairs]) for kv, pairs in groupby(enumerate(kv_rows), key=lambda pair: pair[1])]
    at = 0
    while at < len(owners):
        kv, rows = owners[at]
        stop = at + 1
        if len(rows) > each:
            yield from (Batch(tuple(rows[i : i + each]), (kv,)) for i in range(0, len(rows), each))
        else:
            while stop < len(owners) and len(owners[stop][1]) == len(rows) and (stop + 1 - at) * len(rows) <= each:
                stop += 1
            some = owners[at:stop]
            yield Batch(tuple(row for _, mine in some for row in mine), tuple(owner for owner, _ in some))
        at = stop


def on_device(
    found: Iterator[Batch], q: Tensor, k: Tensor, v: Tensor | None, device: torch.device
) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor | None]]:
    """Batches with their tensors on the device; the next ones are brought there while a batch is worked on."""
    if q.device.type == device.type or device.type != "cuda":
        yield from ((batch, *batch.of(q, k, v, device)) for batch in found)
        return
    beside = torch.cuda.Stream(device)  # a copy on the stream of the kernels would wait for them

    def bring(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.cuda.stream(beside):
            tensors = batch.of(q, k, v, device)
        beside.synchronize()
        return tensors

    under_way: deque[tuple[Batch, Future[tuple[Tensor, Tensor, Tensor | None]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch in chain(found, [None]):
            if batch is not None:
                under_way.append((batch, pool.submit(bring, batch)))
            if len(under_way) > 1 or (batch is None and under_way):
                ready, coming = under_way.popleft()
                tensors = coming.result()
                for x in tensors:
                    if x is not None:  # its memory is free only after the kernels that read it
                        x.record_stream(torch.cuda.current_stream(device))
                yield (ready, *tensors)


def heads_at_once(groups: int, tokens: int) -> int:
    """How many heads of so many groups and keys are measured together."""
    return max(1, BATCH // (groups * tokens))


def _rows(x: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    first, last = rows[0], rows[-1] + 1
    return (x[first:last] if last - first == len(rows) else x[list(rows)]).to(device)
