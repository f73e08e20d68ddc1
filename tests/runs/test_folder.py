"""Folders as their readers meet them; locks; what an interruption looks like to a shell."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from anchorscope import analyze, load_report, redraw, write_dump
from anchorscope.cli import app as app_module
from anchorscope.cli import main
from anchorscope.errors import DumpError, InputError, Interrupted
from anchorscope.locks import LOCK, folder_lock
from anchorscope.params import AnchorParams
from anchorscope.report import html

ROOT = Path(__file__).parents[2]
HOW = {"thetas": (4.0,), "params": AnchorParams(16, 2), "device": "cpu"}


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump") / "d"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 150, 8, generator=g) for h in (2, 1, 1))
    write_dump(folder, [{"prompt": "p", "layer": 0, "q": q, "k": k, "v": v, "scale": 0.5}])
    return folder


@pytest.fixture(scope="module")
def analysis(dump, tmp_path_factory):
    return analyze(dump, tmp_path_factory.mktemp("out") / "o", figures=False, diagnose=True, **HOW).path


@pytest.fixture
def copy(analysis, tmp_path):
    return shutil.copytree(analysis, tmp_path / "o")


COMMAND = ("--block", "16", "--step", "2", "--theta", "4", "--device", "cpu", "--no-figures")


def test_the_command_finishes_what_a_kill_before_the_diagnostics_left(dump, copy, capsys):
    """As the version before left it: a report, no diagnostics, and nothing that says they were asked for."""
    want = (copy / "heads" / "heads.json").read_bytes()
    shutil.rmtree(copy / "heads")
    state = json.loads((copy / "analysis.json").read_text())
    del state["asked"]
    (copy / "analysis.json").write_text(json.dumps(state))
    assert main(["analyze", str(dump), "--out", str(copy), *COMMAND]) == 0
    got = json.loads((copy / "heads" / "heads.json").read_bytes())
    assert {**json.loads(want), "started": ""} == {**got, "started": ""}
    capsys.readouterr()
    assert main(["analyze", str(dump), "--out", str(copy), *COMMAND]) == 2
    assert "holds a finished analysis" in capsys.readouterr().err


def test_the_report_is_the_last_file_of_all(analysis):
    files = [p for p in analysis.rglob("*") if p.is_file() and p.name != LOCK]
    last = max(files, key=lambda p: p.stat().st_mtime_ns)
    assert last == analysis / "report.json"


@pytest.mark.parametrize("victim", ["heads/heads.json", "heads"])
def test_a_page_says_that_diagnostics_are_missing(copy, victim):
    path = copy / victim
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    sources = html.open_sources([copy])
    assert len(sources.remarks) == 1
    assert ("unfinished" if victim.endswith("json") else "gone") in sources.remarks[0]
    assert sources.runs[0].report["warnings"][-1] == sources.remarks[0]
    assert sources.diagnostics == ()


def test_a_whole_analysis_needs_no_remark(analysis):
    sources = html.open_sources([analysis])
    assert sources.remarks == ()
    assert len(sources.diagnostics) == 1


def test_readers_refuse_an_unfinished_analysis(copy, capsys):
    (copy / "report.json").unlink()
    for read in (load_report, redraw, lambda p: html.open_sources([p])):
        with pytest.raises(DumpError, match=r"unfinished.*give the same .*command again"):
            read(copy)
    assert main(["figures", str(copy)]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert not (copy / "figures").exists()


@pytest.mark.parametrize(
    ("form", "name", "table"),
    [
        ("anchorscope-compare-run", "comparison", "methods.csv"),
        ("anchorscope-heads-run", "diagnosis", "diagnostics.csv"),
    ],
)
def test_a_page_refuses_unfinished_tables(analysis, tmp_path, form, name, table):
    folder = tmp_path / "beside"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"format": form, "started": "t"}))
    for _ in range(2):  # killed while measuring, and after its table
        with pytest.raises(DumpError, match=rf"unfinished {name}.*command again"):
            html.open_sources([analysis, folder])
        (folder / table).write_text("prompt,layer,head,method,recall,density\np,0,0,x,1,1\n")


def test_figures_come_back(dump, tmp_path):
    analyze(dump, tmp_path, heatmaps=[(0, 0)], **HOW)
    want = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert len(want) == 4
    damaged, gone, *_ = sorted(want)
    (tmp_path / "figures" / damaged).write_bytes(b"damaged")
    (tmp_path / "figures" / gone).unlink()
    assert len(redraw(tmp_path, heatmaps=[(0, 0)])) == 4
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()} == want


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(tmp_path):
        assert "offers no locks" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_held_lock_is_said_to_be_held(tmp_path):
    with folder_lock(tmp_path), pytest.raises(InputError, match="another run"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):  # free again
        pass


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_what_is_kept(dump, tmp_path, monkeypatch, capsys, number, code):
    import anchorscope.analysis.run as run_module

    threads, real = threading.active_count(), run_module.report_json

    def finish(*arguments):
        signal.raise_signal(number)
        return real(*arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "report_json", finish)
        assert main(["analyze", str(dump), "--out", str(tmp_path / "o"), *COMMAND]) == code
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == (
        f"error: interrupted; 2 of 2 heads are kept in {tmp_path / 'o'}: give the same command again to continue"
    )
    assert signal.getsignal(number) is before
    assert threading.active_count() == threads
    assert not (tmp_path / "o" / "report.json").exists()
    assert main(["analyze", str(dump), "--out", str(tmp_path / "o"), *COMMAND]) == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interruption_within_a_finalizer_is_not_lost(dump, tmp_path, monkeypatch, capsys):
    """Python drops what is raised there; matplotlib's figures leave through many finalizers."""
    import anchorscope.analysis.run as run_module

    class Leaving:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    went_on = []

    def finish(*_):
        Leaving()
        went_on.append(True)
        for _ in range(1000):  # until the second time; it takes a twentieth of a second
            time.sleep(0.01)
        raise AssertionError("the interruption was lost")

    hook = sys.unraisablehook
    monkeypatch.setattr(run_module, "report_json", finish)
    assert main(["analyze", str(dump), "--out", str(tmp_path / "o"), *COMMAND]) == 130
    assert went_on
    err = capsys.readouterr().err
    assert "2 of 2 heads are kept" in err
    assert "Traceback" not in err
    assert sys.unraisablehook is hook
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interruption_that_a_library_turned_into_an_error_is_still_one(monkeypatch, capsys, dump):
    """As imports do: `import torch` stopped half-way is an ImportError."""

    def fails(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half of a library") from None

    monkeypatch.setattr(app_module, "app", fails)
    assert main(["info", str(dump)]) == 130
    assert capsys.readouterr().err == f"error: {app_module.INTERRUPTED}\n"


def test_the_exit_code_is_130_wherever_the_interruption_passed_through(tmp_path):
    """Python remembers a KeyboardInterrupt of code that a library ran as text, and would die of the signal for it."""
    code = """
import ctypes
import anchorscope.cli
from anchorscope import __main__ as program

def main():
    run = ctypes.pythonapi.PyRun_String
    run.argtypes, run.restype = [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object], ctypes.py_object
    try:
        run(b"raise KeyboardInterrupt", 257, {}, {})
    except KeyboardInterrupt:
        print("told")
        return 130

anchorscope.cli.main = main
program.run()
"""
    (tmp_path / "stopped.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert (done.returncode, done.stdout) == (130, "told\n"), done.stderr


def test_an_interruption_stays_a_keyboard_interrupt(dump, tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        analyze(dump, tmp_path / "o", progress=stop, **HOW)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception)
