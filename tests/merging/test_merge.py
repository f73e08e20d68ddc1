"""Shards put together: the bytes of one process, or a sentence that names the shard that is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from resumable import COMMANDS, PARAMS, Command, Inputs, contents

from anchorscope import Shard, analyze, calibrate, merge, run_bench
from anchorscope.bench import BenchConfig
from anchorscope.cli.app import main
from anchorscope.errors import DumpError, InputError, Interrupted
from anchorscope.runs.life import Make

pytestmark = pytest.mark.usefixtures("quiet")
ANALYZE, COMPARE, HEADS, CALIBRATE = (c for c in COMMANDS if c.name in ("analyze", "heads", "compare", "calibrate"))


def _analyze(x: Inputs, out: Path, *, other: bool = False, run=ANALYZE.run, **how):
    """Shards must know which of two thetas is shown."""
    return run(x, out, other=other, **({} if other else {"figure_theta": 8.0}), **how)


ANALYZE = replace(ANALYZE, run=_analyze)
on_heads = pytest.mark.parametrize("command", [ANALYZE, COMPARE, HEADS, CALIBRATE], ids=lambda c: c.name)


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """One process' folder and those of two shards, by command."""
    found: dict[str, Path] = {}

    def make(command: Command) -> Path:
        if command.name not in found:
            home = found[command.name] = tmp_path_factory.mktemp(command.name)
            figures = command.name == "heads"  # drawing takes longest
            command.run(inputs, home / "one", figures=figures)
            for i in (1, 2):
                command.run(inputs, home / f"shard{i}", figures=figures, shard=Shard(i, 2))
        return found[command.name]

    return make


@pytest.fixture
def shards(made, tmp_path) -> list[Path]:
    """Copies of two shards of an analysis, to be damaged."""
    return [shutil.copytree(made(ANALYZE) / f"shard{i}", tmp_path / f"shard{i}") for i in (1, 2)]


@on_heads
def test_the_merged_folder_is_that_of_one_process(command: Command, made, tmp_path, monkeypatch):
    home = made(command)
    before = [contents(home / f"shard{i}") for i in (1, 2)]
    monkeypatch.setattr(Make, "__call__", lambda *_: pytest.fail("something was measured"))
    if command.name == "calibrate":
        monkeypatch.undo()  # its units are analyses, which copy their heads
    merged = merge([home / "shard2", str(home / "shard1")], tmp_path / "o")
    assert (merged.command, merged.shards, merged.path) == (command.name, 2, tmp_path / "o")
    assert contents(tmp_path / "o") == contents(home / "one")
    assert command.finished(tmp_path / "o")
    assert any(name.endswith(".png") for name in contents(home / "one")) == (command.name == "heads")
    assert [contents(home / f"shard{i}") for i in (1, 2)] == before
    with pytest.raises(InputError, match="holds a finished"):
        merge([home / "shard1", home / "shard2"], tmp_path / "o")


@on_heads
def test_shards_share_the_work_and_look_unfinished(command: Command, made):
    home = made(command)
    parts = [{p.relative_to(home / name) for p in (home / name).glob(command.parts)} for name in ("shard1", "shard2")]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {p.relative_to(home / "one") for p in (home / "one").glob(command.parts)}
    assert not command.finished(home / "shard1")
    with pytest.raises(
        DumpError if command.name != "calibrate" else ValueError, match=r"holds shard 1 of 2|unfinished"
    ):
        command.load(home / "shard1")


@on_heads
def test_a_shard_that_was_interrupted_continues(command: Command, inputs, made, tmp_path):
    def stop(_) -> None:
        if list((tmp_path / "o").glob(command.parts)):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="give the same command again"):
        command.run(inputs, tmp_path / "o", figures=False, shard=Shard(1, 1), progress=stop)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob(command.parts)}
    assert kept
    with pytest.raises(InputError, match=r"shard 1 of 1\) is unfinished \(\d+ of \d+ units of work are missing"):
        merge([tmp_path / "o"], tmp_path / "early")
    assert not (tmp_path / "early").exists()
    command.run(inputs, tmp_path / "o", figures=False, shard=Shard(1, 1))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    merge([tmp_path / "o"], tmp_path / "merged", figures=False)
    one = tmp_path / "one"
    command.run(inputs, one, figures=False)
    assert contents(tmp_path / "merged") == contents(one)


