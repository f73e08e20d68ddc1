"""--format and --dpi of every command that draws: refused before anything is read, and one option for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anchorscope import load_report, write_dump
from anchorscope.cli import main

COMMANDS = {
    "analyze": ["nowhere", "--out", "o"],
    "figures": ["nowhere"],
    "merge": ["nowhere", "--out", "o"],
    "heads": ["nowhere", "--out", "o"],
    "compare": ["nowhere", "--out", "o"],
    "calibrate": ["nowhere", "--out", "o"],
    "evaluate": ["--model", "nowhere", "--task", "needle", "--theta", "8", "--out", "o"],
    "bench": ["nowhere", "--out", "o"],
}
REFUSED = [
    (["--format", "gif"], "--format: 'gif' is no format of figures; there are png, pdf and svg"),
    (["--format", "png,"], "--format: '' is no format"),
    (["--dpi", "29"], "--dpi must be a whole number of pixels per inch from 30 to 600, not 29"),
    (["--dpi", "9999"], "--dpi must be a whole number of pixels per inch from 30 to 600, not 9999"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_drawn_is_refused_first(command, options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("figures", "bench")])
def test_figures_are_not_described_and_refused_at_once(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], "--no-figures", "--format", "svg"]) == 2
    assert "--no-figures and --format contradict each other" in " ".join(capsys.readouterr().err.split())


def test_a_bench_without_a_folder_draws_nothing(capsys):
    assert main(["bench", "--format", "svg"]) == 2
    assert "give --out too" in " ".join(capsys.readouterr().err.split())


def test_an_analysis_is_drawn_again_in_other_formats(tmp_path, capsys):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 96, 8)).astype(np.float32), rng.normal(size=(1, 96, 8)).astype(np.float32)
    layer = {"prompt": "prose", "layer": 3, "q": q, "k": k, "scale": 0.5}
    write_dump(tmp_path / "d", [layer], model={"name": "toy/$m$"})
    out = str(tmp_path / "o")
    how = ["--block", "8", "--step", "2", "--theta", "2", "--no-diagnose", "--out", out]
    assert main(["analyze", str(tmp_path / "d"), *how, "--format", "svg"]) == 0
    figures = tmp_path / "o" / "figures"
    assert {p.suffix for p in figures.iterdir()} == {".svg"}
    svg = (figures / "prose-grid.svg").read_text(encoding="utf-8")
    assert "toy/$m$" in svg
    assert "prose, 96 tokens" in svg
    assert "groups of 8 x 2" in svg
    assert "theta 2" in svg
    before = svg
    capsys.readouterr()
    assert main(["figures", out, "--format", "pdf,svg", "--heatmap", "3:0"]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.split()]
    assert {p.suffix for p in drawn} == {".pdf", ".svg"}
    assert all(p.stat().st_size > 1000 for p in drawn)
    assert (figures / "prose-grid.svg").read_text(encoding="utf-8") == before
    assert load_report(out)["format"] == "anchorscope-report"
