"""Every resumable command meets every accident, from one list: it goes on to the same bytes, or refuses."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accidents import Killed, full_disk_at, killed_at
from matplotlib.figure import Figure
from resumable import COMMANDS, TOY, Command, Inputs, contents, still_clock

from anchorscope.errors import DumpError, InputError, Interrupted, RunFailure
from anchorscope.locks import LOCK, folder_lock

FOLDERS = COMMANDS[1:]  # all but capture: their figures and diagnostics are asked for on top of what is measured
DRAWING = ("plots.draw", *(f"{x}.figures" for x in ("heads", "compare", "calibration", "evaluation", "bench")))
every = pytest.mark.parametrize("command", [*COMMANDS, TOY], ids=lambda c: c.name)
every_folder = pytest.mark.parametrize("command", FOLDERS, ids=lambda c: c.name)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, a still clock, and empty pictures, since drawing takes longest; `crash_resume.py` draws them."""

    def savefig(figure: Figure, file: object, **_: object) -> None:
        file.write(f"PNG of {figure.get_size_inches().tolist()}".encode())  # type: ignore[attr-defined]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, still_clock():
        patch.setattr(Figure, "savefig", savefig)
        for home in DRAWING:
            module = importlib.import_module(f"anchorscope.{home}")
            for name, function in list(vars(module).items()):
                if getattr(function, "__annotations__", {}).get("return") in ("Figure", "Figure | None"):
                    patch.setattr(module, name, lambda *_, **__: Figure())
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """What an uninterrupted run leaves, by command."""
    made: dict[str, dict[str, bytes]] = {}

    def find(command: Command) -> dict[str, bytes]:
        if command.name not in made:
            folder = tmp_path_factory.mktemp(command.name) / "o"
            command.run(inputs, folder)
            assert command.finished(folder)
            made[command.name] = contents(folder)
        return made[command.name]

    return find


def settled(folder: Path) -> dict[str, bytes]:
    """Files but what was being written, which no reader looks at."""
    return {name: data for name, data in contents(folder).items() if not name.endswith((".tmp", ".partial"))}


@every
def test_killed_before_every_change(command, inputs, whole, tmp_path):
    want, step = whole(command), 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        with contextlib.suppress(Killed), killed_at(step) as steps:
            command.run(inputs, folder)
        if steps.count < step:
            break  # it lived
        if command.finished(folder):
            assert contents(folder) == want, f"killed at change {step}, it looks finished and is not"
        else:
            command.run(inputs, folder)
        assert contents(folder) == want, f"killed at change {step}, it continues to something else"
    assert step > 8


@every
def test_killed_while_it_replaces_another_run(command, inputs, whole, tmp_path):
    command.run(inputs, tmp_path / "other", other=True)
    want, other, step = whole(command), contents(tmp_path / "other"), 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        for name, data in other.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        with contextlib.suppress(Killed), killed_at(step) as steps:
            command.run(inputs, folder, overwrite=True)
        if steps.count < step:
            break
        if command.finished(folder):
            assert settled(folder) in (other, want), f"killed at change {step}, it looks finished and is not"
        command.run(inputs, folder, overwrite=True)
        assert contents(folder).keys() - want.keys() <= {n for n in other if n.startswith("analysis/")}
        assert {n: x for n, x in contents(folder).items() if n in want} == want
    assert step > 8


@every
def test_the_disk_is_full_at_every_write(command, inputs, whole, tmp_path):
    want, write = whole(command), 0
    with full_disk_at(3), pytest.raises(RunFailure, match=r"^[^\n]*([Nn]o space left|disk is full)[^\n]*$"):
        command.run(inputs, tmp_path / "said")
    while True:
        write += 1
        folder = tmp_path / str(write)
        with full_disk_at(write) as count, contextlib.suppress(RunFailure):
            command.run(inputs, folder)
        if count[0] < write:
            break
        if command.finished(folder):
            assert contents(folder) == want, f"full at write {write}, it looks finished and is not"
        else:
            command.run(inputs, folder)
        assert contents(folder) == want, f"full at write {write}, it continues to something else"
    assert write > 8


def cut(content: bytes) -> bytes:
    return content[:-20]


def edited(content: bytes) -> bytes:
    """One number otherwise, and nothing else: in JSON the first one with decimals, else a bit of the last value."""
    found = re.search(rb"\d\.(\d)", content) if content.startswith(b"{") else None
    at = len(content) - 1 if found is None else found.start(1)
    other = content[at] ^ 1  # of a digit, the digit beside it
    return content[:at] + bytes([other]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, edited])