def refused(folders: list[Path], sentence: str, kind: type[Exception] = InputError) -> None:
    out = folders[0].parent / "merged"
    with pytest.raises(kind, match=sentence):
        merge(folders, out)
    assert not out.exists()


def test_a_set_of_shards_that_is_not_whole_is_refused_by_name(shards, made, inputs, tmp_path):
    refused(shards[1:], r"^shard 1 of 2 missing: name the folders of all shards$")
    again = shutil.copytree(shards[0], tmp_path / "again")
    refused([*shards, again], r"shard1 and .*again are both shard 1 of 2: leave one of them out")
    refused([made(ANALYZE) / "one", *shards], "holds an analysis that is no shard", DumpError)
    refused([inputs.dump, *shards], "holds no shard: merge takes the folders", DumpError)
    refused([tmp_path / "nowhere", *shards], "nowhere holds no shard", DumpError)
    refused([made(HEADS) / "shard1", shards[1]], "are not of one run")
    ANALYZE.run(inputs, tmp_path / "other", other=True, figures=False, shard=Shard(1, 2))
    refused([tmp_path / "other", shards[1]], r"shard2 \(shard 2 of 2\) and .*other \(shard 1 of 2\) are not of one run")
    ANALYZE.run(inputs, tmp_path / "third", figures=False, shard=Shard(1, 1))
    refused([tmp_path / "third", shards[1]], "are not of one run")
    ANALYZE.run(inputs, tmp_path / "drawn", shard=Shard(1, 2))
    refused([tmp_path / "drawn", shards[1]], "were asked for different figures or diagnostics")
    with pytest.raises(InputError, match="shard1 is one of the shards: name another folder"):
        merge(shards, shards[0])
    with pytest.raises(InputError, match="name the folders of all shards"):
        merge([], tmp_path / "o")


@pytest.mark.parametrize("part", ["profile", "heads/parts"])
@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_shard_without_all_its_parts_is_named(shards, part, harm):
    file = next((shards[1] / part).iterdir())
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    refused(shards, r"shard2 \(shard 2 of 2\) is unfinished \(1 of \d units of work are missing or damaged\): give its")


def edit(folder: Path, **changes) -> None:
    for state in folder.rglob("*.json"):
        if state.name in ("analysis.json", "run.json"):
            value = json.loads(state.read_text())
            for key, change in changes.items():
                change(value) if callable(change) else value.update({key: change})
            state.write_text(json.dumps(value))


def test_shards_of_different_machines_are_refused(shards):
    edit(shards[0], hardware="NVIDIA H200")
    refused(shards, "were measured with different hardware: CPU, 1 thread and NVIDIA H200; measure one of them again")
    edit(
        shards[0],
        hardware="CPU, 1 thread",
        versions={**json.loads((shards[1] / "analysis.json").read_text())["versions"], "torch": "2.0"},
    )
    refused(shards, r"different versions of the packages: torch .* and 2\.0")


def test_shards_of_gpus_are_merged_where_there_is_none(shards, tmp_path):
    def on_gpu(state) -> None:
        state["hardware"] = "NVIDIA H200"
        state["settings"]["device"] = "cuda"
        if "backend" in state["settings"]:
            state["settings"]["backend"] = "triton"

    for folder in shards:
        edit(folder, all=on_gpu)
    report = merge(shards, tmp_path / "o").result.report
    assert report["hardware"] == "NVIDIA H200"
    assert (report["settings"]["device"], report["settings"]["backend"]) == ("cuda", "triton")
    assert json.loads((tmp_path / "o" / "heads" / "heads.json").read_text())["hardware"] == "NVIDIA H200"


def test_a_dump_that_is_gone_or_another_one_is_said(inputs, tmp_path):
    dump = shutil.copytree(inputs.dump, tmp_path / "dump")
    mine = Inputs(dump, None, None, inputs.tokens)
    ANALYZE.run(mine, tmp_path / "o", figures=False, shard=Shard(1, 1))
    dump.rename(tmp_path / "moved")
    refused(
        [tmp_path / "o"], r"o \(shard 1 of 1\) cannot be finished without what it was measured of: .*dump", DumpError
    )
    other = Inputs.make(tmp_path / "other", 80)
    shutil.copytree(other.dump, dump)
    refused([tmp_path / "o"], "was measured of other inputs than are there now")


