"""How units are dealt out: stretches of neighbors, nothing twice, nothing left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from toy_command import Number

from anchorscope.runs.spread import Spread, batches
from anchorscope.runs.units import HeadUnit


def heads(layers: int, each: int, kv: int = 1) -> list[HeadUnit]:
    entries = [SimpleNamespace(layer=i, query_heads=range(each), kv_heads=range(kv)) for i in range(layers)]
    return [HeadUnit(0, entry, h) for entry in entries for h in range(each)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "workers", "sizes"),
    [
        (4, 2, [32] * 4),
        (5, 2, [32] * 4 + [16, 16]),
        (1, 3, [12, 12, 8]),  # whole kv heads of four query heads
        (2, 16, [4] * 16),
        (3, 1, [32] * 3),
    ],
)
def test_a_batch_is_a_layer_and_layers_left_over_are_cut(layers, workers, sizes):
    units = heads(layers, 32, kv=8)
    found = batches(units, workers)
    assert [unit for batch in found for unit in batch] == units
    assert all(len({unit.entry.layer for unit in batch}) == 1 for batch in found)
    assert [len(batch) for batch in found] == sizes
    assert batches([Number(1), Number(2)], 2) == [(Number(1),), (Number(2),)]
    assert batches([], 2) == []


def test_everybody_keeps_to_a_stretch_and_nothing_is_done_twice():
    spread, got = Spread(8), {"a": [], "b": []}
    for turn in range(8):
        name = "ab"[turn % 2]
        got[name].append(spread.take(name))
    assert got == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}
    assert not spread


def test_whoever_is_faster_helps_the_other():
    spread = Spread(8)
    assert (spread.take("slow"), spread.take("fast")) == (0, 4)
    fast = [spread.take("fast") for _ in range(6)]
    assert fast[:3] == [5, 6, 7]
    assert sorted(fast) == [1, 2, 3, 5, 6, 7]
    assert not spread


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_what_a_lost_worker_had_goes_to_the_others(workers):
    spread = Spread(9)
    first = [spread.take(i) for i in range(workers)]
    assert len(set(first)) == workers
    spread.put_back([first[0]], 0)
    rest = []
    while spread:
        rest.append(spread.take(1))
    assert sorted([*first[1:], *rest]) == list(range(9))
