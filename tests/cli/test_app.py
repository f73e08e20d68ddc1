"""The program as its user meets it: exit codes, one sentence per mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anchorscope.cli import main

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "smollm2-4k"


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    from anchorscope import write_dump

    g = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("cli") / "dump"
    q, k, v = (torch.randn(h, 300, 16, generator=g) for h in (4, 2, 2))
    write_dump(path, [{"prompt": "p", "layer": i, "q": q, "k": k, "v": v, "scale": 0.25} for i in (0, 3)])
    return path


def run(capsys, *args):
    """Exit code, stdout, stderr of one in-process run."""
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, word, *args, code=2):
    """The run ends with `code` and one sentence on stderr that holds `word`; no traceback."""
    got, _, err = run(capsys, *args)
    assert got == code, err
    assert "Traceback" not in err
    assert word in err.replace("\n", " "), err
    return err


def test_version_and_help(capsys):
    from anchorscope import __version__

    assert run(capsys, "--version")[:2] == (0, f"anchorscope {__version__}\n")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("capture", "info", "analyze", "figures", "bench"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "anchorscope", "--help"], check=True, capture_output=True, cwd=ROOT)
    assert b"capture" in done.stdout


def test_analyze_prints_a_table_within_80_columns(capsys, dump, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(
        capsys, "analyze", dump, "--out", tmp_path / "o", "--block", 16, "--step", 2, "--theta", "1,2", "--no-figures"
    )
    assert code == 0, err
    assert out.startswith("theta 2 of 2: no finite one reaches mean recall 0.95\ngroups of 16 x 2, means")
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert "needs about" in err


def test_many_thetas_make_a_short_table(capsys, dump, tmp_path, monkeypatch):
    """Both ends, the theta of the figures, marked, and steps between; all of them in thetas.csv."""
    monkeypatch.setenv("COLUMNS", "80")
    common = ("analyze", dump, "--out", tmp_path / "o", "--block", 16, "--step", 2, "--theta", "0:20:0.5")
    code, out, err = run(capsys, *common, "--no-figures", "--no-diagnose", "--figure-theta", "7.5")
    assert code == 0, err
    assert out.startswith("theta 7.5, one of 41\n")
    below = out[out.index("all heads, ") :].splitlines()
    table = [line.split("│")[1].strip() for line in below if line.startswith("│")][:9]
    assert table == ["0", "3", "5.5", "> 7.5", "8.5", "11.5", "14.5", "17", "20"]
    assert f"all heads, 9 of 41 thetas; all are in {tmp_path / 'o' / 'thetas.csv'}" in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert len((tmp_path / "o" / "thetas.csv").read_text().splitlines()) == 42
    assert "at theta 7.5" in out
    other = [tmp_path / "p" if x == tmp_path / "o" else x for x in common]
    refused(capsys, "nearest of the 41 from 0 to 20 is 7.5", *other, "--figure-theta", "7.3")
    assert not (tmp_path / "p").exists()
    code, out, _ = run(capsys, "figures", tmp_path / "o", "--theta", "20")
    assert code == 0
    assert len(out.splitlines()) == len(list((tmp_path / "o" / "figures").iterdir())) > 0
    refused(capsys, "not inf; the nearest", "figures", tmp_path / "o", "--theta", "inf")


def test_json_is_the_report_alone(capsys, dump, tmp_path):
    out_dir = tmp_path / "o"
    code, out, _ = run(capsys, "analyze", dump, "--out", out_dir, "--block", 16, "--step", 2, "--no-figures", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((out_dir / "report.json").read_text())


def test_figures_are_redrawn_without_the_dump(capsys, dump, tmp_path):
    copy = shutil.copytree(dump, tmp_path / "d")
    args = ("--block", 16, "--step", 2, "--heatmap", "3:1")
    assert run(capsys, "analyze", copy, "--out", tmp_path / "o", *args)[0] == 0
    pictures = sorted((tmp_path / "o" / "figures").glob("*.png"))
    assert any("layer03-head01-heatmap" in p.name for p in pictures)
    before = {p: p.read_bytes() for p in pictures}
    shutil.rmtree(copy)
    for p in pictures:
        p.unlink()
    code, out, _ = run(capsys, "figures", tmp_path / "o", "--heatmap", "3:1")
    assert code == 0
    assert {Path(line): Path(line).read_bytes() for line in out.split()} == before


def test_analyze_diagnoses_too(capsys, dump, tmp_path, monkeypatch):
    from anchorscope.heads import load_diagnosis
    from anchorscope.report.html import open_sources

    out = tmp_path / "o"
    common = ("analyze", dump, "--out", out, "--block", 16, "--step", 2, "--theta", "3,4", "--no-figures")
    assert "Kinds of head: " in run(capsys, *common)[1]
    found = load_diagnosis(out / "heads")
    assert {(r.layer, r.head) for r in found.rows} == {(i, h) for i in (0, 3) for h in range(4)}
    assert found.report["settings"]["theta"] == 3
    assert [t.path for t in open_sources([out]).diagnostics] == [out / "heads" / "diagnostics.csv"]

    before = (out / "heads" / "heads.json").read_bytes()
    assert run(capsys, *common, "--resume")[0] == 0
    assert (out / "heads" / "heads.json").read_bytes() == before  # not measured again: its starting time is kept
    (out / "heads" / "heads.json").unlink()
    assert run(capsys, *common, "--resume")[0] == 0
    assert load_diagnosis(out / "heads").rows == found.rows

    assert run(capsys, *common, "--overwrite", "--no-diagnose")[0] == 0
    assert not (out / "heads").exists()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--theta", "abc"], "'abc' is not a number"),
        (["--theta", "nan"], "is not a number"),
        (["--theta", ""], "--theta"),
        (["--theta", "3:1:1"], "backwards"),
        (["--block", "0"], "--block 0 is out of range"),
        (["--step", "-1"], "step must be"),
        (["--init", "-1"], "--init -1 is out of range"),
        (["--block", "x"], "--block"),
        (["--layers", "9"], "there are 0,3"),
        (["--layers", "3-0"], "backwards"),
        (["--heads", "4"], "there are 0-3"),
        (["--prompts", "q"], "no prompt 'q'"),
        (["--target-recall", "2"], "target recall"),
        (["--heatmap", "x"], "--heatmap"),
        (["--heatmap", "1:1"], "not analyzed"),
        (["--backend", "cuda"], "--backend"),
        (["--device", "gpu"], "--device"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options_of_analyze(capsys, dump, tmp_path, args, word):
    refused(capsys, word, "analyze", dump, "--out", tmp_path / "o", *args)
    assert not (tmp_path / "o").exists(), "a refused run leaves nothing behind"


def test_missing_hardware_is_named(capsys, dump, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(capsys, "no CUDA GPU", "analyze", dump, "--out", tmp_path / "o", "--device", "cuda")
    refused(capsys, "riton", "analyze", dump, "--out", tmp_path / "o", "--backend", "triton", "--device", "cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(
        capsys,
        "Triton is not installed",
        "analyze",
        dump,
        "--out",
        tmp_path / "o",
        "--backend",
        "triton",
        "--device",
        "cuda",
    )


def test_missing_extra_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("some words")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(
        capsys,
        "anchorscope[hf]",
        "capture",
        "--model",
        "smollm2",
        "--prompt",
        tmp_path / "p.txt",
        "--out",
        tmp_path / "o",
    )
    assert not (tmp_path / "o").exists()


def test_out_that_cannot_be_used(capsys, dump, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(capsys, "is a file", "analyze", dump, "--out", tmp_path / "file")
    refused(capsys, "is a file", "analyze", dump, "--out", tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    refused(capsys, "is not an analysis", "analyze", dump, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "x").read_text() == "x"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_out(capsys, dump, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(capsys, "cannot be made", "analyze", dump, "--out", tmp_path / "locked" / "o")


def test_dumps_that_are_none(capsys, dump, tmp_path):
    out = ("--out", tmp_path / "o")
    refused(capsys, "does not exist", "analyze", tmp_path / "nowhere", *out)
    refused(capsys, "not a dump", "analyze", tmp_path, *out)
    refused(capsys, "is a file", "analyze", dump / "manifest.json", *out)
    broken = shutil.copytree(dump, tmp_path / "broken")
    text = (broken / "manifest.json").read_text()
    (broken / "manifest.json").write_text(text[: len(text) // 2])
    refused(capsys, "truncated", "analyze", broken, *out)
    (broken / "manifest.json").write_text(text)
    victim = sorted(broken.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(capsys, victim.name, "analyze", broken, *out)
    assert not (tmp_path / "o").exists()


def test_full_disk_is_exit_1(capsys, dump, tmp_path, monkeypatch):
    import anchorscope.files as files

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    refused(capsys, "No space left", "analyze", dump, "--out", tmp_path / "o", code=1)
    assert not (tmp_path / "o" / "report.json").exists()
    monkeypatch.undo()
    assert run(capsys, "analyze", dump, "--out", tmp_path / "o", "--no-figures")[0] == 0


def test_little_disk_is_said_before_starting(capsys, dump, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    err = refused(capsys, "free some space", "analyze", dump, "--out", tmp_path / "o", code=1)
    assert "1.0 kB free" in err
    assert "may need" in err
    assert "0.0 GB" not in err


def test_out_of_memory_is_exit_1(capsys, dump, tmp_path, monkeypatch):
    import anchorscope.analysis.backends as backends

    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backends, "profile_head", greedy)
    err = refused(capsys, "out of memory", "analyze", dump, "--out", tmp_path / "o", code=1)
    assert "needs about" in err
    assert "0.0 G" not in err


def test_defect_of_ours_is_no_traceback(capsys, dump, tmp_path, monkeypatch):
    import anchorscope.analysis.backends as backends

    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(backends, "profile_head", broken)
    refused(capsys, "internal error (ZeroDivisionError: oh)", "analyze", dump, "--out", tmp_path / "o", code=1)
    monkeypatch.setenv("ANCHORSCOPE_DEBUG", "1")
    assert "Traceback" in run(capsys, "analyze", dump, "--out", tmp_path / "o")[2]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_130_and_the_run_continues_later(tmp_path):
    from anchorscope import write_dump

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 3000, 32, generator=g) for h in (16, 4, 4))
    write_dump(tmp_path / "d", [{"prompt": "p", "layer": i, "q": q, "k": k, "v": v, "scale": 0.2} for i in range(4)])
    command = [sys.executable, "-m", "anchorscope", "analyze", tmp_path / "d", "--out", tmp_path / "o", "--no-figures"]
    command += ["--block", "16", "--step", "1", "--theta", "0:10:0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    profiles = tmp_path / "o" / "profile"
    while not (profiles.exists() and any(profiles.glob("*.safetensors"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "o" / "report.json").exists()
    done = len(list(profiles.glob("*.safetensors")))
    assert 0 < done < 64
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "o" / "report.json").exists()


def test_real_command_refuses_with_exit_2(tmp_path):
    command = [sys.executable, "-m", "anchorscope", "analyze", tmp_path / "none", "--out", tmp_path / "o"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_sample_dump_analyzes(capsys, tmp_path):
    """The README's first taste: the shipped dump, with the README's own arguments, on one head."""
    args = ("--block", 64, "--step", 4, "--theta", 8, "--layers", 20, "--heads", 6, "--no-figures")
    code, _, err = run(capsys, "analyze", SAMPLE, "--out", tmp_path / "o", *args)
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["dump"]["model"]["name"] == "smollm2"
    row = report["overall"][0]
    assert 0.4 < row["recall_mean"] < 0.9, "layer 20 head 6 is a head that anchors serve badly"


def test_names_mean_nothing_to_the_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a pipe, in which no name takes two lines
    from anchorscope import write_dump
    from anchorscope.cli.common import note, stdout_console

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 200, 8, generator=g) for h in (2, 1, 1))
    names = ("chapter[/]", "book[final].txt", ":smile:", "=1+1")
    model = {"name": "evil\x1b[31m\x9b\u202e", "type": "[/]"}
    write_dump(
        tmp_path / "d",
        [{"prompt": p, "layer": 0, "q": q, "k": k, "v": v, "scale": 0.3} for p in names],
        model=model,
    )
    groups = ("--block", "16", "--step", "2", "--theta", "0", "--no-figures")
    code, out, err = run(capsys, "analyze", tmp_path / "d", "--out", tmp_path / "o", *groups)
    assert code == 0, err
    for name in names:
        assert name in out
    assert "\x1b" not in out + err
    assert "\n'=1+1," in (tmp_path / "o" / "heads.csv").read_text()
    code, out, err = run(capsys, "info", tmp_path / "d")
    assert code == 0, err
    assert "evil\\x1b[31m\\x9b\\u202e" in out
    note("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\nc\n"
    stdout_console().print("[red]x\x07[/]")
    assert capsys.readouterr().out == "[red]x\\x07[/]\n"


def test_closed_input_and_pipes(tmp_path):
    command = f"{sys.executable} -m anchorscope capture --model m --out {tmp_path / 'o'}"
    done = subprocess.run(["bash", "-c", f"{command} --prompt - <&-"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr
    done = subprocess.run(
        ["bash", "-c", f"{command} --token-ids <(echo 1 2 x)"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "not 'x'" in done.stderr
