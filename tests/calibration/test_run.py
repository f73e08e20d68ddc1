"""`calibrate` end to end: the promise checked by measuring again, files, resume, refusals, the command line."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import typer
from looking import drawn_texts
from typer.testing import CliRunner

from anchorscope.analysis.run import analyze, iter_profiles, redraw
from anchorscope.anchors import AnchorConfig
from anchorscope.calibration import calibrate, parse_groups, plan_calibration
from anchorscope.calibration.figures import fitted_held_out
from anchorscope.calibration.tables import COLUMNS
from anchorscope.cli.calibrate import calibrate as command
from anchorscope.cli.calibrate import print_summary
from anchorscope.dumps import write_dump
from anchorscope.errors import AnchorScopeError, DumpError, InputError
from anchorscope.measured import STEPS
from anchorscope.params import AnchorParams
from anchorscope.report.html import build_data, open_sources

ROOT = Path(__file__).parents[2]
N, D = 512, 8
GROUPS = (AnchorParams(16, 2), AnchorParams(32, 2))
KINDS = "16x2,32x2"
THETAS = (-math.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf)
HOW = {"groups": GROUPS, "thetas": THETAS, "figures": False}
MODEL = {
    "name": "toy",
    "type": "llama",
    "layers": 9,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": D,
    "fingerprint": "f",
}


def write(path, names=("story", "code", "mail"), *, n=N, layers=(2, 7), heads=4, model=MODEL, windows=()):
    """Heads with a sink, stripes and a local part; each prompt is its own text, cut at n."""
    entries = []
    for name in names:
        g = torch.Generator().manual_seed(sum(name.encode()))
        for layer in layers:
            q, k, v = (torch.randn(h, 1024, D, generator=g) for h in (4, 2, 2))
            k[:, :2] += 1.5
            k[:, 17::53] += 0.8
            q += torch.linspace(0.2, 1.2, 4)[:, None, None]
            own = {"q": q[:heads, :n], "k": k[:, :n], "v": v[:, :n]} if heads == 4 else {
                "q": q[:heads, :n], "k": k[: heads // 2, :n], "query_heads": list(range(heads)), "kv_heads": [0]
            }  # fmt: skip
            entries.append(
                {"prompt": name, "layer": layer, "scale": 0.7, "window": 100 if layer in windows else None, **own}
            )
    ids = {name: {"token_ids": [sum(name.encode()) + i for i in range(n)]} for name in names}
    write_dump(path, entries, prompts=ids, model=model)
    return path


@pytest.fixture(scope="module", autouse=True)
def reports_keep_to_their_schema(tmp_path_factory):
    """Every calibration.json that a test of this file wrote, whatever its options, when the last one is over.

    Tests of other files, which the same process may have run before, damage theirs on purpose.
    """
    before = set(tmp_path_factory.getbasetemp().rglob("calibration.json"))
    yield
    for path in set(tmp_path_factory.getbasetemp().rglob("calibration.json")) - before:
        keeps_to_its_schema(json.loads(path.read_text()))


def keeps_to_its_schema(report):
    schema = json.loads((ROOT / "docs" / "calibration.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dump") / "toy")


@pytest.fixture(scope="module")
def finished(dump, tmp_path_factory):
    return calibrate(dump, tmp_path_factory.mktemp("out") / "o", target_recall=0.9, **{**HOW, "figures": True})


@pytest.fixture(scope="module")
def folders(finished):
    """The analyses of `finished`: choosing again from them measures nothing."""
    return sorted((finished.path / "analysis").iterdir())


def files(path):
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name[0] != ".")
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def test_what_is_written_is_true(dump, finished, tmp_path):
    """Every head measured again at exactly the theta and groups of anchors.json: the recall and density stated."""
    config = AnchorConfig.load(finished.path / "anchors.json")
    assert config == finished.config
    assert [x.layer for x in config.layers] == [2, 7]
    rows = {(r["layer"], r["head"]): r for r in finished.report["heads"]}
    held = [p["name"] for p in finished.report["prompts"] if p["held_out"]]
    assert len(held) == 1
    sparse = 0
    for layer in config.layers:
        thetas = sorted({t for t in layer.thetas if t is not None})
        again = analyze(
            dump, tmp_path / str(layer.layer), thetas=thetas or [0.0], params=layer.params, layers=[layer.layer],
            figures=False,
        )  # fmt: skip
        for p in again.profiles(heat=False):
            theta = layer.thetas[p.head]
            row = rows[layer.layer, p.head]
            if theta is None:
                assert row["theta"] == "dense"
                assert row["fitted_recall"] == row["fitted_density"] == 1
            elif p.prompt in held:
                sparse += 1
                at = thetas.index(theta)
                assert row["held_out_recall"] == pytest.approx(float(p.recall[at]), abs=1e-6)
                assert row["held_out_density"] == float(p.density[at])
                assert row["held_out_p05"] <= float(p.recall_p05[at]) + 1e-9
                assert row["kept"] == (row["held_out_recall"] >= 0.9 - 1e-9)
        for head in range(4):
            assert rows[layer.layer, head]["fitted_recall"] >= 0.9
    assert sparse >= 4, "otherwise nothing was shown"


def test_one_theta_lower_would_break_the_promise(finished):
    """The choice is the smallest theta of the grid: the one before misses the target on the fitting prompts."""
    held = {p["name"] for p in finished.report["prompts"] if p["held_out"]}
    checked = 0
    for layer in finished.config.layers:
        folder = finished.path / "analysis" / f"toy-{layer.params.block}x{layer.params.step}"
        for head, theta in enumerate(layer.thetas):
            if theta is None or math.isinf(theta):
                continue
            fit = [
                p for p in iter_profiles(folder, heat=False)
                if (p.layer, p.head) == (layer.layer, head) and p.prompt not in held
            ]  # fmt: skip
            at = int(np.flatnonzero(fit[0].curve_theta == theta)[0])
            recall = np.mean([p.curve_recall for p in fit], axis=0)
            assert recall[at] >= 0.9 > recall[at - 1]
            checked += 1
    assert checked >= 4


def test_files_of_a_run(finished):
    report = json.loads((finished.path / "calibration.json").read_text())
    keeps_to_its_schema(report)
    with pytest.raises(jsonschema.ValidationError):
        keeps_to_its_schema({**report, "dense_heads": "none"})
    assert report == finished.report
    with (finished.path / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(int(r["layer"]), int(r["head"])) for r in rows] == [(i, h) for i in (2, 7) for h in range(4)]
    assert float(rows[0]["fitted_recall"]) == pytest.approx(report["heads"][0]["fitted_recall"], rel=1e-8)
    schema = json.loads((ROOT / "docs" / "anchors.schema.json").read_text())
    anchors = json.loads((finished.path / "anchors.json").read_text())
    jsonschema.validate(anchors, schema)
    assert anchors["model"] == MODEL
    record = anchors["record"]
    assert record["settings"]["target"] == 0.9
    assert record["settings"]["groups"] == ["16x2", "32x2"]
    assert all(len(p["sha256"]) == 64 for p in record["prompts"])
    assert record["fitted"]["recall"] == report["fitted"]["recall"]
    assert {p.name for p in finished.figures} == {"thetas.png", "fitted-held-out.png", "recall-density.png"}
    assert all(p.stat().st_size > 5000 for p in finished.figures)
    assert {p.name for p in (finished.path / "analysis").iterdir()} == {"toy-16x2", "toy-32x2"}


def test_finished_analyses_give_the_same_anchors(dump, finished, folders, tmp_path):
    again = calibrate(folders, tmp_path / "o", target_recall=0.9, figures=False)
    assert again.config.layers == finished.config.layers
    assert not (tmp_path / "o" / "analysis").exists()
    mixed = plan_calibration([dump, folders[0]], groups=GROUPS, thetas=THETAS)
    assert [unit.folder for unit in mixed.units] == ["toy-32x2"]
    with pytest.raises(InputError, match=r"with groups 64x8: give its dump, or run analyze with --block 64 --step 8"):
        plan_calibration(folders, groups=parse_groups("64x8"))


def test_another_target_measures_nothing_again(dump, tmp_path):
    out = tmp_path / "o"
    how = {**HOW, "layers": [7]}
    calibrate(dump, out, target_recall=0.9, **how)
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    with pytest.raises(InputError, match="a finished calibration; add --overwrite"):
        calibrate(dump, out, budget_density=0.6, **how)
    again = calibrate(dump, out, budget_density=0.6, overwrite=True, **how)
    assert {p.name: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    assert again.report["fitted"]["density"] <= 0.6
    assert again.report["promise"] is None
    assert {r["kept"] for r in again.report["heads"]} == {None}


@pytest.mark.parametrize("statistic", ["p05", "last"])
def test_row_statistics_keep_their_promise_on_the_fitting_prompts(folders, tmp_path, statistic):
    done = calibrate(folders, tmp_path / "o", target_recall=0.8, statistic=statistic, holdout=["mail"], figures=False)
    assert all(r[f"fitted_{statistic}"] >= 0.8 for r in done.report["heads"])
    assert {t for x in done.config.layers for t in x.thetas} <= {*THETAS, None}
    assert [p["name"] for p in done.report["prompts"] if p["held_out"]] == ["mail"]


@pytest.mark.parametrize("by", ["layer", "model"])
def test_shared_thetas(folders, tmp_path, by):
    done = calibrate(folders, tmp_path / "o", target_recall=0.9, by=by, figures=False)
    thetas = [{t for t in x.thetas if t is not None} for x in done.config.layers]
    assert all(len(t) <= 1 for t in thetas)
    if by == "model":
        assert len(set.union(*thetas)) <= 1
        assert len({x.params for x in done.config.layers}) == 1
    for layer in done.report["layers"]:
        assert by == "model" or layer["fitted_recall"] >= 0.9
    assert done.report["fitted"]["recall"] >= 0.9
    assert done.report["promise"]["units"] == (2 if by == "layer" else 1)


def test_lengths_of_one_text(tmp_path):
    """The dump at 256 tokens begins the one at 512: their prompts stay together, and the matrix is filled."""
    short, long = write(tmp_path / "short", n=256), write(tmp_path / "long")
    how = {"groups": GROUPS[:1], "thetas": THETAS, "layers": [2]}
    done = calibrate([short, long], tmp_path / "o", target_recall=0.85, **how)
    held = {p["name"] for p in done.report["prompts"] if p["held_out"]}
    assert len(held) == 2
    assert len({name.split()[0] for name in held}) == 1
    cells = {(c["fit_tokens"], c["tokens"]): c for c in done.report["lengths"]}
    assert set(cells) == {(a, b) for a in (256, 512) for b in (256, 512)}
    assert all(c["held_out"] for c in cells.values())
    assert cells[512, 512]["density"] < cells[512, 256]["density"]
    assert (done.path / "figures" / "lengths.png").stat().st_size > 5000
    with pytest.raises(InputError, match="only lengths of one text"):
        plan_calibration([write(tmp_path / "a", ["a"], n=256), write(tmp_path / "b", ["a"])])


def test_captured_heads_only(tmp_path):
    """A dump of half the heads: the model's others run dense, and are said to."""
    part = write(tmp_path / "part", ("a", "b"), heads=2)
    plan = plan_calibration(part, target_recall=0.8, groups=GROUPS, thetas=THETAS)
    assert "2 of the model's 9 layers are calibrated (2,7); the others will run dense" in plan.warnings
    assert "layer 2 holds 2 of 4 query heads; the others will run dense" in plan.warnings
    done = calibrate(part, tmp_path / "o", plan=plan, figures=False)
    assert all(len(x.thetas) == 4 and x.dense[2:] == (True, True) for x in done.config.layers)


