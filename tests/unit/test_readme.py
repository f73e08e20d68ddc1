"""What README and docs tell a reader to type works: Python runs, commands and options exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from byte_model import byte_tokenizer
from sparse_models import everywhere
from tiny_models import random_model

import anchorscope
from anchorscope.cli.app import app
from anchorscope.models import LoadedModel

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `anchorscope ...` line that stands in a block of its own."""
    text = page.read_text(encoding="utf-8")
    indented = re.findall(r"(?:^    .*\n)+", text, re.M)
    for block in [*blocks(page, "", "sh", "bash", "console"), *indented]:
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("anchorscope "):
                yield shlex.split(line, comments=True)[1:]


def test_the_run_section_of_the_readme_runs(tmp_path, monkeypatch) -> None:
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "sparse_attention" in block]
    model = random_model("llama", vocab_size=256, max_position_embeddings=16_384)
    asked: list[str] = []

    def load(source: str) -> LoadedModel:
        asked.append(source)
        return LoadedModel(model, byte_tokenizer(), source, None)

    (tmp_path / "demo" / "calibration").mkdir(parents=True)
    everywhere(model, 1.0).save(tmp_path / "demo" / "calibration" / "anchors.json")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anchorscope, "load_model", load)
    names: dict[str, Any] = {}
    exec(compile(code.replace("[:9000]", "[:900]"), "README.md", "exec"), names)
    assert asked == ["smollm2"]
    assert [layer.kind for layer in names["run"].layers()] == ["sparse"] * 2
    assert names["output"].shape[1] > 900


def test_the_python_section_of_the_readme_runs(tmp_path, monkeypatch) -> None:
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "write_dump" in block]
    monkeypatch.chdir(tmp_path)
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 600, 64, generator=made) for heads in (2, 1, 1))
    names: dict[str, Any] = {"q": q, "k": k, "v": v}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].report["overall"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        if words[0] in ("--help", "--version", "--install-completion", "--show-completion"):
            continue
        assert words[0] in known, words
        options = {
            name for parameter in known[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in {*options, "--help"}, (page.name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), (page.name, target)


def test_the_readme_has_commands_and_links() -> None:
    """The checks above have something to look at."""
    assert len(list(commands(ROOT / "README.md"))) > 8
    assert sum(len(list(commands(page))) for page in PAGES) > 30
