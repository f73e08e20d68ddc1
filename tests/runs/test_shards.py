"""Which units a shard measures."""

from __future__ import annotations

import pytest
from toy_command import Number, SquaresCommand, squares

from anchorscope import RunOptions, Shard
from anchorscope.errors import DumpError, InputError
from anchorscope.runs.shards import shard_of


@pytest.mark.parametrize(
    "works", [[1] * 10, [1, 1, 1, 9, 1, 1], [9, 1, 1, 1], [1, 1, 1, 9], [0, 0, 0], [5, 3, 1, 7, 2, 2]]
)
def test_shards_are_all_units_once_in_order_with_about_the_same_work(works):
    units = [Number(i, work) for i, work in enumerate(works)]
    for of in range(1, len(units) + 1):
        shares = [Shard(i, of).pick(units) for i in range(1, of + 1)]
        assert [unit for share in shares for unit in share] == units
        assert all(shares)
        loads = [sum(unit.work for unit in share) for share in shares]
        assert max(loads) <= sum(works) / of + max(works)
    with pytest.raises(InputError, match=rf"--shard 1/{len(units) + 1}: there are only {len(units)} units of work"):
        Shard(1, len(units) + 1).pick(units)


def test_equal_units_are_shared_out_evenly():
    units = [Number(i) for i in range(64)]
    assert {len(Shard(i, 8).pick(units)) for i in range(1, 9)} == {8}


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3", "-1/2", "1.5/2", "\u0661/2", "1 of 2"])
def test_malformed_shards_are_refused(text):
    with pytest.raises(InputError, match="is malformed: write the number of the shard"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["0/2", "3/2", "0/0", "1/1000000"])
def test_shards_that_make_no_sense_are_refused(text):
    with pytest.raises(InputError, match=f"--shard {text} makes no sense: shards are numbered from 1"):
        Shard.parse(text)


def test_a_state_of_anybody_names_a_shard_or_none():
    assert Shard.parse(" 2/4 ") == Shard(2, 4) == shard_of({"shard": {"index": 2, "of": 4}})
    for found in (None, 3, {}, {"index": 2}, {"index": True, "of": 4}, {"index": 5, "of": 4}, {"index": "2", "of": 4}):
        assert shard_of({"shard": found}) is None


def test_a_command_that_cannot_be_done_in_shards_says_so(tmp_path):
    with pytest.raises(InputError, match="`squares` cannot be done in shards"):
        squares((1, 2, 3), tmp_path / "o", shard=Shard(1, 2))
    assert not (tmp_path / "o").exists()


def test_a_shard_looks_like_nothing_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(SquaresCommand, "known", {})
    seen = []
    squares((1, 2, 3), tmp_path, shard=Shard(2, 2), progress=seen.append)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["square-2.json", "square-3.json"]
    assert not (tmp_path / "squares.json").exists()
    assert (seen[-1].work, seen[-1].total) == (2, 2)
    with pytest.raises(DumpError, match=r"holds shard 2 of 2 of a list of squares: put all of them together"):
        SquaresCommand.folder.check_finished(tmp_path)
    squares((1, 2, 3), tmp_path, shard=Shard(2, 2))  # again: nothing is left to do
    for other in (Shard(1, 2), Shard(2, 3), None):
        with pytest.raises(InputError, match="holds shard 2 of 2 of a list of squares; give every shard"):
            squares((1, 2, 3), tmp_path, shard=other)
    with pytest.raises(InputError, match="other settings"):
        squares((1, 2, 3, 4), tmp_path, shard=Shard(2, 2))
    assert RunOptions().shard is None
