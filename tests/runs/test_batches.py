"""Which heads of a layer are measured together."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorscope.runs.batches import BATCH, batches, heads_at_once, on_device

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@settings(deadline=None)
@given(COUNTS, st.integers(-1, 12))
def test_every_head_once_and_beside_its_own_keys(counts, each):
    """Whatever heads were chosen of each kv head: in order, `each` at most, the same number for each kv head."""
    kv_rows = [kv for kv, count in enumerate(counts) for _ in range(count)]
    found = list(batches(kv_rows, each))
    assert list(chain.from_iterable(batch.rows for batch in found)) == list(range(len(kv_rows)))
    for batch in found:
        repeats, rest = divmod(len(batch.rows), len(batch.kv_rows))
        assert rest == 0
        assert 1 <= len(batch.rows) <= max(1, each)
        assert [kv_rows[row] for row in batch.rows] == [kv for kv in batch.kv_rows for _ in range(repeats)]


def test_a_whole_layer_is_few_batches():
    assert len(list(batches([row // 4 for row in range(32)], 8))) == 4
    assert len(list(batches([row // 4 for row in range(32)], 7))) == 8
    assert len(list(batches([row // 4 for row in range(32)], 3))) == 16


def test_tensors_of_a_batch():
    q, k = torch.arange(6.0)[:, None, None], torch.arange(10.0, 13)[:, None, None]
    (first, second) = batches([0, 2, 2], 2)
    assert [x is None or x.flatten().tolist() for x in first.of(q, k, None, torch.device("cpu"))] == [[0], [10], True]
    assert [x.flatten().tolist() for x in second.of(q, k, k, torch.device("cpu"))] == [[1, 2], [12], [12]]
    (apart,) = batches([0, 2], 2)
    assert apart.of(q, k, None, torch.device("cpu"))[1].flatten().tolist() == [10, 12]


def test_memory_bounds_their_number():
    assert heads_at_once(64, 131072) == 8
    assert heads_at_once(10**6, 10**6) == 1
    assert heads_at_once(1, BATCH) == 1


def test_batches_come_in_order_on_the_device():
    """On a GPU the next is copied meanwhile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k = torch.randn(7, 50, 4), torch.randn(3, 50, 4)
    kv_rows = [0, 0, 1, 1, 1, 2, 2]
    seen = list(on_device(batches(kv_rows, 2), q, k, k, device))
    assert [row for batch, *_ in seen for row in batch.rows] == list(range(7))
    for batch, mine, keys, values in seen:
        assert mine.device.type == device.type
        assert torch.equal(mine.cpu(), q[list(batch.rows)])
        assert torch.equal(keys.cpu(), k[list(batch.kv_rows)])
        assert torch.equal(values, keys)
    assert list(on_device(iter(()), q, k, k, device)) == []
