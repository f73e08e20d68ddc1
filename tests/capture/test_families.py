"""Model families: supported ones are captured exactly, whole and in chunks; others are refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.errors import InputError, RunFailure

pytest.importorskip("transformers")

from families import NO_CHUNKS, REFUSED, SUPPORTED, TOLERANCE, Row, prompt, run_family, tiny

# one of each kind in the default tier, everything in the slow one
QUICK = [
    "bamba",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "jamba",
    "llama",
    "minimax",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "smollm3",
    "starcoder2",
]
TABLE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(row: Row) -> None:
    assert row.reason == ""
    assert row.output_error < TOLERANCE
    if row.family in NO_CHUNKS:
        assert row.chunk_error is None
        assert re.search(r"in chunks|keeps no KV cache|failed in its own code", row.chunk_reason)
    else:
        assert row.chunk_error is not None
        assert row.chunk_error < TOLERANCE


@pytest.mark.parametrize("family", QUICK)
def test_supported(tmp_path: Path, family: str) -> None:
    check(run_family(family, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SUPPORTED.keys() - set(QUICK)))
def test_supported_too(tmp_path: Path, family: str) -> None:
    check(run_family(family, tmp_path))


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name_and_reason(tmp_path: Path, family: str) -> None:
    message = REFUSED[family][1]
    with pytest.raises(InputError, match=message):
        capture_model(tiny(family), [prompt(40)], tmp_path / "d", notify=lambda _: None)
    assert not (tmp_path / "d").exists()


def test_the_table_is_complete() -> None:
    """docs/families.md is what the families' run wrote: every family in its section, with its reason."""
    good, bad = TABLE.read_text(encoding="utf-8").split("## Refused")
    assert re.findall(r"^\| (\w+) \|", good.split("|---|", 1)[1], re.M) == sorted(SUPPORTED)
    rows = dict(re.findall(r"^\| (\w+) \| \w+ \| (.+) \|$", bad.split("|---|", 1)[1], re.M))
    assert sorted(rows) == sorted(REFUSED)
    for family, (_, message) in REFUSED.items():
        assert message in rows[family]
    refused = re.findall(r"^\| (\w+) \|.*refused \(1\) \|$", good, re.M)
    assert tuple(refused) == NO_CHUNKS


def test_hybrids_say_which_layers_are_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    dump = capture_model(tiny("qwen3_next"), [prompt(40)], tmp_path / "d", notify=said.append)
    assert [e.layer for e in dump.entries] == [2]
    assert "layers 0, 1 use no softmax attention and are left out" in said
    with pytest.raises(InputError, match="layer 0 uses no softmax attention"):
        capture_model(tiny("qwen3_next"), [prompt(40)], tmp_path / "e", layers=[0], notify=said.append)


def test_a_model_that_fails_itself_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(5, 48))
    with pytest.raises(RunFailure, match="failed in its own code: RuntimeError: mat1"):
        capture_model(model, [prompt(40)], tmp_path / "d", notify=lambda _: None)
    assert not (tmp_path / "d").exists()
