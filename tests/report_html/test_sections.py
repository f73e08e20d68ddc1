"""Folders that make a section of their own: what the page shows equals their files, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from anchorscope.bench.output import FOLDER as BENCH
from anchorscope.calibration.run import FOLDER as CALIBRATION
from anchorscope.errors import DumpError, InputError
from anchorscope.evaluation.run import FOLDER as EVALUATION
from anchorscope.report.evaluations import change
from anchorscope.report.glossary import GLOSSARY
from anchorscope.report.html import build_data, build_report, open_sources
from anchorscope.report.kinds import SECTIONS
from anchorscope.shown import share_text

from .results import calibrated, evaluated
from .runs import IDENTITY, make_profiles, write_diagnostics, write_methods, write_run
from .test_html import HOSTILE, parsed

FOLDERS = {"bench": BENCH, "calibration": CALIBRATION, "evaluation": EVALUATION}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("evaluation"))


def warnings(blocks) -> list[str]:
    return [text for b in blocks if b["kind"] == "remarks" and b["warning"] for text in b["texts"]]


def section(folder) -> list[dict]:
    """The blocks of the only section of a page of one folder."""
    (found,) = build_data(open_sources([folder]))["sections"]
    return found["blocks"]


def table(blocks, caption: str) -> list[dict[str, str]]:
    """The rows of the table whose caption begins so."""
    (found,) = [b for b in blocks if b["kind"] == "table" and b["caption"].startswith(caption)]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def cards(blocks) -> dict[str, str]:
    """The large numbers by name."""
    (found,) = [b for b in blocks if b["kind"] == "cards"]
    return {name: value for name, value, _ in found["items"]}


def grid(blocks, name: str) -> dict[tuple[str, str], list]:
    """The cells of a grid by the labels of row and column: [shade, text, full text, framed]."""
    (found,) = [g for b in blocks if b["kind"] == "grids" for g in b["choices"] if g["name"] == name]
    return {(found["rows"][r], found["columns"][c]): cell for r, c, *cell in found["cells"]}


@pytest.fixture
def edited():
    """Copies of a finished run with something else in its report; gone after the test, as no command wrote them."""
    with tempfile.TemporaryDirectory() as home:

        def edit(folder, name: str, change):
            to = Path(tempfile.mkdtemp(dir=home)) / folder.name
            shutil.copytree(folder, to)
            report = json.loads((to / name).read_text(encoding="utf-8"))
            change(report)
            (to / name).write_text(json.dumps(report), encoding="utf-8")
            return to

        yield edit


# ---- calibration -----------------------------------------------------------------------------------------------


def test_every_calibrated_head_is_shown_as_its_table_says(calibration):
    blocks = section(calibration)
    with open(calibration / "calibration.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    thetas, kept = grid(blocks, "theta, nats"), grid(blocks, "recall, held out")
    for row in rows:
        place = (row["layer"], row["head"])
        assert f"theta {row['theta']} nats, groups of 64 x 4" in thetas[place][2]
        recall = float(row["held_out_recall"])
        assert f"recall {share_text(recall, 4)}, held out" in kept[place][2]
        assert kept[place][0] == pytest.approx((recall - 0.5) / 0.5, abs=1e-4)
        assert kept[place][3] == (row["kept"] == "0")
    assert 0 < sum(cell[3] for cell in kept.values()) < 12


def test_what_a_calibration_promised_and_kept(calibration):
    blocks = section(calibration)
    report = json.loads((calibration / "calibration.json").read_text())
    shown = cards(blocks)
    assert shown["promised"] == "0.95"
    assert float(shown["kept on held-out prompts"]) == pytest.approx(report["promise"]["pooled"], abs=6e-4)
    assert float(shown["density, held out"]) == pytest.approx(report["held_out"]["density"], abs=6e-4)
    assert float(shown["density, fitted"]) == pytest.approx(report["fitted"]["density"], abs=6e-4)
    missed = report["promise"]["heads_missed"]
    assert shown["heads below the promise"] == f"{missed} of 12"
    listed = table(blocks, "Below the promised 0.95 on held-out prompts")
    assert len(listed) == missed > 0
    assert [float(r["mean recall"]) for r in listed] == sorted(float(r["mean recall"]) for r in listed)
    pooled = {r["all heads"]: r for r in table(blocks, "Recall and density")}
    for part in ("fitted", "held out"):
        worst = report[part.replace(" ", "_")]["worst_head"]
        assert f"(layer {worst['layer']}, head {worst['head']})" in pooled[part]["worst head"]
    rivals = {r["settings"]: r for r in table(blocks, "A theta for each head against one")}
    assert set(rivals) == {"calibrated", "equal slope", "one theta, same groups", "one theta, all 64x4"}
    uses = {r["prompt"]: r["used for"] for r in table(blocks, "Prompts")}
    assert uses == {"prose": "fitting", "code": "checking the promise (held out)"}


def test_what_nobody_checked_or_promised_is_not_shown_as_kept(tmp_path):
    alone = section(calibrated(tmp_path / "a", prompts=("prose",)))
    assert cards(alone)["kept on held-out prompts"] == "not checked"
    assert cards(alone)["heads below the promise"] == "-"
    assert any("no prompt is held out" in t for b in alone if b["kind"] == "remarks" for t in b["texts"])
    assert not any("held out" in c for r in table(alone, "Layer by layer") for c in r)
    budget = section(calibrated(tmp_path / "b", budget_density=0.4))
    assert cards(budget)["asked for"] == "density 0.400"
    assert "promised" not in cards(budget)
    assert not any(cell[3] for cell in grid(budget, "recall, held out").values())


def test_a_head_that_keeps_nearly_all_is_not_shown_as_all(calibration, edited):
    def alter(report):
        for h, x in zip(report["heads"], (0.9996, 1.0, 0.99999996), strict=False):
            h["held_out_recall"] = x

    blocks = section(edited(calibration, "calibration.json", alter))
    assert [cell[1] for cell in grid(blocks, "recall, held out").values()][:3] == ["0.9996", "all", ">0.9999999"]


# ---- evaluation ------------------------------------------------------------------------------------------------


def test_costs_are_shown_as_the_tables_of_an_evaluation_say(evaluation):
    blocks = section(evaluation)
    with open(evaluation / "prompts.csv", newline="") as file:
        saved = list(csv.DictReader(file))
    shown = table(blocks, "Prompts: perplexity")
    assert [(r["prompt"], r["arm"], r["tokens"]) for r in shown] == [
        (r["prompt"], r["arm"], r["length"]) for r in saved
    ]
    assert len(shown) == 4
    for r, s in zip(shown, saved, strict=True):
        percent, ends = r["change and 95%"].split("\n")
        ratio = float(s["perplexity_ratio"])
        assert float(percent.strip("%")) == pytest.approx(100 * (ratio - 1), rel=0.5, abs=0.006)
        for end, name in zip(ends.split(" to "), ("low", "high"), strict=True):
            wanted = 100 * (float(s[f"perplexity_ratio_{name}"]) - 1)
            assert float(end.strip("%")) == pytest.approx(wanted, rel=0.5, abs=0.006)
        assert float(r["recall"]) == pytest.approx(float(s["recall"]), abs=6e-4)
        assert float(r["density"]) == pytest.approx(float(s["density"]), abs=6e-4)
        kl, agreement = r["divergence, nats, and 95%"].split("\n")[0], r["top-1 agreement and 95%"].split("\n")[0]
        assert float(kl) == pytest.approx(float(s["kl_mean"]), rel=6e-3)
        assert float(agreement) == pytest.approx(float(s["top1_agreement"]), abs=6e-4)


def test_tasks_and_needles_are_shown_with_intervals(edited, evaluation):
    def alter(report):
        for i, x in enumerate(report["depths"]):
            x["score_sparse"], x["score_dense"] = (0.0, 0.5, 1.0)[i % 3], 0.5

    report = json.loads((evaluation / "evaluation.json").read_text())
    for t, r in zip(report["tasks"], table(section(evaluation), "Tasks:"), strict=True):
        assert (r["task"], r["arm"], r["tokens"], r["samples"]) == (t["task"], t["arm"], str(t["length"]), "2")
        low, high = t["intervals"]["score_sparse"]
        assert r["score, sparse, and 95%"] == f"{t['score_sparse']:.2f}\n{low:.2f} to {high:.2f}"
    copy = edited(evaluation, "evaluation.json", alter)
    depths = json.loads((copy / "evaluation.json").read_text())["depths"]
    assert len(depths) == 8
    for arm in ("all", "none"):
        cells = grid(section(copy), f"needle: {arm}")
        assert len(cells) == 4
        for x in (x for x in depths if x["arm"] == arm):
            shade, text, _, lost = cells[f"{x['depth']:g}", str(x["length"])]
            assert (shade, text) == {0.0: (0, "0"), 0.5: (0.5, "0.50"), 1.0: (1, "all")}[x["score_sparse"]]
            assert lost == (x["score_sparse"] < 0.5)
    assert {cell[1] for cell in grid(section(copy), "needle: dense").values()} == {"0.50"}


def test_what_speaks_against_an_evaluation_is_said(evaluation):
    said = warnings(section(evaluation))
    assert any("predicts the end of p" in text and "no better than chance" in text for text in said)
    assert any("times are a CPU's" in text for text in said)
    assert not any("ran dense" in text for text in said)


def test_layers_that_a_configuration_leaves_out_are_named(edited, evaluation):
    whole = json.loads((evaluation / "evaluation.json").read_text())["arms"][0]["coverage"]
    n = whole["heads"]
    part = {**whole, "sparse_heads": 5, "dense_heads": n - 5, "sparse_share": 5 / n, "unnamed": [1, 2]}
    copy = edited(evaluation, "evaluation.json", lambda r: r["arms"][0].update(coverage=part))
    said = f"all runs 5 of the model's {n} heads sparse ({round(500 / n)}%), naming 1 of 3 layers"
    assert any(said in t and "partly sparse model" in t for t in warnings(section(copy)))
    (ran, *_) = table(section(copy), "What ran")
    assert (ran["layers named"], ran["sparse heads"]) == ("3 of 3", f"5 of {n}")
    assert sum("partly sparse" in t or "layers are calibrated" in t for t in summary(copy)[1]) == 1, "said once on top"


def test_evaluations_of_before_say_it_by_their_layers(edited, evaluation):
    copy = edited(
        evaluation, "evaluation.json", lambda r: (r["arms"][0].pop("coverage"), r["arms"][0].update(layers=1))
    )
    assert any("all runs 1 of the model's 3 layers sparse; the rest runs dense" in t for t in warnings(section(copy)))


@pytest.mark.parametrize("ratio", [1.0, 1 + 1e-9, 1 - 1e-6, 1.08411, 0.97])
def test_a_change_of_perplexity_is_only_zero_where_it_is(ratio):
    text = change(ratio)
    assert (float(text.strip("%")) == 0) == (ratio == 1)
    assert float(text.strip("%")) == pytest.approx(100 * (ratio - 1), rel=0.5, abs=0.005)


# ---- bench -----------------------------------------------------------------------------------------------------


def test_speedups_are_shown_as_the_bench_says(bench):
    blocks, report = section(bench), json.loads((bench / "bench.json").read_text())
    shown = table(blocks, "Speed-up")
    rows = [(row, s) for row in report["rows"] for s in row["sparse"]]
    assert len(shown) == len(rows) == 4
    for r, (row, s) in zip(shown, rows, strict=True):
        base = next(d for d in row["dense"] if d["name"] == row["baseline"])
        assert (r["tokens"], r["dense baseline"], r["theta"]) == (
            str(row["n"]),
            base["name"],
            f"{s['theta']:g}" if s["theta"] != "inf" else "inf",
        )
        assert float(r["sparse, ms"].replace(",", "")) == pytest.approx(s["whole"]["median_ms"], rel=6e-3)
        assert float(r["dense, ms"].replace(",", "")) == pytest.approx(base["timing"]["median_ms"], rel=6e-3)
        assert float(r["speed-up"].strip("x")) == pytest.approx(s["speedup"], abs=6e-3)
        assert float(r["recall"]) == pytest.approx(s["recall"], abs=6e-4)
        assert float(r["density"]) == pytest.approx(s["density"], abs=6e-4)
    assert any("nothing about a GPU" in t for t in warnings(blocks))
    assert report["hardware"]["name"] in blocks[0]["texts"][0]


def test_a_failed_check_is_said_and_states_no_speedup(edited, bench):
    def alter(report):
        report["rows"][1]["check"].update(passed=False, reason="the output is wrong")
        assert report["rows"][1]["sparse"][0]["speedup"] is not None  # whatever the file says

    blocks = section(edited(bench, "bench.json", alter))
    assert any("512 tokens failed" in t and "the output is wrong" in t for t in warnings(blocks))
    states = {(r["tokens"], r["speed-up"] == "check failed") for r in table(blocks, "Speed-up")}
    assert states == {("256", False), ("512", True)}
    assert cards(blocks)["512 tokens"] == "no speed-up"


def test_the_first_speedup_is_not_one_of_low_recall(edited, bench):
    def alter(report):
        fast, good = report["rows"][0]["sparse"]
        fast.update(recall=0.2, speedup=9.0)
        good.update(recall=0.97, speedup=2.0)

    assert cards(section(edited(bench, "bench.json", alter)))["256 tokens"] == "2.00x"


# ---- pages of several folders ------------------------------------------------------------------------------------


def test_a_page_of_an_analysis_and_two_calibrations(tmp_path, run, calibration):
    other = calibrated(tmp_path / "again", by="model")
    data = build_data(open_sources([calibration, run, other]))
    assert len(data["sets"]) == 1
    titles = [s["title"] for s in data["sections"]]
    assert len(set(titles)) == 2
    assert len({s["id"] for s in data["sections"]}) == 2
    assert data["model"] == "toy"
    sources = open_sources([calibration, run])
    assert sources.home == run
    assert open_sources([calibration]).home == calibration


def test_different_models_are_refused_by_name(tmp_path, run, calibration):
    other = write_run(tmp_path / "other", make_profiles(layers=1, heads=1), model="giant")
    for folders in ([run, other], [calibration, other]):
        with pytest.raises(InputError, match=r"different models \((toy and giant|giant and toy); their name differs\)"):
            open_sources(folders)


@pytest.mark.parametrize("key", ["layers", "query_heads", "type", "fingerprint"])
def test_models_of_one_name_that_differ_are_refused(calibration, key, edited):
    def alter(value):
        return lambda report: report["model"].update({"fingerprint": "f", "type": "llama", key: value})

    both = [edited(calibration, "calibration.json", alter(x)) for i, x in enumerate((3, 4))]
    with pytest.raises(InputError, match="different models"):
        open_sources(both)


def test_renamed_files_of_one_model_go_together(calibration, edited):
    def alter(name):
        return lambda report: report["model"].update({"fingerprint": "f", "name": name})

    both = [edited(calibration, "calibration.json", alter(x)) for x in ("hub-name", "folder")]
    assert len(open_sources(both).results["calibration"]) == 2


def test_tables_alone_still_need_their_analysis(tmp_path, calibration, profiles):
    for write in (write_methods, write_diagnostics):
        with pytest.raises(InputError, match="needs an analysis"):
            open_sources([calibration, write(tmp_path / write.__name__, profiles)])


@pytest.mark.parametrize("name", FOLDERS)
def test_sections_speak_of_folders_as_their_commands_do(name):
    (one,) = [s for s in SECTIONS if s.name == name]
    folder = FOLDERS[name]
    assert (one.what, one.command, one.state, one.file, one.version) == (
        folder.what,
        folder.command,
        folder.format,
        folder.report,
        folder.version,
    )


def test_a_choice_that_keeps_less_than_one_theta_is_not_called_damaged(calibration, edited):
    """The gains are differences, of either sign; on real prompts the one in density is negative."""
    ordinary = edited(
        calibration,
        "calibration.json",
        lambda r: r["against_one_theta"]["gain"].update(held_out={"recall": -0.01, "worst": 0.16, "density": -0.025}),
    )
    assert build_data(open_sources([ordinary]))["sections"]


def test_an_unfinished_run_says_how_to_finish_it(tmp_path, calibration):
    shutil.copytree(calibration, tmp_path / "cal")
    (tmp_path / "cal" / "calibration.json").unlink()
    with pytest.raises(DumpError, match="unfinished calibration: give the same `anchorscope calibrate` command again"):
        open_sources([tmp_path / "cal"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "no result of `anchorscope calibrate`"),
        (lambda r: r.update(version=2), "format version 2, this AnchorScope reads 1"),
        (lambda r: r["heads"][1].update(theta="much"), r"heads\[1\].theta must be"),
        (lambda r: r["heads"][0].update(layer=10**9), "beyond any model"),
        (lambda r: r.pop("promise"), "promise must be given"),
        (lambda r: r["fitted"].update(recall=None), "fitted.recall must be a number"),
        (lambda r: r["heads"][2].update(held_out_recall=1.7), "held_out_recall must be from 0 to 1"),
        (lambda r: r["settings"].update(statistic="best"), "settings.statistic must be"),
    ],
)
def test_damaged_calibrations_are_named(calibration, change, message, edited):
    damaged = edited(calibration, "calibration.json", change)
    with pytest.raises(DumpError, match=message):
        build_data(open_sources([damaged]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("evaluation.json", lambda r: r["prompts"][0].pop("intervals"), r"prompts\[0\].intervals must be given"),
        ("evaluation.json", lambda r: r["depths"][0].update(score_sparse="1"), "score_sparse must be a number"),
        ("evaluation.json", lambda r: r.update(version=9), "format version 9"),
        ("evaluation.json", lambda r: r["depths"][0].update(score_sparse=-1), "score_sparse must be from 0 to 1"),
        ("bench.json", lambda r: r["rows"][0]["sparse"][0].update(density=2), "density must be from 0 to 1"),
        ("bench.json", lambda r: r.update(rows=[]), "times nothing"),
        ("bench.json", lambda r: r.update(format_version=2), "format version 2"),
        ("bench.json", lambda r: r["rows"][0].update(check=None), r"rows\[0\].check must be an object"),
        ("bench.json", lambda r: r["rows"][0]["sparse"][0]["whole"].pop("p20_ms"), "whole.p20_ms must be given"),
    ],
)
def test_damaged_evaluations_and_benches_are_named(edited, evaluation, bench, name, change, message):
    damaged = edited(bench if name == "bench.json" else evaluation, name, change)
    with pytest.raises(DumpError, match=message):
        build_data(open_sources([damaged]))


def test_numbers_that_fit_no_color_map_leave_strict_json(edited, calibration):
    def alter(report):
        for head, theta in zip(report["heads"], (-1e308, 1e308), strict=False):
            head["theta"] = theta

    page = build_report([edited(calibration, "calibration.json", alter)])
    assert parsed(page)["sections"]


def test_hostile_text_of_a_section_stays_text(calibration, edited):
    def alter(report):
        report["model"]["name"] = HOSTILE
        report["prompts"][0]["name"] = HOSTILE
        report["warnings"].append(HOSTILE)

    page = build_report([edited(calibration, "calibration.json", alter)])
    assert HOSTILE not in page
    data = parsed(page)
    assert data["model"] == HOSTILE
    assert table(data["sections"][0]["blocks"], "Prompts")[0]["prompt"] == HOSTILE


# ---- summary and glossary --------------------------------------------------------------------------------------


def summary(*folders) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The cards on top of a page, and its caveats."""
    blocks = build_data(open_sources(folders))["summary"]
    said = warnings(blocks)
    return {name: (value, small) for name, value, small in blocks[0]["items"]}, said[1:]


