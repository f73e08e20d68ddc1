"""`heads` end to end: files, columns, resume, refusals, what a head is compared with, tokens as text, figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import threading
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from anchorscope.cli.heads import heads as command
from anchorscope.dumps import open_dump, write_dump
from anchorscope.errors import AnchorScopeError, DumpError, InputError, RunFailure
from anchorscope.files import read_part, write_part
from anchorscope.heads import diagnose, diagnose_head, head_stripes, load_diagnosis, overlap, plan_heads
from anchorscope.heads import rows as rows_module
from anchorscope.heads import run as run_module
from anchorscope.heads.figures import class_map, draw_all, metric_maps
from anchorscope.heads.tables import COLUMNS, METRICS, HeadRow, TokenText, by_token, places
from anchorscope.methods import Head
from anchorscope.params import AnchorParams
from anchorscope.runs.values import number
from anchorscope.tokens import token_texts

N, D = 360, 8
PARAMS = AnchorParams(16, 2)
THETA = 3.0
SAMPLE = Path(__file__).parents[2] / "samples" / "smollm2-4k"


def write(path):
    g = torch.Generator().manual_seed(1)
    entries = []
    for prompt in ("story", "code"):
        for layer in (2, 7, 9):
            q, k = (torch.randn(h, N, D, generator=g) for h in (4, 2))
            k[:, :3] += 1
            k[:, 40::31] += 1
            q += 0.5
            entries.append({"prompt": prompt, "layer": layer, "q": q, "k": k, "scale": 0.6, "window": None})
    entries[1]["window"] = 200
    ids = {"token_ids": [i % 7 for i in range(N)]}
    write_dump(path, entries, prompts={"story": ids})


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "d"
    write(path)
    return path


@pytest.fixture(scope="module")
def finished(dump, tmp_path_factory):
    return diagnose(dump, tmp_path_factory.mktemp("out") / "o", params=PARAMS, theta=THETA)


def files(path):
    found = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name[0] != ".")
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def read_table(path):
    with (path / "diagnostics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_holds_every_head_and_metric(dump, finished):
    rows = read_table(finished.path)
    assert tuple(rows[0]) == COLUMNS
    wanted = [(p, layer, h) for p in ("story", "code") for layer in (2, 7, 9) for h in range(4)]
    assert [(r["prompt"], int(r["layer"]), int(r["head"])) for r in rows] == wanted
    source = open_dump(dump)
    row = next(r for r in rows if (r["prompt"], r["layer"], r["head"]) == ("story", "7", "3"))
    entry = source.entry("story", 7)
    tensors = source.load(entry)
    made = [
        Head(tensors.q[h], tensors.k[h // 2], scale=entry.scale, window=entry.window, softcap=entry.softcap)
        for h in range(4)
    ]
    want = diagnose_head(made[3])
    assert row["kv_head"] == "1"
    assert row["class"] == want.kind
    assert int(row["hidden_sinks"]) == len(want.hidden_sinks)
    for name in METRICS:
        if hasattr(want, name):
            assert row[name] == number(getattr(want, name)), name
    mine, sibling = (head_stripes(made[h], PARAMS, THETA) for h in (3, 2))
    first = source.load(source.entry("story", 2))
    before = head_stripes(Head(first.q[3], first.k[1], scale=0.6), PARAMS, THETA)
    assert 0 < mine.density < 1
    assert row["stripe_density"] == number(mine.density)
    assert row["overlap_groups"] == number(overlap(mine, mine, shift=1))
    assert row["overlap_heads"] == number(overlap(mine, sibling))
    assert row["overlap_layer"] == number(overlap(mine, before))
    assert row["previous_layer"] == "2"
    assert {r["overlap_layer"] for r in rows if r["layer"] == "2"} == {""}


def test_stripe_tokens_are_the_stripes_with_most_far_mass(dump, finished):
    source = open_dump(dump)
    tensors = source.load(source.entry("code", 9))
    head = Head(tensors.q[1], tensors.k[0], scale=0.6)
    stripes, far = head_stripes(head, PARAMS, THETA), diagnose_head(head).far_mass
    selected, candidate = stripes.chosen()
    want = sorted((j for j in range(N) if selected[j] and far[j] > 0), key=lambda j: (-far[j], j))[:12]
    row = next(r for r in finished.rows if (r.prompt, r.layer, r.head) == ("code", 9, 1))
    assert [t[0] for t in row.stripe_tokens] == want
    assert len(want) > 5
    for j, mass, groups, of in row.stripe_tokens:
        assert (groups, of) == (selected[j], candidate[j])
        assert mass == pytest.approx(far[j] / N)


def test_report_says_what_it_is(dump, finished):
    report = json.loads((finished.path / "heads.json").read_text(encoding="utf-8"))
    assert report == finished.report
    assert report["dump"]["identity"] == open_dump(dump).identity
    assert report["settings"]["block"] == 16
    assert report["settings"]["theta"] == THETA
    assert {"anchorscope", "torch", "python"} <= set(report["versions"])
    every = report["summary"]["all"]
    assert every["heads"] == 24 == sum(every["classes"].values())
    story = next(p for p in report["summary"]["prompts"] if p["prompt"] == "story")
    mine = [r.sink_4 for r in finished.rows if r.prompt == "story"]
    assert story["means"]["sink_4"] == pytest.approx(sum(mine) / len(mine))
    # Ids where the dump has them, positions alone where not.
    tokens = {h["prompt"]: h["influential"] + h["stripe_tokens"] for h in report["heads"]}
    assert all(t["token_id"] == t["position"] % 7 for t in tokens["story"])
    assert not any("token_id" in t or "token" in t for t in tokens["code"])
    assert tokens["code"]


def test_tokens_as_text(dump, tmp_path):
    pieces = list("abcdef")  # id 6 is beyond the vocabulary
    out = diagnose(dump, tmp_path / "o", params=PARAMS, theta=THETA, layers=[2], pieces=pieces, figures=False)
    names = token_texts(range(7), pieces)
    found = [t for h in out.report["heads"] if h["prompt"] == "story" for t in h["stripe_tokens"]]
    assert found
    for t in found:
        j = t["position"]
        assert t["token"] == names[j % 7]
        before = "".join(names[i % 7] for i in range(j))[-24:]
        after = "".join(names[i % 7] for i in range(j + 1, N))[:24]
        assert t["context"] == [before, after]


def test_the_words_of_the_dump_are_shown_and_a_tokenizer_wins_over_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, N, D, generator=g), torch.randn(1, N, D, generator=g)
    k[:, 40::31] += 2
    entry = {"prompt": "story", "layer": 2, "q": q + 0.5, "k": k, "scale": 0.6}
    ids = {"story": {"token_ids": [i % 7 for i in range(N)]}}
    texts = {0: " the", 1: b"\xc3", 2: b"\xa9", 3: "\n", 4: "\x1b[31m", 5: "=1"}
    write_dump(tmp_path / "d", [entry], prompts=ids, token_texts=texts)
    how = {"params": PARAMS, "theta": THETA, "figures": False}
    plain = diagnose(tmp_path / "d", tmp_path / "o", **how)
    found = [t for h in plain.report["heads"] for t in h["stripe_tokens"]]
    names = [" the", "<0xC3>", "<0xA9>", "\n", "\x1b[31m", "=1", "#6 "]
    assert {t["token"] for t in found} <= set(names)
    assert all(t["token"] == names[t["token_id"]] for t in found)
    whole = "".join([" the", "\u00e9", "\n", "\x1b[31m", "=1", "#6 "] * 60)
    assert all(t["context"][0] in whole for t in found if t["token_id"] not in (2,)), "bytes make characters"
    cells = [r["stripe_tokens"] for r in read_table(tmp_path / "o")]
    assert all(cell.isprintable() for cell in cells)
    assert any("' the'" in cell for cell in cells)
    named = diagnose(tmp_path / "d", tmp_path / "p", pieces=list("abcdefg"), **how)
    assert {t["token"] for h in named.report["heads"] for t in h["stripe_tokens"]} <= set("abcdefg")
    result = invoke(tmp_path / "d", "--out", tmp_path / "q", "--block", "16", "--step", "2", "--theta", "3")
    assert result.exit_code == 0, result.output
    assert "keeps  '" in result.stdout
    assert "\x1b" not in result.stdout


def test_token_text_at_the_edges():
    text = TokenText([0, 1, 2], ["x", "", "z"])
    (unknown,) = token_texts([1])
    assert text.at(0) == {"token_id": 0, "token": "x", "context": ["", f"{unknown}z"]}
    assert text.at(2) == {"token_id": 2, "token": "z", "context": [f"x{unknown}", ""]}
    assert text.at(3) == {}
    assert TokenText().at(0) == {}


def test_what_a_head_is_compared_with_does_not_depend_on_the_choice(dump, finished, tmp_path):
    """One head of one layer: its sibling and the previous layer are fetched for it."""
    part = diagnose(
        dump, tmp_path / "o", params=PARAMS, theta=THETA, layers=[9], heads=[2], prompts=["code"], figures=False
    )
    (row,) = part.rows
    want = next(r for r in finished.rows if (r.prompt, r.layer, r.head) == ("code", 9, 2))
    assert row == want
    assert not math.isnan(row.overlap_layer)
    assert not math.isnan(row.overlap_heads)


def test_layers_with_other_heads(tmp_path):
    """A head that the previous captured layer lacks, and kv heads with one query head each."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 80, 4, generator=g)
    same = {"prompt": "p", "k": x, "q": x, "scale": 1.0}
    write_dump(
        tmp_path / "d",
        [
            {**same, "layer": 1, "query_heads": [0, 1], "kv_heads": [0, 1]},
            {**same, "layer": 2, "query_heads": [4, 5], "kv_heads": [4, 5]},
            {**same, "layer": 5, "query_heads": [1, 4], "kv_heads": [1, 4]},
        ],
    )
    out = diagnose(tmp_path / "d", tmp_path / "o", params=AnchorParams(4, 2), theta=2.0)
    assert [r.previous_layer for r in out.rows] == [None, None, None, None, None, 2]
    assert out.rows[5].overlap_layer >= 0
    assert all(math.isnan(r.overlap_heads) for r in out.rows)
    assert all(math.isnan(r.overlap_layer) for r in out.rows[:5])
    assert {r.kind for r in out.rows} == {""}
    assert out.report["summary"]["all"]["unclassified"] == 6
    assert len(out.figures) == 4


