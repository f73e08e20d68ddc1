"""What a dump knows about its model reaches whoever uses the dump, in plain words and within 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.cli import main
from anchorscope.dumps import DumpWriter
from anchorscope.proof import PromptProof

PROMPTS = {
    "fine": PromptProof(256, 8192, 49152, 2.9, 0.41),
    "noise-of-a-very-long-name-that-has-to-fold": PromptProof(256, 131072, 49152, 11.2, 0.0),
    "unscored": PromptProof(0, 300, reason="LlamaModel has no language-model head"),
}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    header = {
        "prompts": [{"name": name, "tokens": 300} for name in PROMPTS],
        "proof": {
            "loader": {"unexpected": ["a", "b"], "metadata": {"keys": {"x": 1, "y": 2}, "set": {"rope\x1b": 3}}},
            "warnings": ["1 weights \x1b[31m are odd"],
        },
    }
    with DumpWriter(tmp_path / "d", header) as writer:
        for name, proof in PROMPTS.items():
            shape = {"query_heads": [0], "kv_heads": [0], "tokens": 300, "head_dim": 16, "dtype": "fp32"}
            layer = writer.layer(name, 0, **shape, scale=0.25)  # type: ignore[arg-type]
            for tensor in "qkv":
                layer.put(tensor, 0, torch.randn(1, 300, 16, generator=g))
            layer.close()
            writer.prove(name, proof.to_json())
        return writer.finish().path


def run(capsys: Any, *args: object) -> tuple[str, str]:
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr()


def doubts(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning: ") and "than chance" in line]


def test_info_shows_it(capsys: Any, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out, err = run(capsys, "info", dump)
    assert (
        "loader no weight missing, 2 of the checkpoint's tensors unused; the config agrees with 2 keys of the file's"
        " metadata, after rope\\x1b were set to it"
    ) in " ".join(out.split())
    rows = [line.split() for line in out.splitlines()]
    assert ["fine", "256", "8192", "18.174", "41.0%"] in rows
    assert any(row[1:] == ["256", "131072", "73130", "0.0%", "near", "chance"] for row in rows)
    assert "not scored:" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("dump ", "loader "))) <= 80
    assert doubts(err) == [
        "warning: the model predicts the last 256 tokens of prompt noise-of-a-very-long-name-that-has-to-fold no better"
        " than chance (perplexity 73,130.4, vocabulary 49,152): its weights may be missing or damaged, the tokenizer"
        " may be another model's, or the text is noise"
    ]
    assert r"warning: 1 weights \x1b[31m are odd" in err
    assert "\x1b" not in err


def test_info_as_json(capsys: Any, dump: Path) -> None:
    found = json.loads(run(capsys, "info", dump, "--json")[0])
    assert found["proof"]["loader"]["unexpected"] == ["a", "b"]
    assert [p["proof"]["near_chance"] for p in found["prompts"]] == [False, True, False]
    assert found["prompts"][0]["proof"]["perplexity"] == pytest.approx(18.17415, rel=1e-6)
    assert found["prompts"][2]["proof"]["reason"] == PROMPTS["unscored"].reason


@pytest.mark.parametrize(
    "command",
    [
        ("analyze", "--no-figures", "--no-diagnose", "--block", "16", "--step", "2"),
        ("heads", "--no-figures", "--block", "16", "--step", "2"),
        ("compare", "--no-figures", "--methods", "streaming"),
        ("calibrate", "--no-figures", "--groups", "16x2"),
    ],
)
def test_whoever_reads_the_dump_is_warned(capsys: Any, dump: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    assert len(doubts(run(capsys, name, dump, "--out", tmp_path / "o", *options)[1])) == 1
    if name != "calibrate":
        args = (name, dump, "--out", tmp_path / "p", *options, "--prompts", "fine")
        assert doubts(run(capsys, *args)[1]) == []  # the prompt in doubt is not in use


def test_where_chance_begins() -> None:
    assert PromptProof(256, 512, 50_000, 0.68 * 10.82).near_chance
    assert not PromptProof(256, 512, 50_000, 0.65 * 10.82).near_chance
    assert not PromptProof(7, 8, 50_000, 12.0).near_chance  # a few tokens say too little
    assert "hardly better than chance" in (PromptProof(256, 512, 50_000, 9.0).warning("p") or "")
    assert PromptProof(256, 512, 50_000, 3.0).warning("p") is None