def test_a_summary_of_a_calibration_says_what_was_promised_and_kept(calibration):
    shown, said = summary(calibration)
    report = json.loads((calibration / "calibration.json").read_text())
    assert shown["model"][0] == "toy"
    assert shown["recommended"][0] == "a theta per head"
    assert "64x4" in shown["recommended"][1]
    assert float(shown["density"][0]) == pytest.approx(report["held_out"]["density"], abs=6e-4)
    assert shown["recall promised"][0] == "0.95"
    assert float(shown["recall kept"][0]) == pytest.approx(report["promise"]["pooled"], abs=6e-4)
    assert shown["expected speed-up of attention"] == (
        "not measured",
        "no bench is on this page that is known to be of this model",
    )
    assert len(said) == 3
    assert f"{report['promise']['heads_missed']} of 12 heads keep less than the promised 0.95" in said[0]
    assert not any("No prompt was held out" in text for text in said)


def test_without_a_calibration_one_theta_reaches_the_target_on_average(run, profiles):
    shown, said = summary(run)
    theta = float(shown["recommended"][0].removeprefix("theta "))
    for t, reached in ((theta, True), (theta - 1, False)):
        recall = np.mean([np.interp(t, p.curve_theta[1:-1], p.curve_recall[1:-1]) for p in profiles])
        assert (recall >= 0.95) == reached
    assert shown["recall promised"][0] == "none"
    assert any("Nothing was calibrated" in text for text in said)


