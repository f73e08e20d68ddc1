"""`compare` end to end on small dumps: files, columns, resume, refusals, line-ups, tables, others' methods."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anchorscope.compare import compare, load_comparison, plan_compare, score_lineup
from anchorscope.compare import run as run_module
from anchorscope.compare.figures import draw_all
from anchorscope.compare.tables import (
    COLUMNS,
    Need,
    Point,
    density_at_recall,
    per_head_need,
    shared_need,
    winners,
)
from anchorscope.dumps import open_dump, write_dump
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import read_part, write_part
from anchorscope.methods import METHODS, Head, find_method, known_methods, line_up

N, D = 150, 8
NAMES = "anchor,streaming,oracle-row,oracle-stripe,block-topk,oracle-block"


def lineup():
    return line_up(NAMES, ["anchor.block=8,anchor.step=2"], ["small"])


def write(path, *, values=True, layers=(2, 7)):
    g = torch.Generator().manual_seed(1)
    entries = []
    for prompt in ("story", "code"):
        for layer in layers:
            q, k, v = (torch.randn(h, N, D, generator=g) for h in (4, 2, 2))
            k[:, :3] += 1
            q += 0.5
            entry = {"prompt": prompt, "layer": layer, "q": q, "k": k, "scale": 0.3}
            entries.append({**entry, "v": v} if values else entry)
    write_dump(path, entries)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "d"
    write(path)
    return path


@pytest.fixture(scope="module")
def finished(dump, tmp_path_factory):
    return compare(dump, tmp_path_factory.mktemp("out") / "o", lineup=lineup())


def files(path):
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name[0] != ".")
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def test_methods_csv(dump, finished):
    with (finished.path / "methods.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    columns = (
        "prompt,layer,head,method,parameter,value,recall,recall_p05,recall_last,density,output_error,identify_cost"
    )
    assert columns.split(",") == list(COLUMNS)
    assert len(rows) == 2 * 2 * 4 * sum(len(c.at_length(N).sweep) for c in lineup())
    source = open_dump(dump)
    row = rows[-1]
    t = source.load(source.entry(row["prompt"], int(row["layer"])))
    head, kv = int(row["head"]), t.kv_index(int(row["head"]))
    want = score_lineup(Head(t.q[head], t.k[kv], scale=0.3), t.v[kv], [lineup()[-1].at_length(N)])[-1]
    assert row["method"] == want[0].label == "small"
    assert float(row["value"]) == want[1]
    assert row["parameter"] == "theta"
    for name in ("recall", "recall_p05", "recall_last", "density", "output_error", "identify_cost"):
        assert float(row[name]) == pytest.approx(getattr(want[2], name), rel=1e-6), name


def test_report_and_figures(finished):
    report = finished.report
    assert report == json.loads((finished.path / "compare.json").read_text())
    assert report["heads"] == 16
    assert [m["label"] for m in report["settings"]["methods"]][:3] == ["anchor-128x16", "anchor-64x4", "streaming"]
    needed = {x["method"]: x["needed"] for x in report["needed"]["shared"]}
    for cell in needed["small"]:
        want = shared_need(finished.points, "small", cell["recall"])
        assert Need(cell["density"], cell["identify_cost"]) == want
    own = {x["method"]: x["needed"] for x in report["needed"]["per-head"]}
    for cell in own["oracle-row"]:
        want = per_head_need(finished.points, "oracle-row", cell["recall"])
        assert cell["density"] == want.density
        assert cell["heads"] == 16
    assert len(report["best"]) == 16
    assert {b["method"] for b in report["best"]}.isdisjoint({"oracle-row", "oracle-block"})
    names = {p.name for p in finished.figures}
    assert {"pooled-recall-density.png", "density-needed.png", "winners.png", "stripes-against-blocks.png"} <= names
    assert {f"{p}-layer0{i}-recall-density.png" for p in ("story", "code") for i in (2, 7)} <= names
    for path in finished.figures:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_loading_gives_the_same(finished):
    again = load_comparison(finished.path)
    assert again.points == finished.points
    assert again.report == finished.report
    assert set(again.figures) == set(finished.figures)


def test_without_values(tmp_path):
    write(tmp_path / "d", values=False, layers=(0,))
    result = compare(tmp_path / "d", tmp_path / "o", lineup=line_up("streaming"), figures=False)
    assert all(math.isnan(p.output_error) for p in result.points)
    text = (tmp_path / "o" / "methods.csv").read_text()
    assert text.splitlines()[1].split(",")[COLUMNS.index("output_error")] == ""
    again = load_comparison(tmp_path / "o")
    assert all(math.isnan(p.output_error) for p in again.points)


@pytest.mark.parametrize(
    "change",
    [
        {"dump": "another"},
        {"points": []},
        {"points": [["story"]]},
        {"points": None},
    ],
)
def test_a_whole_part_that_does_not_fit_is_measured_again(dump, tmp_path, change):
    options = {"lineup": line_up("power"), "layers": [2], "figures": False}
    result = compare(dump, tmp_path / "o", **options)
    before = files(result.path)
    part = min((result.path / "scores").iterdir())
    write_part(part, {**read_part(part), **change})
    if change != {"points": []}:
        with pytest.raises(DumpError, match="missing or damaged"):
            load_comparison(result.path)
    said = []
    compare(dump, tmp_path / "o", resume=True, notify=said.append, **options)
    assert files(result.path) == before
    assert len(said) == 1
    assert part.name in said[0]


def test_out_of_memory_is_one_sentence(dump, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise MemoryError

    monkeypatch.setattr(run_module, "score_lineup", fails)
    with pytest.raises(RunFailure, match="out of memory on cpu"):
        compare(dump, tmp_path / "o", lineup=line_up("power"))


def test_small_batches_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, D, generator=g) for _ in range(3))
    methods = line_up("anchor,block-topk,streaming", ["block-topk.block=16"])
    want = score_lineup(Head(q, k, scale=0.3), v, methods)
    monkeypatch.setattr(importlib.import_module("anchorscope.compare.score"), "BATCH_BYTES", 1)
    got = score_lineup(Head(q, k, scale=0.3), v, methods)
    for (_, _, a), (_, _, b) in zip(want, got, strict=True):
        assert a.pairs == b.pairs
        assert a.recall == pytest.approx(b.recall, abs=1e-6)
        assert a.output_error == pytest.approx(b.output_error, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_recall": 0.0}, "target recall"),
        ({"layers": [5]}, "no layer 5; it has 2,7"),
        ({"heads": [9]}, "no query head 9; it has 0-3"),
        ({"prompts": ["poem"]}, "no prompt 'poem'; it has story, code"),
        ({"lineup": []}, "at least one method"),
        ({"device": "tpu"}, "unknown"),
    ],
)
def test_bad_requests(dump, options, message):
    with pytest.raises(InputError, match=message):
        plan_compare(dump, **options)


# ------------------------------------------------------------------------------------------------------------------
# tables


def point(method, head, value, density, recall, cost=0.0):
    return Point("p", 0, head, method, "x", value, recall, recall, recall, density, 0.0, cost)


def test_density_at_recall_by_hand():
    """Between (0.1, 0.8) and (0.3, 0.9) recall 0.85 lies half way: 0.2, at a cost between 0.01 and 0.03."""
    curve = [(0.3, 0.9, 0.03), (0.1, 0.8, 0.01), (1.0, 1.0, 0.0)]
    assert density_at_recall(curve, 0.85).density == pytest.approx(0.2)
    assert density_at_recall(curve, 0.85).identify_cost == pytest.approx(0.02)
    assert density_at_recall(curve, 0.5) == Need(0.1, 0.01), "nothing is extrapolated below the sparsest point"
    assert density_at_recall(curve[:2], 0.95) == Need(None, None)
    assert density_at_recall([], 0.5) == Need(None, None)
    assert density_at_recall(curve, 0.9).density == pytest.approx(0.3)


def test_a_curve_that_dips_is_crossed_at_its_first_reach():
    assert density_at_recall([(0.1, 0.9, 0), (0.2, 0.7, 0), (0.4, 0.95, 0)], 0.8).density == 0.1


def test_shared_and_own_settings_by_hand():
    """Two heads: at x=1 recalls 1.0 and 0.6 for 0.1 and 0.3; at x=2 both 1.0 for 0.5 and 0.5.

    Shared, 0.9: means (0.2, 0.8) and (0.5, 1.0): half way, 0.35. Own: 0.1, and 0.3 + 0.75 * 0.2 = 0.45: mean 0.275.
    """
    points = [
        point("m", 0, 1, 0.1, 1.0),
        point("m", 0, 2, 0.5, 1.0),
        point("m", 1, 1, 0.3, 0.6),
        point("m", 1, 2, 0.5, 1),
    ]
    assert shared_need(points, "m", 0.9).density == pytest.approx(0.35)
    assert per_head_need(points, "m", 0.9).density == pytest.approx(0.275)
    assert per_head_need(points[:3], "m", 0.9).density is None, "one head never reaches it"


def test_winners_by_hand():
    points = [
        point("a", 0, 1, 0.2, 1.0),
        point("b", 0, 1, 0.1, 1.0),
        point("a", 1, 1, 0.1, 1.0),
        point("b", 1, 1, 0.1, 1.0),
    ]
    points += [point("a", 2, 1, 0.1, 0.5), point("b", 2, 1, 0.1, 0.5)]
    best = winners(points, ["a", "b"], 0.95)
    assert [best["p", 0, h] for h in range(3)] == ["b", "a", None]


def test_figures_of_a_large_grid_and_of_nothing_reached(tmp_path):
    """Two layers of 37 heads, more than one figure shows, a method that never reaches the target, names that need
    care.
    """
    methods = [
        {"label": label, "method": label, "settings": {}, "oracle": oracle, "granularity": kind}
        for label, oracle, kind in (("a", False, "stripe"), ("b$_x", False, "block"), ("o", True, "stripe"))
    ]
    points = [
        Point("$p\n", layer, head, m["label"], "x", x, r, r, r, d, 0.0, 0.0)
        for layer in range(2)
        for head in range(37)
        for m in methods
        for x, d, r in ((1, 0.1, 0.5), (2, 0.5, 0.9))
    ]
    report = {"settings": {"methods": methods, "target_recall": 0.99}, "dump": {}}
    drawn = draw_all(points, tmp_path / "f", report)
    assert len(drawn) == 4 + 2
    assert all(p.stat().st_size > 5000 for p in drawn)


# ----------------------------------------------------------------------------------------------------------------
# line-ups


def test_default_line_up_holds_everything():
    labels = [c.label for c in line_up()]
    assert {"anchor-128x16", "anchor-64x4", "oracle-stripe-64x4"} <= set(labels)
    assert {c.method.name for c in line_up()} == set(METHODS)
    assert len(labels) == len(set(labels))
    for c in line_up():
        assert len(c.sweep) >= 8


def test_settings_and_labels():
    (a,) = line_up("anchor", ["anchor.block=32,anchor.step=2,anchor.theta=4/8/12"])
    assert (a.label, a.method.block, a.method.step, a.sweep) == ("anchor", 32, 2, (4.0, 8.0, 12.0))
    (b,) = line_up("streaming", ["streaming.window=64:256:64"])
    assert b.sweep == (64, 128, 192, 256)
    c = line_up("anchor", ["anchor.block=32", "power.block=16"], ["mine", "p"])
    assert [x.label for x in c] == ["anchor-128x16", "anchor-64x4", "mine", "p"]
    assert c[2].method.block == 32
    d = line_up("anchor", ["anchor.block=32,anchor.step=2"], ["anchor-64x4"])
    assert [(x.label, x.method.block) for x in d] == [("anchor-128x16", 128), ("anchor-64x4", 32)]
    (e,) = line_up("anchor", ["anchor.theta=-inf/inf,anchor.block=8"])
    assert e.sweep == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sparse",), "method 'sparse' is unknown"),
        (("anchor,",), "empty element"),
        (("anchor", ["block=3"]), "malformed"),
        (("anchor", ["anchor.block"]), "malformed"),
        (("anchor", ["anker.block=3"]), r"method 'anker' is unknown \(did you mean anchor\?\)"),
        (("anchor", ["anchor.blok=3"]), r"parameter 'blok' is unknown \(did you mean block\?\); use theta, block"),
        (("anchor", ["anchor.block=x"]), "'x' is not a number"),
        (("anchor", ["anchor.block=nan"]), "must be a number"),
        (("anchor", ["anchor.block=2.5"]), "whole number"),
        (("anchor", ["anchor.block=0"]), "at least 1"),
        (("anchor", ["anchor.block=8/16"]), "only the swept parameter theta"),
        (("anchor", ["anchor.block=8", "anchor.step=2"]), "twice"),
        (("anchor", ["anchor.block=8,anchor.block=9"]), "twice"),
        (("anchor", ["anchor.block=8", "anchor.step=2"], ["a"]), "2 --set and 1 --as"),
        (("anchor", ["anchor.block=8,power.block=2"], ["a"]), "several methods"),
        (("anchor", ["anchor.block=8", "anchor.step=2"], ["a", "a"]), "same label"),
        (("anchor", ["anchor.block=8"], ["a,b"]), "no comma"),
        (("flexprefill", ["flexprefill.gamma=1.5"]), "above 0 and at most 1"),
        (("xattention", ["xattention.block=100"]), "multiple of"),
        (("streaming", ["streaming.window=9:3:1"]), "backwards"),
    ],
)
def test_bad_line_ups(arguments, message):
    with pytest.raises(InputError, match=message):
        line_up(*arguments)


# ---------------------------------------------------------------------------------------------------- somebody's own
# method

DOCS = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def block_of(language: str) -> str:
    """The code that docs/adding-a-method.md shows."""
    found = re.search(rf"^( *)```{language}\n(.*?)^ *```$", DOCS, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(found[2])


PACKAGE = block_of("python")
POINTS = block_of("toml").replace("project.entry-points.", "").replace('"', "")


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """A throw-away distribution made from the page on adding a method, as pip would lay it out."""

    def install(target, source=PACKAGE, module="every_other"):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(POINTS.replace("every_other:EveryOther", target))
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    sys.modules.pop("every_other", None)


def test_a_third_party_method_takes_part(plugged, dump, tmp_path):
    plugged("every_other:EveryOther")
    assert "every-other" in known_methods()
    assert find_method("every-other").__name__ == "EveryOther"
    result = compare(dump, tmp_path / "o", lineup=line_up("anchor,every-other"), figures=False)
    mine = [p for p in result.points if p.method == "every-other"]
    assert len(mine) == 16 * 8
    assert all(p.recall == pytest.approx(1.0, abs=1e-6) for p in mine if p.value == 1)
    # Worked out: blocks of 16 over 150 tokens, stride 8: column blocks 0 and 8, and the diagonal.
    kept = sum(1 for i in range(N) for j in range(i + 1) if (j // 16) % 8 == 0 or j // 16 == i // 16)
    assert {p.density for p in mine if p.value == 8} == {kept / (N * (N + 1) // 2)}


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        ("every_other:Missing", PACKAGE, "cannot be loaded"),
        ("every_other:torch", PACKAGE, "is no Method"),
        ("every_other:EveryOther", PACKAGE.replace('"every-other"', '"anchor"'), "two methods are called anchor"),
        ("every_other:EveryOther", PACKAGE.replace('= "block"', '= "lump"'), "granularity"),
        ("every_other:EveryOther", PACKAGE.replace('= "stride"', '= "strike"'), "parameter"),
    ],
)
def test_a_broken_third_party_method_is_named(plugged, target, source, message):
    plugged(target, source)
    with pytest.raises(InputError, match=message):
        known_methods()


# ---------------------------------------------------------------------------------------------------------------------
# CLI


def invoke(*arguments):
    import typer

    from anchorscope.cli.compare import compare as command

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_table_fits_80_columns(dump, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke(
        dump, "--out", tmp_path / "o", "--layers", "2", "--heads", "0,1", "--prompts", "code", "--no-figures"
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, [x for x in lines if str(tmp_path) not in x])) <= 80
    for c in line_up():
        assert any(c.label in line for line in lines), c.label
    report = json.loads((tmp_path / "o" / "compare.json").read_text())
    need = {x["method"]: x["needed"] for x in report["needed"]["shared"]}["oracle-row"]
    row = next(line for line in lines if "oracle-row" in line)
    assert f"{need[0]['density']:.3f}" in row


def test_steep_heads_are_reached_by_the_sweeps_shown_by_default(tmp_path, monkeypatch):
    """Their anchors need a theta beyond 14, where sweeps ended before. Sweeps that a user names end where they end."""
    monkeypatch.setenv("COLUMNS", "80")
    g = torch.Generator().manual_seed(5)
    keys = torch.nn.functional.normalize(torch.randn(600, 16, generator=g), dim=1)
    q = torch.stack([strength * keys[torch.randint(0, 600, (600,), generator=g)] for strength in (10.0, 60.0)])
    v = torch.randn(1, 600, 16, generator=g)
    write_dump(tmp_path / "d", [{"prompt": "p", "layer": 0, "q": q, "k": keys[None], "v": v, "scale": 1.0}])
    anchor = "anchor.block=8,anchor.step=2"
    released = "anchor-released.block=8,anchor-released.step=2"

    def table(*options):
        out = tmp_path / f"o{len(list(tmp_path.iterdir()))}"
        result = invoke(tmp_path / "d", "--out", out, "--no-figures", *options)
        assert result.exit_code == 0, result.output
        body = result.stdout[: result.stdout.index("shared: one setting")]
        said = " ".join(result.stdout.split())
        rows = {line.split()[0]: line.split()[1:] for line in body.splitlines() if line.strip()}
        return rows, said, json.loads((out / "compare.json").read_text())

    rows, said, report = table("--set", anchor, "--set", released, "--target-recall", "1")
    for m in report["settings"]["methods"]:
        assert m["end"] == ("most" if m["method"] == "anchor-released" else "dense")
        cells = rows[m["label"]]
        assert ("cannot" in cells) == (m["method"] == "anchor-released")
        assert "-" not in cells[:6], m["label"]
    most = {x["method"]: x for x in report["needed"]["largest"]}
    assert most["anchor"]["mean"] == most["anchor"]["hardest_head"] == {"recall": 1.0, "density": 1.0}
    assert 0.9 < most["anchor-released"]["hardest_head"]["recall"] < 1
    assert "anchor-released cannot reach every recall: largest mean recall 0.9" in said
    assert "the block of keys before each group is never attended." in said

    rows, said, report = table("--methods", "power", "--set", anchor + ",anchor.theta=4:14:2", "--as", "short")
    assert rows["short"][:6] == ["-"] * 6
    assert "-" not in rows["power"]
    least = next(x for x in report["needed"]["largest"] if x["method"] == "short")["hardest_head"]
    points = [p for p in load_comparison(tmp_path / "o2").points if (p.method, p.head) == ("short", 1)]
    best = max(points, key=lambda p: p.recall)
    assert (best.value, best.recall, best.density) == (14.0, least["recall"], least["density"])
    assert best.recall < 0.9
    assert f"of its hardest head recall {best.recall:.3f} at density {best.density:.3f}." in said


def test_prompts_of_different_lengths_share_their_values(tmp_path):
    g = torch.Generator().manual_seed(5)
    entries = [
        {
            "prompt": name,
            "layer": 0,
            "q": torch.randn(1, n, 8, generator=g),
            "k": torch.randn(1, n, 8, generator=g),
            "scale": 0.3,
        }
        for name, n in (("short", 90), ("long", 300))
    ]
    write_dump(tmp_path / "d", entries)
    result = compare(tmp_path / "d", tmp_path / "o", lineup=line_up("streaming,block-topk,anchor"), figures=False)
    for method in result.report["settings"]["methods"]:
        for prompt in ("short", "long"):
            mine = [p for p in result.points if (p.method, p.prompt) == (method["label"], prompt)]
            assert [p.value for p in mine] == [float(x) for x in method["values"]]
            assert (mine[-1].recall, mine[-1].density) == (1.0, 1.0)
    assert result.report["settings"]["methods"][0]["values"] == [128.0, 256.0, 300.0]


def test_json_prints_the_report_alone(dump, tmp_path):
    result = invoke(dump, "--out", tmp_path / "o", "--methods", "power", "--layers", "2", "--no-figures", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "o" / "compare.json").read_text())


def test_list_names_every_setting():
    text = invoke("--list").stdout
    assert "anchor  (Zhang et al." in text
    assert "  * anchor.theta=12  " in text
    assert "    anchor.block=128  " in text


def test_set_and_as(dump, tmp_path):
    options = ["--methods", "power", "--set", "anchor.block=8,anchor.step=2", "--as", "tiny", "--no-figures", "--json"]
    result = invoke(dump, "--out", tmp_path / "o", "--layers", "2", *options)
    assert [m["label"] for m in json.loads(result.stdout)["settings"]["methods"]] == ["power", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a dump"),
        (["DUMP"], "needs a dump"),
        (["DUMP", "--out", "OUT", "--methods", "best"], "method 'best' is unknown"),
        (["DUMP", "--out", "OUT", "--layers", "9"], "--layers: 9 does not exist"),
        (["nowhere", "--out", "OUT"], "nowhere"),
    ],
)
def test_refusals_leave_nothing_behind(dump, tmp_path, arguments, message):
    here = {"DUMP": dump, "OUT": tmp_path / "o"}
    result = invoke(*(here.get(a, a) for a in arguments))
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "o").exists()
