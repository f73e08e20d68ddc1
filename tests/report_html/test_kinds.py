"""Which folders a page is made from, what each adds, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from anchorscope.errors import DumpError, InputError
from anchorscope.profiles import HeadProfile
from anchorscope.report import html, kinds
from anchorscope.report.html import build_data, open_sources
from anchorscope.report.read import Kind

from .runs import floats, make_profiles, write_diagnostics, write_methods, write_run


def test_a_new_kind_of_folder_is_one_object(tmp_path, run, monkeypatch):
    """Everything a new kind needs: its files in words, and what the page gets."""

    def pack(tables, prompt):
        return {t.head_key(row): float(row["speed"]) for t in tables for row in t.of_prompt(prompt)} or None

    toy = Kind("toys", "toy", "toy run", "toy.csv", "toy.json", "toy-run", pack, needed=("speed",))
    for module in (kinds, html):
        monkeypatch.setattr(module, "KINDS", (*kinds.KINDS, toy))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "run.json").write_text('{"format": "toy-run"}')
    with pytest.raises(DumpError, match="unfinished toy run: give the same `anchorscope toy` command"):
        open_sources([run, folder])
    (folder / "toy.json").write_text("{}")
    (folder / "toy.csv").write_text("prompt,layer,head,speed\nprose,5,1,2.5\nother,5,1,9\n")
    assert build_data(open_sources([run, folder]))["sets"][0]["toys"] == {"5:1": 2.5}
    assert build_data(open_sources([run]))["sets"][0]["toys"] is None


def test_two_runs_and_two_prompts_are_four_sets(tmp_path):
    one = write_run(tmp_path / "a" / "out", make_profiles(prompts=("x", "y"), layers=1, heads=2))
    two = write_run(tmp_path / "b" / "out", make_profiles(prompts=("x", "z"), layers=1, heads=3, thetas=(5.0,)))
    data = build_data(open_sources([one, two, one]))
    assert [r["label"] for r in data["runs"]] == ["a/out", "b/out"]
    assert [(s["run"], s["prompt"], len(s["heads"])) for s in data["sets"]] == [
        (0, "x", 2),
        (0, "y", 2),
        (1, "x", 3),
        (1, "z", 3),
    ]
    assert data["runs"][1]["asked"] == [5.0]


def test_methods_and_diagnostics_join_by_prompt_and_head(tmp_path, run, profiles):
    methods = write_methods(tmp_path / "methods", profiles)
    extra = write_diagnostics(tmp_path / "heads", profiles)
    only = build_data(open_sources([run, methods, extra]))["sets"][0]
    assert only["methods"]["labels"] == ["rival", "oracle-x"]
    assert only["methods"]["oracles"] == [False, True]
    p = profiles[4]
    own = only["methods"]["heads"][f"{p.layer}:{p.head}"]
    points = floats(only["methods"]["points"]).reshape(-1, 2)
    start = 0
    for key, found in only["methods"]["heads"].items():
        if key == f"{p.layer}:{p.head}":
            break
        start += sum(n for _, n in found)
    count = own[0][1]
    every = max(1, p.curve_pairs.size // 8)
    density, recall = (x[::every] for x in p.curve())
    order = np.lexsort((1 - (1 - recall) / 2, density))
    expected = np.stack([density, 1 - (1 - recall) / 2], axis=1)[order]
    assert points[start : start + count] == pytest.approx(expected, rel=1e-4)
    assert only["diagnostics"]["columns"] == ["class", "sink_mass"]
    assert only["diagnostics"]["heads"]["5:1"] == ["retrieval", "0.1"]


def test_results_in_the_same_folder_are_found(tmp_path, profiles):
    folder = write_run(tmp_path / "run", profiles)
    write_methods(folder, profiles)
    write_diagnostics(folder, profiles)
    only = build_data(open_sources([folder]))["sets"][0]
    assert only["methods"] is not None
    assert only["diagnostics"] is not None


# ---- refusals --------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_finished_analysis(tmp_path, profiles):
    with pytest.raises(DumpError, match="does not exist"):
        open_sources([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DumpError, match="holds no result"):
        open_sources([tmp_path / "empty"])
    with pytest.raises(InputError, match="needs an analysis"):
        open_sources([write_methods(tmp_path / "m", profiles)])
    run = write_run(tmp_path / "run", profiles)
    with pytest.raises(InputError, match="none of the analyses used"):
        open_sources([run, write_methods(tmp_path / "other", profiles, identity="1" * 64)])
    (run / "report.json").unlink()
    with pytest.raises(DumpError, match="unfinished"):
        open_sources([run])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("report.json", "{", "truncated or not JSON"),
        ("report.json", "[]", "no result"),
        ("report.json", '{"format": "anchorscope-report"}', "dump must be given"),
        ("report.json", '{"format": "else"}', "no finished analysis"),
        ("analysis.json", '{"profiles": ["../x.safetensors"]}', "outside its folder"),
        ("analysis.json", '{"profiles": []}', "no finished analysis"),
        ("methods.csv", "prompt,layer,head\n", "no column 'method'"),
        ("methods.csv", "prompt,layer,head,method,recall,density\na,0\n", "line 2: 2 fields instead of 6"),
        ("methods.csv", "prompt,layer,head,method,recall,density\nprose,0,0,m,x,1\n", "recall 'x' is not a number"),
        ("methods.csv", "prompt,layer,head,method,recall,density\nprose,-1,0,m,1,1\n", "are not numbers"),
        ("diagnostics.csv", "", "no column 'prompt'"),
    ],
)
def test_damaged_files_are_named(tmp_path, profiles, file, text, message):
    run = write_run(tmp_path / "run", profiles[:1])
    (run / file).write_text(text)
    with pytest.raises(DumpError, match=message):
        build_data(open_sources([run]))


def test_a_damaged_profile_is_named(tmp_path, profiles):
    run = write_run(tmp_path / "run", profiles[:2])
    victim = sorted((run / "profile").iterdir())[1]
    data = bytearray(victim.read_bytes())
    data[-9] ^= 0x40
    victim.write_bytes(bytes(data))
    with pytest.raises(DumpError, match=re.escape(victim.name)):
        build_data(open_sources([run]))
    assert isinstance(HeadProfile.load(sorted((run / "profile").iterdir())[0]), HeadProfile)