@every
def test_a_damaged_part_is_made_again(command, inputs, whole, tmp_path, damage):
    want = whole(command)
    with killed_at(None) as steps:
        command.run(inputs, tmp_path / "count")
    with pytest.raises(Killed), killed_at(steps.count - (2 if command.name == "bench" else 3)):
        command.run(inputs, tmp_path / "o")
    parts = sorted((tmp_path / "o").glob(command.parts))
    assert len(parts) > 1
    parts[0].write_bytes(damage(parts[0].read_bytes()))
    kept = parts[1].stat().st_mtime_ns
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == want
    assert parts[1].stat().st_mtime_ns == kept, "a whole part was made again"


@every
def test_one_run_at_a_time(command, inputs, whole, tmp_path):
    (tmp_path / "o").mkdir()
    with folder_lock(tmp_path / "o"), pytest.raises(InputError, match="another run is writing"):
        command.run(inputs, tmp_path / "o")
    (tmp_path / "o" / LOCK).touch()  # what a killed process leaves behind is no lock
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)
    with pytest.raises(InputError, match=r"finished|complete"):
        command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)


@every
def test_another_request_does_not_continue_it(command, inputs, whole, tmp_path):
    with pytest.raises(Killed), killed_at(len(whole(command))):
        command.run(inputs, tmp_path / "o")
    before = contents(tmp_path / "o")
    with pytest.raises(InputError, match=r"other settings.*--overwrite"):
        command.run(inputs, tmp_path / "o", other=True)
    assert contents(tmp_path / "o") == before
    with pytest.raises(DumpError if command.name not in ("calibrate", "squares") else ValueError, match=r"unfinished"):
        command.load(tmp_path / "o")


@every
def test_ctrl_c_says_what_is_kept(command, inputs, whole, tmp_path, monkeypatch):
    real, parts = os.replace, []

    def replace(source, target):
        real(source, target)
        parts.extend([target] if target in (tmp_path / "o").glob(command.parts) else [])
        if len(parts) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Interrupted, match=r"\d+ of \d+ .*kept in .*give the same command again") as caught:
            command.run(inputs, tmp_path / "o")
    assert str(tmp_path / "o") in str(caught.value)
    assert not list((tmp_path / "o").rglob("*.tmp"))
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)


@every
@pytest.mark.parametrize("error", [13, 30])
def test_a_folder_that_must_not_be_written(command, inputs, tmp_path, monkeypatch, error):
    (tmp_path / "o").mkdir()
    real = os.open

    def refuse(path, flags, *rest, **options):
        if str(path).endswith(LOCK):
            raise OSError(error, os.strerror(error))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="cannot write into"):
        command.run(inputs, tmp_path / "o")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"is a file|cannot be created"):
            command.run(inputs, path)
    assert (tmp_path / "file").read_text() == "mine"


@every
def test_files_of_somebody_else_are_left_alone(command, inputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"exists and is not|holds other files and no dump"):
            command.run(inputs, tmp_path / "mine", overwrite=overwrite)
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}
    command.run(inputs, tmp_path / "o", other=True)
    folders = [tmp_path / "o", *(p for p in (tmp_path / "o").iterdir() if p.is_dir())]
    for folder in folders:
        (folder / "notes.txt").write_text("mine")
    command.run(inputs, tmp_path / "o", overwrite=True)
    assert [(folder / "notes.txt").read_text() for folder in folders] == ["mine"] * len(folders)


@every_folder
def test_inside_its_own_dump_it_changes_nothing_of_it(command, inputs, whole):
    before = {p.name: p.read_bytes() for p in inputs.dump.iterdir() if p.is_file()}
    command.run(inputs, inputs.dump / command.name)
    assert contents(inputs.dump / command.name) == whole(command)
    assert {p.name: p.read_bytes() for p in inputs.dump.iterdir() if p.is_file()} == before
    if command.name != "evaluate":  # which reads no dump
        with pytest.raises(InputError, match="exists and is not"):
            command.run(inputs, inputs.dump)
    assert {p.name: p.read_bytes() for p in inputs.dump.iterdir() if p.is_file()} == before


@every_folder
def test_more_can_be_asked_of_a_finished_run(command, inputs, whole, tmp_path):
    command.run(inputs, tmp_path / "o", figures=False)
    assert not list((tmp_path / "o").rglob("*.png"))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob(command.parts)}
    with pytest.raises(InputError, match="finished"):
        command.run(inputs, tmp_path / "o", figures=False)
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "something was measured again"
    with pytest.raises(InputError, match="finished"):  # less is asked of it: it has all of that
        command.run(inputs, tmp_path / "o", figures=False)


