"""The heat map at any of the thetas asked for equals the one measured at that theta alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from anchorscope import AnchorParams, DumpError, InputError
from anchorscope.analysis import steps
from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head
from anchorscope.profiles import HeadProfile

THETAS = (4.0, -math.inf, 1.0, math.inf, 2.0, 1.0)
SCALARS = {"prompt": "p", "layer": 0, "head": 0, "kv_head": 0, "head_dim": 16, "softcap": None, "scale": 0.25}
SCALARS |= {"backend": "torch", "dump_identity": "0" * 64}


def measured(thetas, *, n=500, block=8, step=4, window=None, seed=0) -> HeadProfile:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 16, generator=g) for _ in range(3))
    q *= 2  # margins lie among the thetas
    params = AnchorParams(block, step)
    found = profile_head(q, k, v, HeadShape(n, 16, params, tuple(thetas), 0.25, window), dtype=torch.float64)
    where = {"tokens": n, "block": block, "step": step, "init": block, "lookback": block, "window": window}
    return HeadProfile(**SCALARS, **where, thetas=np.array(thetas), **vars(found))


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("theta", sorted(set(THETAS)))
def test_led_by_equals_that_theta_alone(theta, window):
    several, alone = measured(THETAS, window=window).led_by(theta), measured((theta,), window=window)
    assert several.thetas[0] == theta
    assert sorted(several.thetas) == sorted(THETAS)
    for name in ("recall", "recall_p05", "recall_min", "recall_last", "kept_pairs", "output_error", "position_recall"):
        assert getattr(several, name)[0] == pytest.approx(getattr(alone, name)[0], abs=1e-6), name
    for name in ("heat_rows", "heat_columns", "heat_mass", "heat_margin"):
        assert (getattr(several, name) == getattr(alone, name)).all(), name
    assert several.heat_stripes == pytest.approx(alone.heat_stripes, abs=2e-3)
    assert several.heat_kept == pytest.approx(alone.heat_kept, abs=2e-4)
    assert ((several.heat_stripes > 0) == (alone.heat_stripes > 0)).all()
    missed = (alone.heat_mass - alone.heat_kept).astype(float)
    assert math.isinf(theta) or missed.max() > 0.002  # something to get wrong


@pytest.mark.parametrize("most", [3000, 700, 40])
def test_cells_get_coarser_instead_of_longer(monkeypatch, most):
    alone, fine = measured((1.0,)), measured(THETAS)
    monkeypatch.setattr(steps, "MAX_STEPS", most)
    monkeypatch.setattr(steps, "LEAST_ROWS", 8)
    coarse = measured(THETAS)
    assert coarse.step_theta.size <= most < fine.step_theta.size
    drawn = coarse.led_by(1.0)
    assert drawn.heat_mass.shape == coarse.step_count.shape != fine.heat_mass.shape
    rows = np.searchsorted(alone.heat_rows, drawn.heat_rows[:-1])
    columns = np.searchsorted(alone.heat_columns, drawn.heat_columns[:-1])
    for name in ("heat_mass", "heat_kept"):  # by query and key, both keep all mass
        whole = getattr(alone, name).astype(float) * np.diff(alone.heat_rows)[:, None]
        want = np.add.reduceat(np.add.reduceat(whole, rows, axis=0), columns, axis=1)
        got = getattr(drawn, name) * np.diff(drawn.heat_rows)[:, None].astype(float)
        assert got == pytest.approx(want, abs=2e-3 * want.max()), name
    chosen = np.minimum.reduceat(np.minimum.reduceat(alone.heat_margin, rows, axis=0), columns, axis=1) <= 1.0
    assert ((drawn.heat_stripes > 0) == chosen).all()
    assert (coarse.led_by(4.0).heat_kept == coarse.heat_kept).all()  # the first stays as it was measured


def test_one_theta_has_no_steps(tmp_path):
    assert measured((1.0, 1.0)).step_theta.size == 0


def test_saved_and_read_again(tmp_path):
    profile = measured(THETAS)
    profile.save(tmp_path / "p.safetensors")
    again = HeadProfile.load(tmp_path / "p.safetensors")
    assert (again.led_by(2.0).heat_kept == profile.led_by(2.0).heat_kept).all()
    slim = HeadProfile.load(tmp_path / "p.safetensors", heat=False)
    assert slim.step_theta.size == 0
    assert slim.led_by(2.0).recall[0] == profile.recall[4]


def test_profile_of_an_earlier_version(tmp_path, monkeypatch):
    """Written without steps, as before: it is read, and drawn at its first theta alone."""
    from anchorscope import profiles

    old = measured(THETAS)
    with monkeypatch.context() as m:
        m.setattr(profiles, "ARRAYS", {k: v for k, v in profiles.ARRAYS.items() if not k.startswith("step_")})
        fields = [f for f in dataclasses.fields(HeadProfile) if not f.name.startswith("step_")]
        m.setattr(profiles.dataclasses, "fields", lambda _: fields)
        old.save(tmp_path / "old.safetensors")
    again = HeadProfile.load(tmp_path / "old.safetensors")
    assert again.step_count.size == 0
    assert again.led_by(4.0) is again
    with pytest.raises(InputError, match="saved for theta 4 alone, as calibrate and earlier versions do: run"):
        again.led_by(1.0)
    assert HeadProfile.load(tmp_path / "old.safetensors", heat=False).led_by(1.0).recall[0] == old.recall[2]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"step_count": lambda p: p.step_count + 1}, "how many steps"),
        ({"step_theta": lambda p: p.step_theta + 6}, "ranks"),
        ({"step_rows": lambda p: p.step_rows + (np.arange(len(p.step_rows)) == 1)}, "made of cells"),
    ],
)
def test_steps_that_contradict_are_refused(changed, word):
    profile = measured(THETAS)
    with pytest.raises(InputError, match=word):
        dataclasses.replace(profile, **{k: f(profile) for k, f in changed.items()})


def test_damaged_steps_are_noticed(tmp_path):
    path = tmp_path / "p.safetensors"
    measured(THETAS).save(path)
    data = bytearray(path.read_bytes())
    at = data.rfind(measured(THETAS).step_mass.tobytes())
    data[at + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DumpError, match="damaged"):
        HeadProfile.load(path)