@pytest.mark.parametrize(
    "harm",
    [
        {"recipe": {}},
        {
            "recipe": {
                "request": {"kind": "request", "fields": {"dump": {"kind": "os.system", "fields": {}}}},
                "figures": False,
            }
        },
        {"hardware": 3},
    ],
)
def test_a_state_that_was_edited_is_refused(shards, harm):
    for folder in shards:
        edit(folder, **harm)
    refused(shards, r"analysis\.json is damaged", DumpError)


def test_calibrating_analyses_that_exist_takes_no_shards_to_measure(made, tmp_path):
    done = made(ANALYZE) / "one"
    how = {"target_recall": 0.9, "holdout": ["code"], "figures": False}
    one = calibrate([done], tmp_path / "one", **how)
    for i in (1, 2):
        calibrate([done], tmp_path / f"s{i}", shard=Shard(i, 2), **how)
    merge([tmp_path / "s1", tmp_path / "s2"], tmp_path / "o")
    assert contents(tmp_path / "o") == contents(one.path)


def test_the_theta_of_a_diagnosis_must_not_depend_on_other_shards(inputs, tmp_path):
    how = {"thetas": (4.0, 8.0), "params": PARAMS, "device": "cpu", "figures": False}
    with pytest.raises(InputError, match=r"which of 2 thetas is shown .* name one with --figure-theta, or leave"):
        analyze(inputs.dump, tmp_path / "o", diagnose=True, shard=Shard(1, 2), **how)
    assert not (tmp_path / "o").exists()
    for name, more in {"asked": {"diagnose": True, "figure_theta": 8.0}, "none": {}}.items():
        one = analyze(inputs.dump, tmp_path / name / "one", **how, **more).path
        shards = [analyze(inputs.dump, tmp_path / name / str(i), shard=Shard(i, 2), **how, **more).path for i in (1, 2)]
        merge(shards, tmp_path / name / "merged")
        assert contents(tmp_path / name / "merged") == contents(one)


def test_commands_of_one_process_take_no_shard(inputs, tmp_path):
    config = BenchConfig(lengths=(32,), thetas=(3.0,), device="cpu", repeats=1, backend="torch")
    with pytest.raises((InputError, TypeError), match="shard"):
        run_bench(config, tmp_path / "b", shard=Shard(1, 2))
    with pytest.raises(InputError, match="`evaluate` cannot be done in shards"):
        COMMANDS[-1].run(inputs, tmp_path / "e", shard=Shard(1, 2))
    assert not (tmp_path / "e").exists()


def test_from_the_command_line(inputs, tmp_path, capsys):
    words = ["heads", str(inputs.dump), "--step", "2", "--block", "16", "--device", "cpu", "--no-figures"]
    assert main([*words, "--out", str(tmp_path / "one"), "--json"]) == 0
    want = capsys.readouterr().out
    for i in (1, 2):
        assert main([*words, "--out", str(tmp_path / f"s{i}"), "--shard", f"{i}/2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("shard 2 of 2 is complete in ")
    assert main(["info", str(tmp_path / "s1")]) == 2
    shown = capsys.readouterr()
    assert "shard    1 of 2; `anchorscope merge` puts all together" in shown.out
    assert "unfinished: 1 of 1 " in shown.out
    assert "s1 is shard 1 of 2 of a diagnosis of heads: give its command again if units are missing" in shown.err
    merged = ["merge", str(tmp_path / "s1"), str(tmp_path / "s2"), "--out"]
    assert main([*merged, str(tmp_path / "o"), "--json"]) == 0
    assert capsys.readouterr().out == want
    assert main([*merged, str(tmp_path / "p")]) == 0
    assert f"Tables: {tmp_path / 'p'}" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "s9"), "--shard", "9"]) == 2
    assert "error: --shard '9' is malformed" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "s9"), "--shard", "3/3"]) == 2
    assert "there are only 2 units of work" in capsys.readouterr().err
    assert not (tmp_path / "s9").exists()
    assert main(["merge", str(tmp_path / "s1"), "--out", str(tmp_path / "q")]) == 2
    assert capsys.readouterr().err == "error: shard 2 of 2 missing: name the folders of all shards\n"
