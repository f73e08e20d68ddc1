"""`analyze` end to end on small dumps: files, columns, resume, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from brute import Brute

from anchorscope import AnchorParams, DumpError, InputError, analyze, iter_profiles, load_report, plan_analysis
from anchorscope.analysis.run import redraw
from anchorscope.analysis.tables import CURVES_COLUMNS, HEADS_COLUMNS
from anchorscope.dumps import open_dump, write_dump
from anchorscope.profiles import HeadProfile

ROOT = Path(__file__).parents[2]
PARAMS = AnchorParams(8, 4)
N, D = 200, 16
FEW = {"prompts": ["story"], "layers": [2]}


def write(path, *, values=True, window=None, n=N):
    g = torch.Generator().manual_seed(1)
    entries = []
    for prompt in ("story", "code"):
        for layer in (2, 7):
            q, k, v = (
                torch.randn(4, n, D, generator=g),
                torch.randn(2, n, D, generator=g),
                torch.randn(2, n, D, generator=g),
            )
            k[:, :3] += 1
            q += 0.5
            entry = {"prompt": prompt, "layer": layer, "q": q, "k": k, "scale": 0.25, "window": window, "softcap": None}
            entries.append({**entry, "v": v} if values else entry)
    write_dump(path, entries)
    return entries


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "d"
    write(path)
    return path


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files(path):
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name[0] != "."
    }


def test_everything_is_written(dump, tmp_path):
    result = analyze(dump, tmp_path / "out", thetas=(1.0, math.inf, -math.inf), params=PARAMS)
    heads = rows(tmp_path / "out" / "heads.csv")
    assert tuple(heads[0]) == HEADS_COLUMNS
    assert len(heads) == 2 * 2 * 4 * 3
    brute = {}
    source = open_dump(dump)
    for row in heads:
        key = row["prompt"], int(row["layer"]), int(row["head"])
        if key not in brute:
            t = source.load(source.entry(*key[:2]))
            kv = t.kv_index(key[2])
            assert t.kv_heads[kv] == int(row["kv_head"])
            brute[key] = Brute(t.q[key[2]], t.k[kv], t.v[kv], PARAMS, scale=0.25)
        want = brute[key].at(float(row["theta"]))
        for name in ("recall", "recall_p05", "recall_min", "recall_last", "output_error"):
            assert float(row[name]) == pytest.approx(want[name], abs=1e-4), (key, name)
        assert float(row["density"]) == pytest.approx(want["kept_pairs"] / want["visible_pairs"], abs=1e-8)
        assert float(row["sparsity"]) == pytest.approx(1 - float(row["density"]), abs=1e-8)
        assert float(row["stripe_density"]) == pytest.approx(want["stripe_pairs"] / want["candidate_pairs"], abs=1e-8)
    curves = rows(tmp_path / "out" / "curves.csv")
    assert tuple(curves[0]) == CURVES_COLUMNS
    assert {r["kind"] for r in curves} == {"anchor", "oracle"}
    assert len(list((tmp_path / "out" / "profile").iterdir())) == 16
    assert result.figures
    assert all(p.stat().st_size > 5000 for p in result.figures)
    assert [p.head for p in iter_profiles(tmp_path / "out")] == [0, 1, 2, 3] * 4


def test_disk_is_stated_beforehand(tmp_path):
    sample = ROOT / "samples" / "smollm2-4k"
    settings = {"thetas": (8.0, 10.0), "params": AnchorParams(64, 4)}
    plan = plan_analysis(sample, **settings)
    analyze(sample, tmp_path, plan=plan)
    used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 0.8 * used <= plan.disk + plan.pictures <= 1.2 * used


def test_report_follows_its_schema(dump, tmp_path):
    result = analyze(dump, tmp_path, thetas=(1.0, math.inf), params=PARAMS, figures=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == result.report == load_report(tmp_path)
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.validate(report, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, "overall": "none"}, schema)
    heads = rows(tmp_path / "heads.csv")
    first = [float(r["recall"]) for r in heads if r["theta"] == "1"]
    assert report["overall"][0]["recall_mean"] == pytest.approx(np.mean(first), abs=1e-8)
    assert report["overall"][0]["worst"]["recall"] == pytest.approx(min(first), abs=1e-8)
    assert report["overall"][1]["density_mean"] == 1
    assert report["target"]["heads"] == 16
    assert len(report["target"]["short"]) == sum(x < 0.95 for x in first)
    for item in report["target"]["short"]:
        assert item["theta_needed"] is None or float(item["theta_needed"]) > 1.0


def test_a_range_shows_the_first_theta_that_reaches_the_target(dump, tmp_path):
    """The order of the thetas does not matter; report, tables and the kinds of heads are all at that theta."""
    thetas = [x / 2 for x in range(13)]
    want = None
    for name, order in (("up", thetas), ("down", thetas[::-1]), ("any", thetas[5:] + thetas[:5])):
        result = analyze(dump, tmp_path / name, thetas=order, params=PARAMS, figures=False, diagnose=True)
        means = {}
        for row in rows(tmp_path / name / "heads.csv"):
            means.setdefault(float(row["theta"]), []).append(float(row["recall"]))
        theta = min(t for t, found in means.items() if np.mean(found) >= 0.95)
        assert theta not in (order[0], order[-1])
        report = result.report
        assert report["figure_theta"] == {"theta": theta, "why": "reaches"}
        schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
        jsonschema.validate(report, schema)
        short = sorted(r for r in means[theta] if r < 0.95)
        assert [x["recall"] for x in report["target"]["short"]] == pytest.approx(short, abs=1e-8)
        assert report["target"]["reached"] == 16 - len(short)
        assert result.diagnosis.report["settings"]["theta"] == theta
        assert [row["theta"] for row in report["overall"]] == order
        want = want or report["target"]
        assert report["target"] == want
    table = rows(tmp_path / "any" / "thetas.csv")
    assert [float(r["theta"]) for r in table] == order
    for row, said in zip(table, report["overall"], strict=True):
        assert float(row["recall_mean"]) == pytest.approx(said["recall_mean"], abs=1e-8)
        assert (row["worst_prompt"], int(row["worst_head"])) == (said["worst"]["prompt"], said["worst"]["head"])
        assert int(row["heads"]) == 16


def test_another_theta_is_drawn_without_measuring_again(dump, tmp_path, monkeypatch):
    settings = {"thetas": (1.0, 2.0, 3.0, 4.0), "params": PARAMS, "target_recall": 0.9, "diagnose": True, **FEW}
    first = analyze(dump, tmp_path / "o", **settings)
    assert first.report["figure_theta"]["theta"] == 3.0
    before = files(tmp_path / "o")

    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("anchorscope.analysis.engine._profile_head", never)
    monkeypatch.setattr("anchorscope.heads.run.diagnose_head", never)
    drawn = analyze(dump, tmp_path / "o", figure_theta=1.0, **settings)
    assert drawn.report["figure_theta"] == {"theta": 1.0, "why": "asked"}
    assert len(drawn.report["target"]["short"]) > len(first.report["target"]["short"])
    after = files(tmp_path / "o")
    changed = {name for name in before if before[name] != after[name]}
    assert {
        "report.json",
        "analysis.json",
        "figures/story-grid.png",
        "figures/story-layer02-recall-by-position.png",
    } < (changed)
    assert not {name for name in changed if name.startswith(("profile/", "heads/")) or name.endswith(".csv")}
    with pytest.raises(InputError, match="holds a finished analysis"):  # there is nothing more to draw
        analyze(dump, tmp_path / "o", figure_theta=1.0, **settings)


def test_theta_zero_can_be_asked_for(dump, tmp_path):
    settings = {"thetas": (0.0, 4.0), "params": PARAMS}
    assert analyze(dump, tmp_path / "o", **settings, figures=False).report["figure_theta"]["theta"] == 4.0
    plan = plan_analysis(dump, **settings)
    again = analyze(dump, tmp_path / "o", plan=plan, figure_theta=0.0, figures=False)
    assert again.report["figure_theta"] == {"theta": 0.0, "why": "asked"}


def test_redraw_at_any_theta_measured(dump, tmp_path):
    out = tmp_path / "o"
    analyze(dump, out, thetas=(1.0, 2.0, math.inf), params=PARAMS, figure_theta=2.0, **FEW)
    two = files(out / "figures")
    assert set(redraw(out, theta=math.inf)) == set((out / "figures").iterdir())
    dense = files(out / "figures")
    assert dense["story-grid.png"] != two["story-grid.png"]
    redraw(out, heatmaps="all", theta=1.0)
    assert sum("heatmap" in x.name for x in (out / "figures").iterdir()) == 4
    redraw(out, theta=2.0)
    assert files(out / "figures") == two  # heat maps of other heads at another theta are gone
    redraw(out, formats="svg")
    assert {x.suffix for x in (out / "figures").iterdir()} == {".png", ".svg"}
    redraw(out, theta=1.0, formats="svg")
    assert {x.suffix for x in (out / "figures").iterdir()} == {".svg"}  # no picture of another theta beside them
    redraw(out, theta=2.0)
    redraw(out)
    assert files(out / "figures") == two
    with pytest.raises(InputError, match=r"--theta must be one of those measured, not 3; there are 1, 2, i"):
        redraw(out, theta=3.0)
    # what an earlier version left: no word of a theta, and the first is drawn
    report = json.loads((out / "report.json").read_text())
    assert report.pop("figure_theta")["theta"] == 2.0
    (out / "report.json").write_text(json.dumps(report))
    redraw(out)
    assert files(out / "figures")["story-grid.png"] not in (two["story-grid.png"], dense["story-grid.png"])
    report["figure_theta"] = {"theta": 9.0, "why": "asked"}
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="not 9"):
        redraw(out)


def test_profiles_of_an_earlier_version(dump, tmp_path):
    """They hold the heat map of the first theta alone: that is redrawn; others are refused, or measured again."""
    settings = {"thetas": (1.0, 4.0), "params": PARAMS, **FEW}
    analyze(dump, tmp_path / "o", **settings)
    new = files(tmp_path / "o")
    profiles = sorted((tmp_path / "o" / "profile").iterdir())
    for path in profiles:
        profile = HeadProfile.load(path)
        slim = profile.without_heat()
        steps = {f: getattr(slim, f) for f in vars(slim) if f.startswith("step_")}
        dataclasses.replace(profile, **steps).save(path)
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    report.pop("figure_theta")
    (tmp_path / "o" / "report.json").write_text(json.dumps(report))
    before = files(tmp_path / "o")
    with pytest.raises(InputError, match=r"for theta 1 alone, as calibrate and earlier versions do: run analyze again"):
        redraw(tmp_path / "o", theta=4.0)
    assert files(tmp_path / "o") == before
    redraw(tmp_path / "o")
    assert files(tmp_path / "o")["figures/story-grid.png"] != new["figures/story-grid.png"]  # at theta 1, as it was
    said = []
    analyze(dump, tmp_path / "o", **settings, resume=True, notify=said.append)
    assert any(path.name in " ".join(said) for path in profiles)
    after = files(tmp_path / "o")
    assert {name for name in new if after[name] != new[name]} <= {"analysis.json", "report.json"}


def test_without_values_columns_are_empty(tmp_path):
    write(tmp_path / "d", values=False)
    analyze(tmp_path / "d", tmp_path / "out", thetas=(1.0,), params=PARAMS, figures=False)
    for row in rows(tmp_path / "out" / "heads.csv"):
        assert row["output_error"] == row["output_close_01"] == row["output_close_005"] == ""
        assert 0 < float(row["recall"]) <= 1


def test_selection(dump, tmp_path):
    analyze(dump, tmp_path, layers=[7], heads=[1, 3], prompts=["code"], params=PARAMS, figures=False)
    got = {(r["prompt"], r["layer"], r["head"], r["kv_head"]) for r in rows(tmp_path / "heads.csv")}
    assert got == {("code", "7", "1", "0"), ("code", "7", "3", "1")}


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"thetas": ()}, "thetas"),
        ({"thetas": (math.nan,)}, "NaN"),
        ({"target_recall": 0.0}, "target recall"),
        ({"target_recall": 1.5}, "target recall"),
        ({"figure_theta": 7.0}, r"--figure-theta must be one of those measured, not 7; there is only 12"),
        ({"figure_theta": math.nan}, "not nan"),
        ({"thetas": [x / 2 for x in range(41)], "figure_theta": 7.3}, "the nearest of the 41 from 0 to 20 is 7.5"),
        ({"layers": [3]}, "layer 3; it has 2,7"),
        ({"heads": [9]}, "query head 9; it has 0-3"),
        ({"prompts": ["poem"]}, "poem"),
        ({"backend": "cuda"}, "--backend"),
        ({"device": "tpu"}, "--device"),
        ({"device": "cpu:1"}, "--device"),
    ],
)
def test_bad_requests_name_the_culprit(dump, bad, word):
    with pytest.raises(InputError, match=word):
        plan_analysis(dump, **bad)


def test_missing_gpu_is_said(dump, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA GPU"):
        plan_analysis(dump, device="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"triton"):
        plan_analysis(dump, backend="triton", device="cpu")


def test_expensive_anchor_region_is_said(tmp_path):
    write(tmp_path / "d", n=400)
    plan = plan_analysis(tmp_path / "d", params=AnchorParams(64, 4))
    assert len(plan.warnings) == 1
    assert "--block" in plan.warnings[0]
    assert re.search(r"keeps 0\.\d\d of the pairs", plan.warnings[0])
    block, step = plan.warnings[0].split("--block ")[1].split(" would")[0].split(" --step ")
    assert not plan_analysis(tmp_path / "d", params=AnchorParams(int(block), int(step))).warnings


def test_no_analysis_there(tmp_path):
    with pytest.raises(DumpError, match="no analysis"):
        list(iter_profiles(tmp_path))
    with pytest.raises(DumpError, match="no finished analysis"):
        load_report(tmp_path)


def test_state_cannot_lead_outside(dump, tmp_path):
    analyze(dump, tmp_path / "out", params=PARAMS, figures=False, heads=[0])
    state = json.loads((tmp_path / "out" / "analysis.json").read_text())
    state["profiles"][0] = "../../secret.safetensors"
    (tmp_path / "out" / "analysis.json").write_text(json.dumps(state))
    with pytest.raises(DumpError, match="outside"):
        list(iter_profiles(tmp_path / "out"))