def test_a_run_that_continues_selects_the_layer_before_again(dump, finished, tmp_path, monkeypatch):
    """Stopped after layer 2 of the first prompt, whose stripes layer 7 is compared with."""
    rows, real = [], rows_module._row

    def stops(layer, *rest):
        rows.append(layer)
        if len(rows) == 5:
            raise KeyboardInterrupt
        return real(layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rows_module, "_row", stops)
        with pytest.raises(KeyboardInterrupt):
            diagnose(dump, tmp_path / "o", params=PARAMS, theta=THETA, figures=False)
    assert [p.name for p in (tmp_path / "o" / "parts").iterdir()] == ["prompt00-layer002.json"]
    diagnose(dump, tmp_path / "o", params=PARAMS, theta=THETA, figures=False)
    assert (tmp_path / "o" / "diagnostics.csv").read_bytes() == (finished.path / "diagnostics.csv").read_bytes()


@pytest.mark.parametrize("change", [{"dump": "another"}, {"heads": []}, {"heads": "text"}, "head"])
def test_a_whole_part_that_does_not_fit_is_measured_again(dump, tmp_path, change):
    how = {"params": PARAMS, "theta": THETA, "prompts": ["code"], "figures": False}
    out = diagnose(dump, tmp_path / "o", **how).path
    want = files(out)
    part = sorted((out / "parts").iterdir())[1]
    saved = read_part(part)
    if change == "head":
        change = {"heads": [{**saved["heads"][0], "sink_4": "text"}, *saved["heads"][1:]]}
    write_part(part, {**saved, **change})
    said = []
    diagnose(dump, out, resume=True, notify=said.append, **how)
    assert files(out) == want
    assert len(said) == 1
    assert "1 part is measured again" in said[0]
    assert part.name in said[0]


