"""Model families: each is captured right, whole and in chunks, or refused with a reason, whatever transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, prompt, tiny
from family_runs import CORE, REASON, UnknownFamily, check, parse_table, run_family

from anchorscope.capture import capture_model
from anchorscope.errors import InputError, RunFailure

TABLE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_captured_right_or_refused_with_a_reason(tmp_path: Path, family: str) -> None:
    try:
        row = run_family(family, tmp_path)
    except UnknownFamily as error:
        pytest.skip(str(error))
    check(row)
    version, good, bad = parse_table(TABLE)
    if version == transformers.__version__:  # what the document says of this version is true
        line = good.get(family) or bad[family]
        assert line.startswith(row.stable())
        assert (family in bad) == bool(row.reason)
        assert row.reason or line.endswith(" refused (1) |") == (row.chunk_error is None)


def test_the_table_names_every_family_and_its_reason() -> None:
    version, good, bad = parse_table(TABLE)
    assert version[0].isdigit()
    assert sorted([*good, *bad]) == sorted(FAMILIES)
    assert set(CORE) <= set(good)
    assert all(REASON.search(line) for line in bad.values())
    assert f"## Supported: {len(good)}\n" in TABLE
    assert f"## Refused: {len(bad)}\n" in TABLE


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