def test_a_plan_of_other_sources_is_refused(tmp_path):
    one, other = write(tmp_path / "one", ("a", "b")), write(tmp_path / "other", ("c", "d"))
    plan = plan_calibration(one, target_recall=0.8, groups=GROUPS, thetas=THETAS)
    for sources in (other, [one, other]):
        with pytest.raises(InputError, match=r"^the plan was made of .*one, not of .*other"):
            calibrate(sources, tmp_path / "o", plan=plan, figures=False)
    assert not (tmp_path / "o").exists()
    assert calibrate([tmp_path / "other" / ".." / "one"], tmp_path / "o", plan=plan, figures=False).config.layers


def test_windowed_layers_are_left_out(tmp_path):
    mixed = write(tmp_path / "w", ("a", "b"), windows=(2,))
    plan = plan_calibration(mixed, groups=GROUPS)
    assert plan.sources.layers == (7,)
    assert "layers with a sliding window are left out and run dense: 2" in plan.warnings
    assert {j.entry.layer for unit in plan.units for j in unit.analysis.units} == {7}
    folder = analyze(mixed, tmp_path / "o", params=GROUPS[0], figures=False).path
    assert plan_calibration(folder).sources.layers == (7,)
    with pytest.raises(InputError, match="sliding window and run dense"):
        plan_calibration(mixed, layers=[2])


