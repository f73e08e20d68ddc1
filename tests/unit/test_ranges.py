"""Magnitudes that float32 cannot measure: refused by name, or measured right in float64."""

from __future__ import annotations

import math

import pytest
import torch

import anchorscope
from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head
from anchorscope.compare.run import score_lineup
from anchorscope.errors import InputError
from anchorscope.heads.diagnostics import diagnose_head
from anchorscope.methods import Head, line_up
from anchorscope.params import AnchorParams
from anchorscope.ranges import SCORE_LIMIT, overflowing_head, unit_scaled, working_dtype
from tests.helpers.brute import Brute

PARAMS = AnchorParams(32, 2)
N, D = 300, 16


def tensors(q=1.0, k=1.0, v=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return tuple((torch.randn(N, D, generator=g) * size).to(dtype) for size in (q, k, v))


@pytest.mark.parametrize(
    ("q", "k", "scale"), [(1e19, 1e19, 0.25), (1.0, 1.0, 1e39), (3e37, 1e3, 1.0), (1e-10, 1e30, 1e30)]
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_that_overflow_are_refused_by_every_function(q, k, scale, softcap):
    q, k, v = tensors(q, k)
    shape = HeadShape(N, D, PARAMS, (8.0,), scale, None, softcap)
    with pytest.raises(InputError, match=r"attention scores of this head reach .* which float32 cannot compare"):
        profile_head(q, k, v, shape)
    with pytest.raises(InputError, match="attention scores of this head"):
        Head(q, k, scale=scale, softcap=softcap)


def test_large_norms_alone_are_not_refused():
    """The bound by norms is exceeded, the scores themselves are small: orthogonal Q and K."""
    q, k, _ = tensors()
    q[:, : D // 2], k[:, D // 2 :] = 0.0, 0.0
    q, k = q * 1e19, k * 1e20
    assert q.norm(dim=1).max() * k.norm(dim=1).max() > SCORE_LIMIT
    assert overflowing_head(q[None], k[None], (0,), 1.0) is None
    q[8:] = 0.0
    k[7] = 1e20  # queries 0 to 6 do not see it: still no overflow
    q[7] = 0.0
    assert overflowing_head(q[None], k[None], (0,), 1.0) is None
    q[8] = 1e19
    assert overflowing_head(q[None], k[None], (0,), 1.0)[0] == 0


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "softcap"),
    [
        (1e3, 1e4, 1.0, 0.25, None),  # scores of 1e8: a float32 step there is 8 nats
        (1e18, 1e18, 1.0, 0.25, None),
        (1e25, 1e-25, 1.0, 0.25, None),
        (1e20, 1e20, 1.0, 1e-40, None),  # the scale is denormal in float32
        (1e-30, 1e-5, 1.0, 1e35, None),
        (1.0, 1.0, 1e37, 0.25, None),  # sums and squares of values overflow float32
        (1.0, 1.0, 1e-30, 0.25, None),  # squares of values vanish
        (1.0, 1.0, 1.0, 0.25, 1e-46),  # zero in float32
        (1.0, 1.0, 1.0, 0.25, 1e60),  # infinite in float32
        (0.0, 0.0, 1.0, 0.25, None),
    ],
)
def test_extreme_heads_agree_with_float64(q, k, v, scale, softcap):
    q, k, v = tensors(q, k, v)
    thetas = (2.0, math.inf, -math.inf)
    shape = HeadShape(N, D, PARAMS, thetas, scale, None, softcap)
    got = profile_head(q, k, v, shape)
    brute = Brute(q, k, v, PARAMS, scale=scale, softcap=softcap)
    for i, theta in enumerate(thetas):
        want = brute.at(theta)
        for name in ("recall", "recall_p05", "recall_min", "recall_last", "output_error"):
            assert getattr(got, name)[i] == pytest.approx(want[name], abs=1e-6), (name, theta)
        assert got.kept_pairs[i] == want["kept_pairs"]
    head = Head(q, k, scale=scale, softcap=softcap, dtype=working_dtype(q, k, v, scale, softcap))
    points = score_lineup(head, v, line_up())
    assert all(math.isfinite(x) for _, _, s in points for x in vars(s).values())
    dense = [s for c, value, s in points if c.label == "anchor" and value == math.inf]
    assert all(s.recall == pytest.approx(1, abs=1e-6) and s.output_error < 1e-6 for s in dense)
    found = diagnose_head(Head(q, k, scale=scale, softcap=softcap))
    assert found.sink_1 == pytest.approx(float(brute.p[:, 0].mean()), abs=1e-6)


def test_ordinary_heads_stay_in_float32():
    assert working_dtype(*tensors(), 0.25) == torch.float32
    assert working_dtype(*tensors(dtype=torch.bfloat16), 0.25, 50.0) == torch.float32
    assert working_dtype(*tensors(1e3, 1e4), 0.25) == torch.float64
    v = tensors()[2]
    assert unit_scaled(v) is v
    assert unit_scaled(v * 1e37).abs().max() <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_are_refused(bad, which):
    made = list(tensors())
    made[which][7, 3] = bad
    with pytest.raises(InputError, match="holds NaN or infinity"):
        profile_head(*made, HeadShape(N, D, PARAMS, (8.0,), 0.25))
    if which < 2:
        with pytest.raises(InputError, match="holds NaN or infinity"):
            Head(*made[:2], scale=0.25)
    else:
        with pytest.raises(InputError, match="holds NaN or infinity"):
            score_lineup(Head(*made[:2], scale=0.25), made[2], line_up(("streaming",)))


@pytest.mark.parametrize(
    ("scale", "softcap"), [(0.0, None), (-1.0, None), (math.nan, None), (1.0, 0.0), (1.0, math.nan)]
)
def test_scales_that_make_no_sense_are_refused(scale, softcap):
    q, k, v = tensors()
    with pytest.raises(InputError, match="must be a positive finite number"):
        profile_head(q, k, v, HeadShape(N, D, PARAMS, (8.0,), scale, None, softcap))


def written(path, kind):
    """A dump of prompt a, layer 3 with two heads; the kind says what is beyond float32."""
    q, k, v = (x[None] for x in tensors())
    q = torch.cat([q, q])
    entry = {"prompt": "a", "layer": 3, "q": q, "k": k, "v": v, "scale": 0.25}
    if kind == "tensors":  # query head 1 alone
        entry |= {"q": torch.stack([q[0], q[1] * 1e19]), "k": k * 1e19}
    elif kind == "scale":
        entry |= {"scale": 1e39}
    else:
        entry |= {"v": v * 3e37}
    anchorscope.write_dump(path, [entry])
    return str(path)


@pytest.mark.parametrize(("kind", "head"), [("tensors", 1), ("scale", 0)])
def test_every_command_refuses_with_the_same_sentence(tmp_path, capsys, kind, head):
    from anchorscope.cli import main

    dump = written(tmp_path / "dump", kind)
    commands = {
        "analyze": ["--block", "32", "--step", "2"],
        "heads": [],
        "compare": ["--methods", "streaming"],
        "calibrate": ["--holdout", "0", "--groups", "32x2"],
        "bench": ["--device", "cpu"],
    }
    seen = set()
    for name, options in commands.items():
        code = main([name, dump, "--out", str(tmp_path / name), *options])
        err = " ".join(capsys.readouterr().err.split())
        assert code == 2, (name, err)
        assert f"scores of prompt a, layer 3, query head {head} reach" in err, (name, err)
        seen.add(err[err.index("error: ") :])
    assert len(seen) == 1
    assert main(["info", dump]) == 2
    assert f"layer 3, query head {head}" in " ".join(capsys.readouterr().err.split())


def test_bench_refuses_what_its_kernels_cannot_sum(tmp_path, capsys):
    from anchorscope.cli import main

    assert main(["bench", written(tmp_path / "dump", "values"), "--device", "cpu", "--out", str(tmp_path / "b")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "a, layer 3: v reaches" in err
    assert "leave the layer out" in err
