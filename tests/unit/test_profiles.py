"""Saved profiles: exact round trip, bounded size, and no damage that goes unnoticed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from synthetic import make_profile

from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import write_atomic
from anchorscope.profiles import MAX_COLUMNS, MAX_ROWS, HeadProfile, bin_edges, profile_filename

ARRAYS = [f.name for f in dataclasses.fields(HeadProfile) if f.type == "np.ndarray"]


def small(**changes: object) -> HeadProfile:
    """Curve by hand: 100 pairs, of which 20 anchor pairs."""
    curve = {
        "visible_pairs": 100,
        "anchor_pairs": 20,
        "candidate_pairs": 80,
        "curve_theta": np.array([-math.inf, 2.0, 5.0, math.inf]),
        "curve_recall": np.array([0.5, 0.8, 0.9, 1.0]),
        "curve_pairs": np.array([20, 30, 60, 100]),
        "oracle_pairs": np.array([20, 40, 100]),
        "oracle_recall": np.array([0.5, 0.9, 1.0]),
        "kept_pairs": np.array([60, 30, 100]),
        "stripe_pairs": np.array([40, 10, 80]),
    }
    return dataclasses.replace(make_profile(tokens=64, block=8, step=2), **{**curve, **changes})


@pytest.mark.parametrize(
    ("tokens", "block", "step", "window", "values"),
    [
        (1, 128, 16, None, True),
        (300, 16, 2, None, False),
        (1000, 16, 2, 200, True),
        (40_000, 128, 2, None, True),
    ],
)
def test_round_trip_is_exact_and_small(
    tmp_path: Path, tokens: int, block: int, step: int, window: int | None, values: bool
) -> None:
    thetas = (math.inf, 3.0, -math.inf)
    saved = make_profile(
        tokens=tokens,
        block=block,
        step=step,
        window=window,
        values=values,
        thetas=thetas,
        prompt='a "name"\né',
    )
    path = tmp_path / profile_filename(0, 5, 3)
    saved.save(path)
    again = tmp_path / "again.safetensors"
    saved.save(again)
    loaded = HeadProfile.load(path)
    for field in dataclasses.fields(HeadProfile):
        a, b = getattr(saved, field.name), getattr(loaded, field.name)
        if field.name in ARRAYS:
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name
    assert path.read_bytes() == again.read_bytes()
    assert path.stat().st_size < 2_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, again.name])


def test_largest_heat_map_stays_under_two_megabytes(tmp_path: Path) -> None:
    p = make_profile(tokens=32 * MAX_COLUMNS, block=128, step=2)
    shape = p.heat_mass.shape
    assert shape == (MAX_ROWS, MAX_COLUMNS)
    p.save(tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 2_000_000


def test_light_load_reads_all_but_the_heat_map(tmp_path: Path) -> None:
    p = make_profile(tokens=500, block=16, step=2)
    p.save(tmp_path / "p")
    light, bare = HeadProfile.load(tmp_path / "p", heat=False), p.without_heat()
    assert light.heat_mass.shape == bare.heat_mass.shape == (0, 0)
    for name in ARRAYS:
        assert getattr(light, name).tobytes() == getattr(bare, name).tobytes(), name


def test_densities_follow_from_the_pairs() -> None:
    p = small()
    assert p.density.tolist() == [0.6, 0.3, 1.0]
    assert p.sparsity.tolist() == [0.4, 0.7, 0.0]
    assert p.stripe_density.tolist() == [0.5, 0.125, 1.0]
    assert np.isnan(make_profile(tokens=50, block=128, step=16).stripe_density).all()


@pytest.mark.parametrize(
    ("target", "anchor", "oracle", "theta"),
    [
        (0.4, 0.2, 0.2, -math.inf),
        (0.5, 0.2, 0.2, -math.inf),
        (0.65, 0.3, 0.4, 2.0),
        (0.8, 0.3, 0.4, 2.0),
        (0.85, 0.6, 0.4, 5.0),
        (0.95, 1.0, 1.0, math.inf),
        (1.0, 1.0, 1.0, math.inf),
        (1.0001, None, None, None),
    ],
)
def test_needed_by_hand(target: float, anchor: float | None, oracle: float | None, theta: float | None) -> None:
    p = small()
    assert p.theta_at_recall(target) == theta
    for kind, want in (("anchor", anchor), ("oracle", oracle)):
        got = p.density_at_recall(target, kind)
        assert got == want if want is None else got == pytest.approx(want, abs=1e-12)


def test_flat_curve_gives_the_first_density() -> None:
    p = small(curve_recall=np.array([0.5, 0.9, 0.9, 1.0]))
    assert p.density_at_recall(0.9) == pytest.approx(0.3)
    assert p.theta_at_recall(0.9) == 2.0


def test_unknown_curve_is_refused() -> None:
    with pytest.raises(InputError, match="'anchor' or 'oracle', not 'block'"):
        small().curve("block")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be a whole number of at least 1"),
        ({"layer": -1}, "layer must be"),
        ({"layer": True}, "layer must be"),
        ({"window": 0}, "window must be"),
        ({"scale": math.nan}, "scale must be"),
        ({"prompt": 3}, "prompt must be"),
        ({"candidate_pairs": 81}, "add up"),
        ({"thetas": np.array([1.0, math.nan, 2.0])}, "thetas holds NaN"),
        ({"recall": np.array([0.5, 0.9, 1.1])}, "recall must lie between 0 and 1"),
        ({"recall": np.array([0.5, 0.9])}, "contradicts"),
        ({"recall": np.array([[0.5, 0.9, 1.0]])}, "must have 1 dimension"),
        ({"curve_theta": np.array([-math.inf, 5.0, 2.0, math.inf])}, "ascending"),
        ({"curve_theta": np.array([0.0, 2.0, 5.0, math.inf])}, "start at -inf"),
        ({"curve_pairs": np.array([21, 30, 60, 100])}, "anchor pairs to the visible pairs"),
        ({"kept_pairs": np.array([61, 30, 100])}, "anchor pairs plus the stripe pairs"),
        ({"oracle_recall": np.array([0.5, math.inf, 1.0])}, "infinity"),
        ({"heat_rows": np.array([0, 16, 32, 48, 63])}, "cover the whole prompt"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**change)


def rewrite(path: Path, *, drop: str = "", header: dict[str, object] | None = None, **tensors: np.ndarray) -> None:
    """Change a saved profile without its knowing."""
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        facts = json.loads(file.metadata()["profile"])
    facts.update(header or {})
    path.write_bytes(safetensors.numpy.save({**arrays, **tensors}, {"profile": json.dumps(facts)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"version": 2}}, "format version 2"),
        ({"header": {"format": "other"}}, "not a profile"),
        ({"header": {"layer": 7}}, "checksum"),
        ({"header": {"extra": 7}}, "damaged header"),
        ({"header": {"sha256": "x"}}, "damaged header"),
        ({"drop": "curve_recall"}, "lacks the tensor 'curve_recall'"),
        ({"recall": np.array([0.1, 0.2, 0.3])}, "checksum"),
        ({"recall": np.array([0.1, 0.2, 0.3], dtype=np.float32)}, "checksum|stores"),
        ({"heat_mass": np.zeros((4, 64), dtype=np.float16)}, "checksum"),
    ],
)
def test_edited_files_are_refused_in_one_sentence(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "p.safetensors"
    small().save(path)
    HeadProfile.load(path)
    rewrite(path, **change)
    with pytest.raises(DumpError, match=message) as caught:
        HeadProfile.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_flipped_bit_or_cut_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    small().save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, len(good), 200).tolist()]
    unnoticed = 0
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            loaded = HeadProfile.load(path)
        except DumpError:
            continue
        loaded.save(path)  # only a change without meaning (a blank of the header) may pass
        assert path.read_bytes() == good
        unnoticed += 1
    assert unnoticed < 10
    for size in (0, 1, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DumpError):
            HeadProfile.load(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="no profile at"):
        HeadProfile.load(tmp_path / "none")
    with pytest.raises(DumpError, match="no profile at"):
        HeadProfile.load(tmp_path)
    with pytest.raises(RunFailure, match="cannot write"):
        small().save(tmp_path / "none" / "p")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailure, match="No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("length", "limit", "multiple", "edges"),
    [
        (10, 5, 1, [0, 2, 4, 6, 8, 10]),
        (10, 4, 1, [0, 3, 6, 9, 10]),
        (10, 2, 4, [0, 8, 10]),
        (3, 8, 1, [0, 1, 2, 3]),
        (3, 8, 64, [0, 3]),
    ],
)
def test_bin_edges_by_hand(length: int, limit: int, multiple: int, edges: list[int]) -> None:
    assert bin_edges(length, limit, multiple).tolist() == edges


def test_profiles_need_no_torch() -> None:
    code = "import sys, anchorscope.profiles; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
