"""A whole layer through the kernels: every head as if it were measured alone, bit by bit."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from brute import THETAS, Brute, compare, make

from anchorscope import analyze, iter_profiles, write_dump
from anchorscope.analysis.accumulate import Accumulator, HeadShape, _percentile
from anchorscope.params import AnchorParams
from anchorscope.runs import batches as module

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMS = AnchorParams(16, 1)
N = 200 if torch.cuda.is_available() else 50  # with a ragged last group


def layer(heads: int, kv_heads: int, n: int = N, d: int = 16, dtype: torch.dtype = torch.float32):
    """q (H, N, d), k and v (Hkv, N, d), each head different."""
    made = [make(n, d, seed) for seed in range(heads)]
    q = torch.stack([x[0] for x in made]).to(DEVICE, dtype)
    k, v = (torch.stack([x[i] for x in made[:kv_heads]]).to(DEVICE, dtype) for i in (1, 2))
    return q, k, v


def same_bytes(a, b):
    """Every number of two results, bit by bit."""
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert np.asarray(value).tobytes() == np.asarray(other).tobytes(), name


@pytest.mark.parametrize(
    ("kv_heads", "repeats", "how"),
    [
        (1, 3, {}),
        (2, 2, {"window": 20, "softcap": 2.0}),
        pytest.param(2, 1, {"window": 20}, marks=pytest.mark.slow),
        pytest.param(2, 3, {}, marks=pytest.mark.slow),
        pytest.param(2, 4, {"softcap": 2.0}, marks=pytest.mark.slow),
        pytest.param(2, 8, {"window": 40, "softcap": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_a_head_does_not_depend_on_its_neighbors(kv_heads, repeats, how, monkeypatch):
    from anchorscope.analysis.triton_engine import profile_head_triton, profile_layer

    q, k, v = layer(kv_heads * repeats, kv_heads)
    kv_rows = [row // repeats for row in range(kv_heads * repeats)]
    shape = HeadShape(N, 16, PARAMS, THETAS, 0.25, **how)
    together = profile_layer(q, k, v, kv_rows, shape)
    brute = Brute(q[-1].cpu(), k[-1].cpu(), v[-1].cpu(), PARAMS, scale=0.25, **how)
    compare(together[-1], brute, THETAS)
    same_bytes(together[-1], profile_head_triton(q[-1], k[-1], v[-1], shape))
    monkeypatch.setattr(module, "BATCH", 3 * shape.geometry.groups * N)  # three heads at a time
    for one, other in zip(together, profile_layer(q, k, v, kv_rows, shape), strict=True):
        same_bytes(one, other)


def test_heads_chosen_unevenly():
    from anchorscope.analysis.triton_engine import profile_head_triton, profile_layer

    q, k, v = layer(3, 3)
    shape = HeadShape(N, 16, PARAMS, THETAS, 0.25)
    for one, row, kv in zip(profile_layer(q, k, v, [0, 0, 2], shape), q, (0, 0, 2), strict=True):
        same_bytes(one, profile_head_triton(row, k[kv], v[kv], shape))


def test_a_head_that_needs_float64_leaves_the_others_alone():
    from anchorscope.analysis.triton_engine import profile_layer

    q, k, v = layer(3, 2)
    shape = HeadShape(N, 16, PARAMS, (3.0, math.inf), 0.25)
    plain = profile_layer(q, k, v, [0, 0, 1], shape)
    q = q.clone()
    q[1] *= 1e6
    found = profile_layer(q, k, v, [0, 0, 1], shape)
    compare(found[1], Brute(q[1].cpu(), k[0].cpu(), v[0].cpu(), PARAMS, scale=0.25), (3.0, math.inf))
    for row in (0, 2):
        same_bytes(found[row], plain[row])


def test_all_scores_equal_and_one_token():
    from anchorscope.analysis.triton_engine import profile_layer

    q, k, v = layer(2, 1)
    shape = HeadShape(N, 16, PARAMS, (0.0, -1.0, math.inf), 0.25)
    for one in profile_layer(torch.zeros_like(q), k, v, [0, 0], shape):
        assert one.kept_pairs.tolist() == [one.visible_pairs, one.anchor_pairs, one.visible_pairs]
        assert one.recall[0] == 1.0
    (single,) = profile_layer(q[:1, :1], k[:, :1], v[:, :1], [0], HeadShape(1, 16, PARAMS, (0.0,), 0.25))
    assert single.recall.tolist() == [1.0]
    assert single.candidate_pairs == 0


def test_an_interrupted_layer_ends_with_the_same_bytes(tmp_path):
    """A profile that is missing is measured without its neighbors."""
    q, k, v = (x.cpu() for x in layer(4, 2, dtype=torch.float16))
    write_dump(tmp_path / "dump", [{"prompt": "p", "layer": 3, "q": q, "k": k, "v": v, "scale": 0.25}])
    asked = {"thetas": (3.0, 0.5), "params": PARAMS, "figures": False, "backend": "triton", "device": DEVICE}
    analyze(tmp_path / "dump", tmp_path / "whole", **asked)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    gone = [tmp_path / "again" / "profile" / f"p000-layer003-head{head:03d}.safetensors" for head in (1, 2)]
    for file in gone:
        file.unlink()
    analyze(tmp_path / "dump", tmp_path / "again", resume=True, **asked)
    for file in sorted((tmp_path / "whole" / "profile").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / "profile" / file.name).read_bytes()
    plain = {**asked, "backend": "torch"}
    analyze(tmp_path / "dump", tmp_path / "torch", **plain)
    for a, b in zip(iter_profiles(tmp_path / "whole"), iter_profiles(tmp_path / "torch"), strict=True):
        assert a.kept_pairs.tolist() == b.kept_pairs.tolist()
        assert a.recall == pytest.approx(b.recall, abs=2e-5)
        assert (a.head, a.kv_head) == (b.head, b.kv_head)


@pytest.mark.parametrize("slices", [1, 200, 10**9])
@pytest.mark.parametrize(("n", "window"), [(97, None), (131, 50), (64, 1), (5, None)])
def test_sums_do_not_depend_on_how_groups_come_in(slices, n, window, monkeypatch):
    """One by one, a few or all at once; against margins and masses of the brute force."""
    monkeypatch.setattr("anchorscope.analysis.accumulate._SLICE", slices)
    made = [make(n, 16, seed) for seed in range(3)]
    brutes = [Brute(*x, PARAMS, scale=0.25, window=window) for x in made]
    shape = HeadShape(n, 16, PARAMS, THETAS, 0.25, window)
    mass = torch.stack([b.columns()[0] for b in brutes])
    margin = torch.stack([b.margin[0, 0] for b in brutes])
    rows = torch.stack([torch.stack([(b.p * b.keep(t)).sum(1) for t in shape.sorted_thetas]) for b in brutes])

    def summed(heads: slice, steps: int):
        sums = Accumulator(shape, False, torch.device("cpu"), len(mass[heads]))
        for first in range(0, mass.shape[1], steps):
            sums.add_groups(first, mass[heads, first : first + steps], margin[heads, first : first + steps])
        sums.add_rows(0, rows[heads])
        return sums.results()

    together = summed(slice(None), 10**6)
    for head, one in enumerate(together):
        same_bytes(one, summed(slice(head, head + 1), 1)[0])
        for t, theta in enumerate(THETAS):
            want = brutes[head].at(theta)
            assert one.kept_pairs[t] == want["kept_pairs"]
            for name in ("recall", "recall_p05", "recall_min", "recall_last"):
                assert getattr(one, name)[t] == pytest.approx(want[name], abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 21, 100, 101])
def test_percentile_is_numpys(n):
    rows = torch.rand(4, n, generator=torch.Generator().manual_seed(n))
    want = np.percentile(rows.numpy().astype(np.float64), 5, axis=1)
    assert _percentile(rows, 5) == pytest.approx(want, abs=1e-15)
