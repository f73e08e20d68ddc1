"""`info` says what any folder of AnchorScope is, how far it is, and never stumbles over a damaged one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumable import COMMANDS, Command, Inputs

from anchorscope.cli.app import main
from anchorscope.cli.folders import recognize
from anchorscope.errors import DumpError

FOLDERS = [c for c in COMMANDS if c.name != "capture"]
every_folder = pytest.mark.parametrize("command", FOLDERS, ids=lambda c: c.name)
WORDS = {
    "analyze": ("an analysis", "heads reach 0.95", "16 x 2"),
    "compare": ("a comparison", "anchor, streaming", "recall 0.95"),
    "heads": ("a diagnosis of heads", "streaming", "retrieval"),
    "calibrate": ("a calibration", "recall 0.9", "groups 16x2"),
    "evaluate": ("an evaluation", "LlamaForCausalLM", "p, q"),
    "bench": ("a bench", "a dump of an unknown model", "equal dense attention"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished folder of every command."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("info")
    inputs = Inputs.make(base, 96)
    for command in COMMANDS:
        command.run(inputs, base / command.name, **({} if command.name == "capture" else {"figures": False}))
    yield base
    torch.set_num_threads(threads)


def info(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main(["info", *map(str, arguments)])
    return code, *capsys.readouterr()


def unbroken(code: int, err: str) -> None:
    assert code in (0, 2), err
    assert "internal error" not in err
    assert "Traceback" not in err
    assert len([x for x in err.splitlines() if x.startswith("error: ")]) == (code == 2)


@every_folder
def test_every_folder_is_known(capsys, folders, command: Command):
    code, out, err = info(capsys, folders / command.name)
    assert code == 0, err
    for word in WORDS[command.name.removesuffix("-in-flight")]:
        assert word in out
    code, out, _ = info(capsys, folders / command.name, "--json")
    found = json.loads(out)
    assert (code, found["command"], found["finished"]) == (0, command.name.removesuffix("-in-flight"), True)
    assert WORDS[command.name.removesuffix("-in-flight")][0].endswith(found["kind"])


@every_folder
def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(capsys, folders, tmp_path, command: Command):
    copy = shutil.copytree(folders / command.name, tmp_path / "o")
    (copy / command.report).unlink()
    parts = sorted(copy.glob(command.parts))
    parts[0].unlink()
    code, out, err = info(capsys, copy)
    assert code == 2
    assert f"unfinished: {len(parts) - 1} of {len(parts)} " in out
    name = command.name.removesuffix("-in-flight")
    assert f"give the same `anchorscope {name}` command, with --out {copy}, again to continue" in err
    found = json.loads(info(capsys, copy, "--json")[1])
    assert found["finished"] is False
    assert found["done"].startswith(f"{len(parts) - 1} of {len(parts)} ")


def test_a_dump_is_a_dump(capsys, folders):
    code, out, _ = info(capsys, folders / "capture", "--json")
    assert (code, json.loads(out)["kind"]) == (0, "dump")


def test_anchors_and_profiles(capsys, folders):
    code, out, err = info(capsys, folders / "calibrate" / "anchors.json")
    assert code == 0, err
    assert "2 heads, " in out
    assert "16 x 2" in out
    code, out, err = info(capsys, folders / "analyze" / "profile")
    assert code == 0, err
    assert "4 heads" in out
    assert "story, layer 2, head 0, 96 tokens" in out


@pytest.mark.parametrize("place", ["nowhere", "empty", "text", "json", "model"])
def test_anything_else_is_said_to_be_something_else(capsys, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text").write_text("words")
    (tmp_path / "json").write_text('{"format": 3}')
    code, out, err = info(capsys, tmp_path / place)
    assert (code, out) == (2, "")
    assert {
        "nowhere": "does not exist",
        "empty": "is not a folder of AnchorScope",
        "text": "no anchors.json",
        "json": "name the folder it is in",
        "model": f"`anchorscope analyze --model {tmp_path / 'model'}`",
    }[place] in err


@every_folder
def test_a_report_cut_anywhere_is_damaged(capsys, folders, tmp_path, command: Command):
    copy = shutil.copytree(folders / command.name, tmp_path / "o")
    text = (copy / command.report).read_text()
    for end in (0, 1, len(text) // 3, len(text) - 5):
        (copy / command.report).write_text(text[:end])
        code, _, err = info(capsys, copy)
        unbroken(code, err)
        assert code == 2
        assert command.report in err


@every_folder
def test_no_wrong_type_is_stumbled_over(capsys, folders, tmp_path, command: Command):
    copy = shutil.copytree(folders / command.name, tmp_path / "o")
    report = json.loads((copy / command.report).read_text())
    for key in report:
        inner = list(report[key]) if isinstance(report[key], dict) else []
        for name in (None, *inner):
            for wrong in (None, 7, "\x1b[31m", [None], {"a": [1]}):
                changed = json.loads(json.dumps(report))
                if name is None:
                    changed[key] = wrong
                else:
                    changed[key][name] = wrong
                (copy / command.report).write_text(json.dumps(changed))
                found = recognize(copy)  # as the command does, which would take too long a thousand times
                assert "\x1b" not in "".join(found.lines.values()) + str(found.to_json())
                with contextlib.suppress(DumpError):
                    found.check()


@pytest.mark.parametrize("wrong", ["[]", "7", "null", '"x"', "{", '{"format": "anchorscope-anchors", "version": 1}'])
def test_a_damaged_state_or_anchors(capsys, folders, tmp_path, wrong):
    for name, file in (("analyze", "analysis.json"), ("compare", "run.json"), ("evaluate", "run.json")):
        copy = shutil.copytree(folders / name, tmp_path / name)
        (copy / file).write_text(wrong)
        unbroken(*info(capsys, copy)[::2])
        next(copy.glob("*.json")).unlink()
        unbroken(*info(capsys, copy)[::2])
    (tmp_path / "anchors.json").write_text(wrong)
    code, _, err = info(capsys, tmp_path / "anchors.json")
    unbroken(code, err)
    assert code == 2
