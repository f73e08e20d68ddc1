"""Diagnostics through the kernels against plain torch; each head as if it were alone."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from brute import make

from anchorscope import analyze, write_dump
from anchorscope.dumps import LayerTensors
from anchorscope.heads import diagnose, diagnose_head, head_stripes
from anchorscope.heads import run as run_module
from anchorscope.heads.layer import Rule, diagnose_layer, suits
from anchorscope.methods import Head
from anchorscope.params import AnchorParams
from anchorscope.runs import batches as module

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARAMS = AnchorParams(32, 1)


def layer(heads: int, kv_heads: int, n: int, d: int = 16):
    made = [make(n, d, seed, strength=5.0) for seed in range(heads)]
    q, k = torch.stack([x[0] for x in made]), torch.stack([x[1] for x in made[:kv_heads]])
    return q.to(DEVICE), k.to(DEVICE)


def rule(scale, window, softcap, theta=2.0):
    return Rule(scale, window, softcap, PARAMS, theta)


def found(q, k, kv_rows, rule, wanted=None):
    def alone(q, k, diagnosed):
        head = Head(q, k, **rule.scores)
        return diagnose_head(head) if diagnosed else None, head_stripes(head, PARAMS, rule.theta)

    wanted = range(len(q)) if wanted is None else wanted
    layer = LayerTensors(q, k, None, tuple(range(len(q))), tuple(range(len(k))), tuple(kv_rows))
    return list(diagnose_layer(layer, rule, wanted=wanted, device=DEVICE, alone=alone))


def same(a, b):
    """Within float32 rounding."""
    for name, value in vars(a).items():
        other = getattr(b, name)
        if name in ("hidden_sinks", "influential", "kind"):
            assert value == other, name
        elif isinstance(value, np.ndarray):
            assert value == pytest.approx(other, abs=2e-4), name
        else:
            assert value == pytest.approx(other, rel=2e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("heads", "n", "window", "softcap"),
    [
        (1, 1, None, None),
        (2, 65, 40, None),
        (1, 129, None, 3.0),
        (1, 200, 140, None),  # a window of more than two blocks of 64
        pytest.param(2, 321, None, 3.0, marks=pytest.mark.slow),
        pytest.param(2, 450, 300, None, marks=pytest.mark.slow),
    ],
)
def test_equals_plain_torch(heads, n, window, softcap):
    q, k = layer(heads, 1, n)
    asked = rule(0.4, window, softcap)
    for row, got, stripes in found(q, k, [0] * heads, asked):
        head = Head(q[row], k[0], **asked.scores)
        same(got, diagnose_head(head))
        want = head_stripes(head, PARAMS, 2.0)
        assert (stripes.bits == want.bits).all()
        assert (stripes.start == want.start).all()
        assert (stripes.stop == want.stop).all()


@pytest.mark.parametrize(("kv_heads", "repeats"), [(2, 1), (1, 3), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_head_does_not_depend_on_its_neighbors(kv_heads, repeats, monkeypatch):
    q, k = layer(kv_heads * repeats, kv_heads, 66)
    rows = [row // repeats for row in range(kv_heads * repeats)]
    together = found(q, k, rows, rule(0.4, None, None))
    monkeypatch.setattr(module, "BATCH", 1)
    apart = found(q, k, rows, rule(0.4, None, None))
    assert [x.row for x in together] == [x.row for x in apart] == list(range(kv_heads * repeats))
    for a, b in zip(together, apart, strict=True):
        assert (a.stripes.bits == b.stripes.bits).all()
        for name, value in vars(a.diagnostics).items():
            assert np.asarray(value).tobytes() == np.asarray(getattr(b.diagnostics, name)).tobytes(), name


def test_only_those_wanted_and_those_that_need_float64():
    q, k = layer(4, 2, 70)
    q[2] *= 1e6
    got = found(q, k, [0, 0, 1, 1], rule(0.4, None, None), wanted=[0, 2])
    assert [x.diagnostics is not None for x in got] == [True, False, True, False]
    same(got[2].diagnostics, diagnose_head(Head(q[2], k[1], scale=0.4)))


def test_nothing_is_selected_and_everything():
    q, k = layer(1, 1, 100)
    (none,), (every,) = (found(q, k, [0], rule(0.4, None, None, t)) for t in (-math.inf, math.inf))
    assert none.stripes.density == 0
    assert every.stripes.density == 1


@pytest.mark.usefixtures("one_thread")  # the interpreter runs one kernel at a time
def test_a_run_through_the_kernels(tmp_path, monkeypatch):
    """The same table, head for head, siblings and layers before included."""
    entries = []
    for index in range(2):
        q, k = (x.cpu() for x in layer(4, 2, 66))
        entries.append({"prompt": "p", "layer": index, "q": q.roll(index, 0), "k": k, "scale": 0.4})
    write_dump(tmp_path / "dump", entries)
    asked = {"params": PARAMS, "theta": 2.0, "heads": [0, 2, 3], "figures": False, "device": DEVICE.type}
    monkeypatch.setattr(run_module, "suits", lambda *_: False)
    want = diagnose(tmp_path / "dump", tmp_path / "torch", **asked)
    calls = []
    monkeypatch.setattr(run_module, "suits", lambda *_: calls.append(1) or True)
    got = diagnose(tmp_path / "dump", tmp_path / "kernels", **asked)
    assert calls
    for a, b in zip(got.rows, want.rows, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            if isinstance(value, float):
                assert value == pytest.approx(other, rel=2e-4, abs=1e-5, nan_ok=True), name
            elif not isinstance(value, tuple):
                assert value == other, name


def test_the_cpu_keeps_to_plain_torch():
    assert not suits(torch.zeros(1, 4, 16), torch.device("cpu"))
    assert not suits(torch.zeros(1, 4, 300), torch.device("cuda"))
    assert not suits(torch.zeros(1, 4, 16, dtype=torch.float64), torch.device("cuda"))


@pytest.mark.usefixtures("one_thread")
def test_beside_an_analysis(tmp_path, monkeypatch):
    """The same bytes as a diagnosis of its own, whole or continued; nothing is measured twice."""
    entries = []
    for index in range(2):
        q, k = (x.cpu() for x in layer(2, 1, 70))
        entries.append({"prompt": "p", "layer": index, "q": q.roll(index, 0), "k": k, "v": k.flip(1), "scale": 0.4})
    write_dump(tmp_path / "dump", entries)
    monkeypatch.setattr(run_module, "suits", lambda *_: True)
    chosen = {"params": PARAMS, "figures": False, "device": DEVICE.type}
    diagnose(tmp_path / "dump", tmp_path / "alone", theta=2.0, **chosen)
    asked = {"thetas": (2.0, 1.0), "backend": "triton", "diagnose": True, **chosen}
    calls = []
    real = run_module.diagnose_layer
    monkeypatch.setattr(run_module, "diagnose_layer", lambda *a, **b: calls.append(1) or real(*a, **b))
    analyze(tmp_path / "dump", tmp_path / "beside", **asked)
    assert not calls
    shutil.copytree(tmp_path / "beside", tmp_path / "again")  # continued: layer 1 is measured by itself there
    for part in (tmp_path / "again" / "heads" / "parts").glob("*layer001.json"):
        part.unlink()
    analyze(tmp_path / "dump", tmp_path / "again", resume=True, **asked)
    assert calls
    names = sorted(x.name for x in (tmp_path / "alone" / "parts").iterdir())
    assert len(names) == 2
    for name in names:
        want = (tmp_path / "alone" / "parts" / name).read_bytes()
        for folder in ("beside", "again"):
            assert (tmp_path / folder / "heads" / "parts" / name).read_bytes() == want, folder
