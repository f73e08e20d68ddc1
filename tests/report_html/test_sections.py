"""Folders that make a section of their own: what the page shows equals their files, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from anchorscope.calibration.run import FOLDER as CALIBRATION
from anchorscope.errors import DumpError, InputError
from anchorscope.report.html import build_data, build_report, open_sources
from anchorscope.report.kinds import SECTIONS
from anchorscope.shown import share_text

from .results import calibrated
from .runs import make_profiles, write_diagnostics, write_methods, write_run
from .test_html import HOSTILE, parsed

FOLDERS = {"calibration": CALIBRATION}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp("calibration"))


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
    def change(report):
        for h, x in zip(report["heads"], (0.9996, 1.0, 0.99999996), strict=False):
            h["held_out_recall"] = x

    blocks = section(edited(calibration, "calibration.json", change))
    assert [cell[1] for cell in grid(blocks, "recall, held out").values()][:3] == ["0.9996", "all", ">0.9999999"]


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
    def change(value):
        return lambda report: report["model"].update({"fingerprint": "f", "type": "llama", key: value})

    both = [edited(calibration, "calibration.json", change(x)) for i, x in enumerate((3, 4))]
    with pytest.raises(InputError, match="different models"):
        open_sources(both)


def test_renamed_files_of_one_model_go_together(calibration, edited):
    def change(name):
        return lambda report: report["model"].update({"fingerprint": "f", "name": name})

    both = [edited(calibration, "calibration.json", change(x)) for x in ("hub-name", "folder")]
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
        (lambda r: r["settings"].update(statistic="best"), "settings.statistic must be"),
    ],
)
def test_damaged_calibrations_are_named(calibration, change, message, edited):
    damaged = edited(calibration, "calibration.json", change)
    with pytest.raises(DumpError, match=message):
        build_data(open_sources([damaged]))


def test_hostile_text_of_a_section_stays_text(calibration, edited):
    def change(report):
        report["model"]["name"] = HOSTILE
        report["prompts"][0]["name"] = HOSTILE
        report["warnings"].append(HOSTILE)

    page = build_report([edited(calibration, "calibration.json", change)])
    assert HOSTILE not in page
    data = parsed(page)
    assert data["model"] == HOSTILE
    assert table(data["sections"][0]["blocks"], "Prompts")[0]["prompt"] == HOSTILE