def test_workers_change_nothing(dump, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before = threading.active_count()
    out = diagnose(dump, tmp_path / "o", params=PARAMS, theta=THETA, figures=False)
    assert threading.active_count() == before
    assert (out.path / "diagnostics.csv").read_bytes() == (finished.path / "diagnostics.csv").read_bytes()


def test_progress_ends_at_its_total(dump, tmp_path):
    seen = []
    diagnose(dump, tmp_path / "o", params=PARAMS, theta=THETA, layers=[7], heads=[0], progress=seen.append)
    work = [e.work for e in seen if e.stage == "heads"]
    assert work == sorted(work)
    assert work[-1] == seen[0].total > 0
    assert {e.stage for e in seen} == {"heads", "figures"}


def test_load_again(finished, tmp_path):
    again = load_diagnosis(finished.path)
    assert again.report == finished.report
    assert [vars(r) for r in again.rows if r.layer == 9] == [vars(r) for r in finished.rows if r.layer == 9]
    assert again.figures == tuple(sorted(finished.figures))
    with pytest.raises(DumpError, match="no finished diagnosis of heads"):
        load_diagnosis(tmp_path)


def test_refusals(dump, tmp_path):
    with pytest.raises(InputError, match="no layer 3"):
        plan_heads(dump, layers=[3])
    with pytest.raises(InputError, match="NaN"):
        plan_heads(dump, theta=math.nan)
    with pytest.raises(DumpError):
        plan_heads(tmp_path)


def test_out_of_memory_is_one_sentence(dump, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(run_module, "diagnose_head", fails)
    with pytest.raises(RunFailure, match="out of memory on cpu: a head of 360 tokens"):
        diagnose(dump, tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------------
# figures


def synthetic(layers, heads, prompt="p", kind=None):
    g = torch.Generator().manual_seed(5)
    out = []
    for layer in range(layers):
        for head in range(heads):
            values = dict(zip(METRICS, torch.rand(len(METRICS), generator=g).tolist(), strict=True))
            values |= {"distance_1024": 1000 * values["distance"], "effective_keys_median": 1 + 99 * values["sink_1"]}
            names = ("streaming", "mixed", "retrieval")
            row = {
                **values,
                "prompt": prompt,
                "layer": layer,
                "head": head,
                "kv_head": head // 4,
                "kind": names[(layer + head) % 3] if kind is None else kind,
                "hidden_sinks": (),
                "influential": (),
                "stripe_tokens": (),
                "previous_layer": None,
            }
            if layer == 0:
                row["overlap_layer"] = math.nan
            out.append(HeadRow(**row))
    return out


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 3), (32, 32)])
def test_figures_of_any_size(tmp_path, layers, heads):
    drawn = draw_all(synthetic(layers, heads, "$odd\n"), tmp_path / "f")
    assert [p.name.split("-")[1] for p in drawn] == ["classes.png", "attention.png", "shapes.png", "persistence.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)


def test_class_map_shows_the_classes():
    rows = synthetic(3, 3)
    figure = class_map(rows)
    image = figure.axes[0].images[0].get_array()
    colors = {tuple(image[r.layer, r.head]): r.kind for r in rows}
    assert len(colors) == 3
    assert all(colors[tuple(image[r.layer, r.head])] == r.kind for r in rows)
    letters = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}
    assert letters == {(r.layer, r.head): r.kind[0].upper() for r in rows}