def test_where_every_head_runs_dense_it_is_said(folders, tmp_path, capsys):
    done = calibrate(folders, tmp_path / "o", target_recall=0.9, dense_above=1e-3, figures=False)
    assert done.report["dense_heads"] == len(done.report["heads"])
    print_summary(done)
    assert "Every head runs dense: none keeps the target below density 0.001." in capsys.readouterr().out
    said = [(x, box) for x, box in drawn_texts(fitted_held_out(done.report)) if x.get_text() == "every head runs dense"]
    assert len(said) == 2, "no empty axes"
    for text, box in said:
        right, below = text.axes.transAxes.inverted().transform((box.x1, box.y0))
        assert below > right + 0.05, "above the diagonal"
    (card,) = [c for c in build_data(open_sources([tmp_path / "o"]))["summary"][0]["items"] if c[0] == "recommended"]
    assert card[1] == "dense"


def test_a_hint_at_other_groups_is_an_option_of_this_command(dump):
    plan = plan_calibration(dump, target_recall=0.9, groups=(AnchorParams(128, 4),))
    (hint,) = [w for w in plan.warnings if "the anchor region alone" in w]
    assert re.search(r"; --groups \d+x\d+ would keep", hint)
    found = re.search(r"--groups (\S+)", hint)
    assert found is not None
    asked = plan_calibration(dump, target_recall=0.9, groups=parse_groups(found[1]))
    assert not any("the anchor region alone" in w for w in asked.warnings)


