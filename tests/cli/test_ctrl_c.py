"""Ctrl-C: what is kept, how to go on, exit code 130; every command, interrupted by a real signal in a real process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_model import byte_model, byte_tokenizer
from resumable import Inputs

from anchorscope.cli.app import main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

# Runs the program, and presses Ctrl-C as soon as it shows progress and holds a file of the pattern KEPT.
PROGRAM = """
import glob, os, signal, sys
from contextlib import contextmanager
from anchorscope.cli import analyze, bench, calibrate, capture, compare, evaluate, heads

@contextmanager
def bar():
    def update(event):
        if glob.glob(os.environ["KEPT"], recursive=True) and (getattr(event, "work", 0) or getattr(event, "done", 0)):
            os.kill(os.getpid(), signal.SIGINT)
    yield update

for module in (analyze, bench, calibrate, compare, evaluate, heads):
    module.progress_bar = bar
capture._progress = bar
from anchorscope.cli.app import main
sys.exit(main(sys.argv[1:]))
"""
AGAIN = "give the same command again to continue"
COMMANDS = {
    "analyze": (
        "analyze DUMP --block 16 --step 2 --no-figures --no-diagnose",
        r"1 of 4 heads is kept",
        "profile/*.safetensors",
    ),
    "compare": ("compare DUMP --methods streaming --no-figures", r"1 of 4 heads is kept", "scores/*.json"),
    "heads": ("heads DUMP --block 16 --step 2 --no-figures", r"1 of 2 layers is kept", "parts/*.json"),
    "calibrate": (
        "calibrate DUMP --groups 16x2 --holdout code --no-figures",
        r"1 of 4 heads is kept",
        "analysis/*/profile/*.safetensors",
    ),
    "bench": (
        "bench DUMP --lengths 64,96 --block 16 --step 2 --repeats 1 --theta 3",
        r"1 of 4 timed inputs is kept",
        "parts/*.json",
    ),
    "evaluate": (
        "evaluate --model MODEL --prompt TEXT --prompt TEXT --theta 2 --block 16 --step 2 --lengths 90 --no-figures",
        r"[12] of 4 prefills (is|are) kept",
        "parts/*-arm*.safetensors",
    ),
    "capture": ("capture --model MODEL --text TEXTS --layers 0,1,2", r"1 of 3 layers is kept", "*.safetensors"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("ctrl-c")
    Inputs.make(base, 96)
    byte_model().save_pretrained(base / "model")
    byte_tokenizer().save_pretrained(base / "model")
    (base / "text").write_text("A train went through the valley, and nobody was in it. " * 4)
    return {
        "DUMP": str(base / "dump"),
        "MODEL": str(base / "model"),
        "TEXT": str(base / "text"),
        "TEXTS": "some words to run",
    }


def interrupted(given: list[str], kept: str) -> str:
    """The last line of stderr of a run that is interrupted."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KEPT": kept}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_says_what_is_kept(capsys, places, tmp_path, name):
    line, kept, files = COMMANDS[name]
    out = tmp_path / "out"
    given = [*(places.get(x, x) for x in line.split()), "--device", "cpu", "--out", str(out)]
    said = interrupted(given, str(out / files))
    again = AGAIN.replace("again", "again with --resume") if name == "capture" else AGAIN
    assert re.fullmatch(rf"error: interrupted; {kept} in {re.escape(str(out))}: {again}", said), said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*given, *(["--resume"] if name == "capture" else [])]) == 0, capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("line", ["bench DUMP --lengths 64,96 --block 16 --step 2 --repeats 1 --theta 3"])
def test_a_command_that_keeps_nothing_says_so(places, line):
    said = interrupted([*(places.get(x, x) for x in line.split()), "--device", "cpu"], "/")
    assert said == "error: interrupted; nothing was written"


def test_an_interruption_before_anything_is_kept(capsys, places, tmp_path, monkeypatch):
    import anchorscope.dumps

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(anchorscope.dumps, "open_dump", stop)
    assert main(["analyze", places["DUMP"], "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert not Path(tmp_path / "o").exists()