@every_folder
def test_a_finished_run_is_accepted_by_one_that_resumes(command, inputs, whole, tmp_path):
    command.run(inputs, tmp_path / "o")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob(command.parts)}
    command.run(inputs, tmp_path / "o", resume=True)
    assert contents(tmp_path / "o") == whole(command)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "something was measured again"
    with pytest.raises(InputError, match="other settings"):
        command.run(inputs, tmp_path / "o", other=True, resume=True)
    assert contents(tmp_path / "o") == whole(command)


@every_folder
def test_killed_while_more_is_made(command, inputs, whole, tmp_path):
    command.run(inputs, tmp_path / "bare", figures=False)
    bare, want, step = contents(tmp_path / "bare"), whole(command), 0
    while True:
        step += 1
        folder = shutil.copytree(tmp_path / "bare", tmp_path / str(step))
        with contextlib.suppress(Killed), killed_at(step) as steps:
            command.run(inputs, folder)
        if steps.count < step:
            break
        if command.finished(folder):
            assert settled(folder) in (bare, want), f"killed at change {step}, it looks finished and is not"
        if contents(folder) != want:
            command.run(inputs, folder)
        assert contents(folder) == want, f"killed at change {step}, it continues to something else"
    assert step > 4


@every_folder
def test_the_last_command_says_what_is_made_of_an_unfinished_run(command, inputs, tmp_path):
    with killed_at(None) as steps:
        command.run(inputs, tmp_path / "bare", figures=False)
    assert steps.count
    with killed_at(None) as steps:
        command.run(inputs, tmp_path / "count")
    drawn = 0
    for before in range(4):
        out = tmp_path / str(before)
        with contextlib.suppress(Killed), killed_at(steps.count - before):
            command.run(inputs, out)
        if command.finished(out):
            continue
        drawn += bool(list(out.rglob("*.png")))
        command.run(inputs, out, figures=False)
        assert contents(out) == contents(tmp_path / "bare"), f"killed {before} changes before its end"
    assert drawn  # there was something to remove


@every_folder
def test_folders_of_the_version_before_are_read_and_completed(command, inputs, whole, tmp_path):
    """Their state does not say what was asked for."""
    command.run(inputs, tmp_path / "o")
    for state in (tmp_path / "o" / "run.json", tmp_path / "o" / "analysis.json"):
        if state.exists():
            old = json.loads(state.read_text())
            del old["asked"]
            state.write_text(json.dumps(old))
    command.load(tmp_path / "o")
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)


def pictures(files: dict[str, bytes], form: str) -> set[str]:
    return {name.removesuffix(f".{form}") for name in files if name.endswith(f".{form}")}


@every_folder
def test_another_format_is_drawn_and_nothing_is_measured(command, inputs, whole, tmp_path):
    drawn = pictures(whole(command), "png")
    command.run(inputs, tmp_path / "o")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob(command.parts)}
    command.run(inputs, tmp_path / "o", formats="svg", dpi=200)
    files = contents(tmp_path / "o")
    assert drawn
    assert pictures(files, "svg") == pictures(files, "png") == drawn
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "something was measured again"
    for formats, dpi in (({"svg": 200, "png": 110}, 110), ("svg", 200), ("png", 110)):  # it has all of that
        with pytest.raises(InputError, match="finished"):
            command.run(inputs, tmp_path / "o", formats=formats, dpi=dpi)
    command.run(inputs, tmp_path / "o", formats=["pdf"])
    assert pictures(contents(tmp_path / "o"), "pdf") == drawn
    command.run(inputs, tmp_path / "o", overwrite=True, other=True, formats="svg")
    assert not pictures(contents(tmp_path / "o"), "png") | pictures(contents(tmp_path / "o"), "pdf")


@every_folder
def test_the_last_command_says_in_which_formats(command, inputs, whole, tmp_path):
    command.run(inputs, tmp_path / "o", formats="pdf,svg")
    assert not pictures(contents(tmp_path / "o"), "png")
    (tmp_path / "o" / command.report).unlink()  # as if it had been killed before its end
    command.run(inputs, tmp_path / "o")
    assert contents(tmp_path / "o") == whole(command)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"formats": "png,gif"}, "'gif' is no format"),
        ({"formats": []}, "names no format"),
        ({"formats": "png", "dpi": 29}, "dpi must be a whole number"),
        ({"dpi": 601}, "30 to 600, not 601"),
        ({"dpi": 100.0}, "not 100.0"),
    ],
)
@every_folder
def test_formats_are_checked_first(command, inputs, tmp_path, how, words):
    with pytest.raises(InputError, match=words):
        command.run(inputs, tmp_path / "o", **how)
    assert not (tmp_path / "o").exists()