def test_nothing_held_out_is_a_caveat(tmp_path):
    shown, said = summary(calibrated(tmp_path, prompts=("prose",)))
    assert shown["recall kept"][0] == "not checked"
    assert any("No prompt was held out" in text for text in said)


def test_a_speedup_is_expected_only_of_a_bench_that_fits(edited, calibration, bench):
    name = "expected speed-up of attention"
    density = json.loads((calibration / "calibration.json").read_text())["held_out"]["density"]

    def fitting(block=64, n=2048, density=density, passed=True, dump=None):
        def alter(report):
            report["settings"].update(block=block, step=4, dump_sha256=dump)
            for row in report["rows"]:
                row.update(n=n)
                row["check"].update(passed=passed)
                for s, d in zip(row["sparse"], (density, 1.0), strict=True):
                    s.update(density=d, speedup=3.21 if d < 1 else 0.5)

        return edited(bench, "bench.json", alter)

    assert summary(calibration, fitting())[0][name][0] == "3.21x"
    assert summary(calibration, fitting(dump=IDENTITY))[0][name][0] == "3.21x"
    for bad, why in (
        (fitting(dump="1" * 64), "known to be of this model"),
        (fitting(block=32), "timed groups 32x4, not 64x4"),
        (fitting(n=8192), "no bench of these groups at 2,048 tokens"),
        (fitting(passed=False), "no bench at 2,048 tokens with a density of"),
    ):
        value, small = summary(calibration, bad)[0][name]
        assert value == "not measured"
        assert why in small
    assert summary(calibration, fitting(density=density / 2))[0][name][0] == "0.50x"  # a sparser time says nothing
    assert any("another model" in text for text in summary(calibration, fitting(dump="1" * 64))[1])
    assert any("different lengths" in text for text in summary(calibration, fitting(n=8192))[1])


def test_doubts_of_an_evaluation_and_failed_checks_come_first(edited, evaluation, bench):
    failed = edited(bench, "bench.json", lambda r: r["rows"][0]["check"].update(passed=False, reason="wrong"))
    _, said = summary(evaluation, failed)
    assert "no better than chance" in said[0]
    assert "tokens failed" in said[1]
    assert len(said) == 3
    shown, said = summary(bench)
    assert shown["model"][0] == "not stated"
    assert any("CPU" in text for text in said)


def test_every_term_is_explained_in_a_sentence():
    assert {"recall", "density", "stripe", "theta", "anchor", "nats", "oracle", "output closeness"} <= set(GLOSSARY)
    for term, words in GLOSSARY.items():
        assert words.endswith("."), term
        assert term == term.lower() or term == "KL"
