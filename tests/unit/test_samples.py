"""The sample prompts are what samples/README.md says, and the needle prompt is what its script makes."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
PROMPTS = SAMPLES / "prompts"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_needles", SAMPLES / "make_needles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_lists_every_prompt_with_its_hash_and_size() -> None:
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    hashes = {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  prompts/(\S+)", readme)}
    files = {path.name: path.read_bytes() for path in PROMPTS.iterdir()}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == hashes
    for name, data in files.items():
        assert f"`prompts/{name}`" in readme
        assert f"{len(data):,}" in readme
        assert 40_000 < len(data) < 120_000
        data.decode("ascii")


def test_script_rewrites_the_committed_prompt(tmp_path: Path) -> None:
    out = tmp_path / "needles.txt"
    subprocess.run([sys.executable, str(SAMPLES / "make_needles.py"), "--out", str(out)], check=True)
    assert out.read_bytes() == (PROMPTS / "needles.txt").read_bytes()


@pytest.mark.parametrize(
    ("needles", "size", "seed"), [(32, 48_000, 20_251), (2, 1_800, 1), (8, 20_000, 3), (60, 60_000, 4)]
)
def test_every_needle_is_hidden_once_and_asked_once(maker: ModuleType, needles: int, size: int, seed: int) -> None:
    text = maker.make(needles, size, seed)
    story, questions = text.split("\n\nQuestions\n\n")
    facts = re.findall(r"the door code of the ([a-z]+ [a-z-]+) is (\d{3}-\d{3})\.", story)
    assert len(facts) == len(dict(facts)) == needles
    asked = re.findall(r"the door code of the ([a-z]+ [a-z-]+)\?\nAnswer:(?: (\d{3}-\d{3}))?", questions)
    assert len(asked) == needles
    assert {place: dict(facts)[place] for place, _ in asked[:-1]} == dict(asked[:-1])
    assert asked[-1][1] == ""  # the last answer is the reader's
    assert text.endswith("Answer:\n")
    assert size <= len(text) < size + 3_000
    depths = [story.index(f"of the {place} is") / len(story) for place, _ in facts]
    assert max(b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)) < 2.5 / needles


@pytest.mark.parametrize(("needles", "size"), [(1, 48_000), (193, 1_000_000), (32, 5_000)])
def test_impossible_prompts_are_refused(maker: ModuleType, needles: int, size: int) -> None:
    with pytest.raises(ValueError, match="needles"):
        maker.make(needles, size, 0)


def test_the_study_has_a_place_for_every_table(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("study", SAMPLES / "study.py")
    assert spec is not None
    assert spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    source = (SAMPLES / "study.py").read_text(encoding="utf-8")
    blocks = re.findall(r'^        "([a-z0-9-]+)": [a-z_]+\(', source, re.M)
    assert len(blocks) == 8
    copy = tmp_path / "study.md"
    copy.write_bytes(study.DOCUMENT.read_bytes())
    study.rewrite(copy, dict.fromkeys(blocks, "NEW"))
    assert copy.read_text(encoding="utf-8").count("NEW") == len(blocks)
    with pytest.raises(SystemExit, match="lacks the marks of nonsense"):
        study.rewrite(copy, {"nonsense": ""})