def test_maps_leave_what_does_not_apply_grey():
    from anchorscope.heads.figures import PERSISTENCE

    rows = [dataclasses.replace(r, kind="") for r in synthetic(2, 3)][:5]
    image = metric_maps(rows, PERSISTENCE, "t", "s").axes[2].images[0].get_array()
    assert (image[0] == image[0, 0]).all()
    assert (image[1, 2] == image[0, 0]).all()  # a head that is missing
    assert not (image[1, 0] == image[0, 0]).all()
    with pytest.raises(InputError, match="one prompt"):
        class_map([*rows, *synthetic(1, 1, "q")])
    with pytest.raises(InputError, match="one prompt"):
        class_map([])
    with pytest.raises(InputError, match="no metrics"):
        metric_maps(rows, (), "t", "s")


# ----------------------------------------------------------------------------------------------------------------
# command line


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_on_a_layer_of_the_sample(tmp_path):
    result = invoke(SAMPLE, "--out", tmp_path / "o", "--layers", "15", "--no-figures")
    assert result.exit_code == 0, result.output
    assert max(len(x) for x in result.stdout.splitlines() if str(tmp_path) not in x) <= 80
    assert "prose: 1 streaming, 1 mixed, 1 retrieval" in result.stdout
    rows = read_table(tmp_path / "o")
    assert [r["class"] for r in rows] == ["retrieval", "streaming", "mixed"]
    # The first token is this layer's sink; no sink further in.
    assert all(float(r["sink_1"]) > 0.4 for r in rows)
    assert all(r["hidden_sinks"] == "0" for r in rows)
    assert {r["previous_layer"] for r in rows} == {"5"}
    assert re.search(r"keeps  '[^']+' \d", result.stdout), "words, which the dump holds, and no ids"


