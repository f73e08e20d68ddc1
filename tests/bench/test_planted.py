"""The planted workload: the same numbers for the same arguments, and the known answer."""

from __future__ import annotations

import pytest
import torch

from anchorscope.errors import InputError
from anchorscope.kernels import torch_backend
from anchorscope.planted import Plant, planted, planted_truth

FROZEN = [-0.51171875, -0.56640625, -3.5, -0.83984375, 0.484375]
SMALL = {"heads": 4, "kv_heads": 2, "dim": 64, "device": "cpu"}


def test_frozen_numbers() -> None:
    """Drawn by the generator of the published timings: other draws would be another workload."""
    q, k, v = planted(3000, seed=3, group=700, strength=9.0, **SMALL)
    plant = Plant(3000, 4, 2, 64, 3, 700, strength=9.0)
    for x, same in zip((q, k, v), planted(plant, device="cpu"), strict=True):
        assert torch.equal(x, same)
    assert (q.dtype, q.shape, k.shape, v.shape) == (
        torch.bfloat16,
        (1, 4, 3000, 64),
        (1, 2, 3000, 64),
        (1, 2, 3000, 64),
    )
    got = torch.stack([q[0, 3, 2999, 5], q[0, 0, 0, 0], k[0, 1, 2, 7], k[0, 0, 1500, 63], v[0, 1, 77, 9]]).float()
    torch.testing.assert_close(got, torch.tensor(FROZEN), rtol=2**-7, atol=0)


def test_columns_drawn_twice_do_not_race() -> None:
    first = planted(5000, **SMALL)
    for _ in range(5):
        again = planted(5000, **SMALL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_truth_describes_the_input() -> None:
    args = {**SMALL, "group": 300, "strength": 400.0}  # loud enough to read the plant off the input
    q, k, _ = planted(1000, dtype=torch.float32, **args)
    truth = planted_truth(1000, **args)
    assert truth.directions.shape == (4, 4)
    score = q[0, :, ::300] @ k[0].repeat_interleave(2, 0).mT / 8
    for h in range(4):
        for period in range(4):
            found = (score[h, period] > 200).nonzero()[:, 0].tolist()
            assert found == sorted({*truth.stripes(h, period).tolist(), 0, 1, 2, 3})


@pytest.mark.parametrize("period", [512, 384])
def test_identification_finds_what_was_planted(period: int) -> None:
    n = 4 * period
    args = {"heads": 2, "kv_heads": 1, "fraction": 0.02, "dim": 128, "device": "cpu", "group": period}
    q, k, v = planted(n, dtype=torch.float32, **args)
    truth = planted_truth(n, **args)
    place = {"block": 64, "step": period // 64}
    stripes = torch_backend.identify(torch_backend.anchor(q, k, v, **place), k, theta=6.0, queries=n, **place)
    for h in range(2):
        for g in range(1, 4):
            row = h * 4 + g
            got = set(stripes.columns[int(stripes.offsets[row]) : int(stripes.offsets[row + 1])].tolist())
            columns = truth.stripes(h, g)
            columns = columns[(columns >= 64) & (columns < g * period - 64)]
            strength = truth.strength[0, int(truth.directions[h, g])]
            strong = set(columns[strength[columns] > 0.8].tolist())
            assert strong
            assert strong <= got <= set(columns.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "cannot share 2 kv heads evenly"),
        ({"dim": 16}, "above its 16 directions"),
        ({"group": 0}, "period of at least 1"),
        ({"n": 0}, "length of at least 1"),
        ({"fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_arguments(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planted(**{"n": 100, **SMALL, **change})  # type: ignore[arg-type]