def test_nothing_held_out_is_said(folders, tmp_path):
    done = calibrate(folders, tmp_path / "o", target_recall=0.9, holdout=0, figures=False)
    assert any("no prompt is held out" in w for w in done.report["warnings"])
    assert done.report["held_out"] is None
    assert done.report["promise"] is None
    assert done.report["heads"][0]["held_out_recall"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_recall": 0.0}, "--target-recall 0.0 is out of range: a target recall lies above 0 and at most"),
        ({"target_recall": 1.5}, "--target-recall 1.5"),
        ({"target_recall": math.nan}, "--target-recall nan"),
        ({"target_recall": 0.9, "budget_density": 0.5}, "not both"),
        ({"budget_density": math.nan}, "--budget-density nan"),
        ({"budget_density": -1.0}, "--budget-density -1.0"),
        ({"by": "group"}, "--by 'group' is unknown; use head, layer or model"),
        ({"statistic": "median"}, "--statistic 'median' is unknown"),
        ({"minimise": "memory"}, "--minimise 'memory' is unknown"),
        ({"minimise": "time"}, "give --costs"),
        ({"minimise": "time", "budget_density": 0.5, "costs": "x.json"}, "shared out by density"),
        ({"costs": "nowhere.json"}, "cannot be read"),
        ({"dense_above": 0.0}, "--dense-above 0.0"),
        ({"layers": [3]}, "no source has layer 3; there are 2,7"),
        ({"groups": ()}, "at least one kind of group"),
        ({"holdout": ["poem"]}, "no prompt 'poem'"),
        ({"thetas": [math.nan]}, "NaN"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_requests(dump, change, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        plan_calibration(dump, **{"groups": GROUPS, **change})
    assert "\n" not in str(error.value)


def test_sources_that_do_not_fit_together(dump, finished, tmp_path):
    other = write(tmp_path / "other", ("x",), model={**MODEL, "fingerprint": "g"})
    with pytest.raises(InputError, match="are of different models"):
        plan_calibration([dump, other])
    named = {k: v for k, v in MODEL.items() if k != "fingerprint"}
    with pytest.raises(InputError, match="their name differ"):
        plan_calibration([dump, write(tmp_path / "named", ("x",), model={**named, "name": "other"})])
    with pytest.raises(InputError, match="does not say which model"):
        plan_calibration([dump, write(tmp_path / "silent", ("x",), model=None)])
    with pytest.raises(InputError, match=r"prompt x \(512 tokens\) lacks layer 7, head 0"):
        plan_calibration([dump, write(tmp_path / "fewer", ("x",), layers=(2,))])
    assert plan_calibration([dump, tmp_path / "fewer"], layers=[2]).sources.layers == (2,)
    with pytest.raises(InputError, match="given twice"):
        plan_calibration([dump, dump])
    folder = finished.path / "analysis" / "toy-16x2"
    with pytest.raises(InputError, match="another analysis given does too"):
        plan_calibration([folder, folder])
    foreign = analyze(write(tmp_path / "y", ("y",)), tmp_path / "ya", params=GROUPS[1], figures=False)
    with pytest.raises(InputError, match=r"no kind of group in common: 16x2 for prompt story, 32x2 for y"):
        plan_calibration([folder, foreign.path])
    with pytest.raises(DumpError, match="neither a dump nor a finished analysis"):
        plan_calibration(tmp_path)
    (folder_copy := tmp_path / "unfinished").mkdir()
    (folder_copy / "analysis.json").write_bytes((folder / "analysis.json").read_bytes())
    with pytest.raises(DumpError, match="no finished analysis"):
        plan_calibration(folder_copy)


def test_coarse_thetas_are_said_to_be(dump, tmp_path):
    how = {"groups": GROUPS[:1], "thetas": [2.0], "layers": [2], "figures": False}
    done = calibrate(dump, tmp_path / "o", target_recall=0.8, statistic="p05", **how)
    assert any("known at 1 finite theta only" in w for w in done.report["warnings"])


def test_time_decides_when_asked(folders, tmp_path):
    def bench(group, speed):
        data = {
            "format": "anchorscope-bench",
            "format_version": 1,
            "settings": {"block": group.block, "step": group.step, "backend": "triton", "dtype": "bf16"},
            "hardware": {"name": "toy"},
            "rows": [{"n": N, "sparse": [{"density": 0.5, "efficiency": speed}]}],
        }
        path = tmp_path / f"{group.block}.json"
        path.write_text(json.dumps(data))
        return path

    for fast in GROUPS:
        costs = [bench(g, 0.9 if g == fast else 0.51) for g in GROUPS]
        done = calibrate(
            folders, tmp_path / f"o{fast.block}", target_recall=0.9, minimise="time", costs=costs, figures=False
        )
        assert {x.params for x in done.config.layers} == {fast}
        assert 0 < done.report["fitted"]["time"] <= 1
        assert done.report["settings"]["costs"]["tokens"] == {"16x2": N, "32x2": N}


# ----------------------------------------------------------------------------------------------------------------
# command line


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(dump, folders, tmp_path):
    arguments = (dump, "--out", tmp_path / "o", "--groups", KINDS, "--target-recall", "0.9", "--theta", "0:6:1")
    result = invoke(*arguments, "--layers", "7", "--no-figures")
    assert result.exit_code == 0, result.output
    lines = [x for x in result.stdout.splitlines() if str(tmp_path) not in x]
    assert max(map(len, lines)) <= 80
    assert "mean recall 0.9 in every head; 2 prompts fitted, 1 held out" in result.stdout
    assert re.search(r"\d of 4 heads miss it", result.stdout)
    assert "24 heads to measure" in result.stderr
    assert "of disk" in result.stderr
    again = invoke(*arguments, "--layers", "7", "--no-figures", "--json", "--overwrite")
    report = json.loads(again.stdout)
    assert report["format"] == "anchorscope-calibration"
    assert report["settings"]["thetas"] == [0, 1, 2, 3, 4, 5, 6]
    again = (*folders, "--out", tmp_path / "o", "--overwrite", "--no-figures")
    budget = invoke(*again, "--budget-density", "0.7", "--by", "layer")
    assert budget.exit_code == 0, budget.output
    assert "density 0.7 on average, thetas by layer" in budget.stdout
    low = invoke(*again, "--budget-density", "0.01")
    assert isinstance(low.exception, InputError)
    assert "give at least 0." in str(low.exception)


def test_heat_maps_are_kept_at_one_theta_and_measured_again_where_others_are_drawn(tmp_path):
    """What else an analysis holds is that of a plain one, byte for byte."""
    dump = write(tmp_path / "toy", ("story",), layers=(2,), heads=2)
    params, plain, mine = GROUPS[0], tmp_path / "plain", tmp_path / "o" / "analysis" / "toy-16x2"
    analyze(dump, plain, thetas=THETAS, params=params, figures=False)
    calibrate(dump, tmp_path / "o", holdout=0, **HOW)
    for table in ("heads.csv", "curves.csv", "thetas.csv"):
        assert (plain / table).read_bytes() == (mine / table).read_bytes(), table
    for lean, whole in zip(iter_profiles(mine), iter_profiles(plain), strict=True):
        assert lean.step_theta.size == 0 < whole.step_theta.size
        for key in set(vars(whole)) - set(STEPS):
            assert np.array_equal(getattr(lean, key), getattr(whole, key), equal_nan=key.startswith("output")), key
    with pytest.raises(InputError, match=r"for theta -inf alone, as calibrate and earlier versions do: run analyze"):
        redraw(mine, theta=2.0)
    with pytest.raises(InputError, match=r"for theta -inf alone"):
        redraw(mine)
    assert not list((mine / "figures").glob("*"))
    assert len(redraw(mine, heatmaps=[])) == 3  # these need no heat map
    analyze(dump, mine, thetas=THETAS, params=params, figure_theta=2.0, heatmaps=[(2, 0)])
    assert files(mine / "profile") == files(plain / "profile")
    assert len(list((mine / "figures").glob("*heatmap.png"))) == 1


def test_many_heads_and_lengths_fit_80_columns(tmp_path):
    paths = [write(tmp_path / str(n), ("a", "b"), n=n) for n in (200, 300, 512)]
    result = invoke(*paths, "--out", tmp_path / "o", "--groups", "16x2", "--theta", "0:6:1", "--no-figures")
    assert result.exit_code == 0, result.output
    assert max(len(x) for x in result.stdout.splitlines() if str(tmp_path) not in x) <= 80
    assert "fitted at" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "64"), "--groups '64' is malformed"),
        (("--theta", "nan"), "is not a number"),
        (("--target-recall", "2"), "--target-recall 2.0"),
        (("--layers", "5"), "5 does not exist"),
        (("--holdout", "1"), "share from 0"),
        (("--holdout", "poem"), "no prompt 'poem'"),
        (("--costs", "nowhere.json"), "cannot be read"),
    ],
)
def test_bad_options(dump, tmp_path, options, message):
    result = invoke(dump, "--out", tmp_path / "o", *options)
    assert isinstance(result.exception, AnchorScopeError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "o").exists()