def test_json_and_many_heads(dump, tmp_path):
    arguments = (dump, "--out", tmp_path / "o", "--block", "16", "--step", "2", "--theta", "3", "--no-figures")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "anchorscope-heads"
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    result = invoke(*arguments, "--overwrite", "--prompts", "story")
    assert "story: " in result.stdout
    assert re.search(r"#\d", result.stdout), "token ids"


def test_tokens_in_the_terminal_are_gathered_by_text():
    many = [{"position": j, "token_id": 4, "token": " a"} for j in range(9, 15)]
    assert by_token([*many, {"position": 3, "token_id": 5, "token": "\n"}]) == {"' a'": [*range(9, 15)], "'\\n'": [3]}
    assert places(range(9, 15)) == "9,10,11,12,+2"
    assert by_token([{"position": 7, "token_id": 4}, {"position": 8, "token_id": 4}]) == {"#4": [7, 8]}
    assert by_token([{"position": 7}, {"position": 8}]) == {"": [7, 8]}


def test_ids_stand_beside_words_that_do_not_tell_tokens_apart():
    same = [{"position": j, "token_id": j % 2, "token": "a"} for j in range(3)]
    assert by_token(same) == {"'a' #0": [0, 2], "'a' #1": [1]}
    assert by_token([{"position": 4, "token_id": 9, "token": "#9 "}]) == {"#9": [4]}, "an id without text"


@pytest.mark.parametrize("text", ["\x1b[31mred", "\u202egnol", "a\rb", "\u2066x", "\x00", "\u200b"])
def test_what_a_token_says_cannot_move_or_hide_anything(text):
    (name,) = by_token([{"position": 4, "token_id": 9, "token": text}])
    assert name.isprintable()
    assert "\\" in name


def test_more_heads_than_rows_are_summed_up_by_layer(tmp_path):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(16, 330, 4, generator=g), torch.randn(4, 330, 4, generator=g)
    write_dump(tmp_path / "d", [{"prompt": "p" * 60, "layer": x, "q": q, "k": k, "scale": 0.5} for x in (0, 1)])
    result = invoke(tmp_path / "d", "--out", tmp_path / "o", "--no-figures")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(x) for x in lines if str(tmp_path) not in x) <= 80
    assert any("16/0/0" in x for x in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--theta", "6,8"), "lists 2 thetas"),
        (("--theta", "many"), "not a number"),
        (("--block", "0"), "--block 0 is out of range"),
        (("--layers", "3"), "does not exist"),
        (("--heads", "9"), "does not exist"),
        (("--prompts", "poem"), "no prompt 'poem'"),
        (("--device", "tpu"), "tpu"),
        (("--tokenizer", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_options(dump, tmp_path, options, message):
    result = invoke(dump, "--out", tmp_path / "o", *options)
    assert isinstance(result.exception, AnchorScopeError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "o").exists()


def test_overlap_across_a_gap_of_layers_says_so(dump, finished, capsys):
    """Layers 2, 7 and 9: nothing is consecutive, so the table and the figure name the layer compared with."""
    from anchorscope.cli.heads import print_summary
    from anchorscope.heads.figures import _gaps

    print_summary(finished)
    out = capsys.readouterr().out
    assert re.search(r"\d <2\b", out)
    assert re.search(r"\d <7\b", out)
    assert "says little" in out
    assert max(map(len, out.splitlines()[:20])) <= 80
    near = [{**h, "previous_layer": h["layer"] - 1} for h in finished.report["heads"]]
    print_summary(dataclasses.replace(finished, report={**finished.report, "heads": near}))
    assert "says little" not in capsys.readouterr().out, "no note to what the table does not show"
    rows = [r for r in finished.rows if r.prompt == "story"]
    assert _gaps(rows) == "  |  layers not consecutive: 7 with 2, 9 with 7"
    assert _gaps([dataclasses.replace(r, previous_layer=r.layer - 1) for r in rows]) == ""
    assert _gaps([dataclasses.replace(r, previous_layer=None) for r in rows]) == ""
