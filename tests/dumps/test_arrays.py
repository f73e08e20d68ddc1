"""`write_dump`: what is written is read back exactly, and what does not fit leaves nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anchorscope.dumps import Dump, open_dump, verify, write_dump
from anchorscope.errors import InputError, RunFailure

from .entries import entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [True, False])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, values: bool) -> None:
    source = entry(layer=2, dtype=dtype)
    source = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in source.items()}
    if not values:
        del source["v"]
    dump = write_dump(tmp_path / "d", [source])
    (e,) = dump.entries
    tensors = dump.load(e)
    assert torch.equal(tensors.q, source["q"])
    assert torch.equal(tensors.k, source["k"])
    assert (tensors.v is None) if not values else torch.equal(tensors.v, source["v"])
    assert (e.tokens, e.head_dim, e.has_values, e.scale, e.window, e.softcap) == (
        40,
        8,
        values,
        0.25,
        None,
        None,
    )
    assert verify(dump).state == "verified"
    # an independent reader sees the same tensors
    independent = load_file(dump.path / e.file)
    assert all(torch.equal(independent[name], source[name]) for name in independent)
    assert hashlib.sha256((dump.path / e.file).read_bytes()).hexdigest() == e.sha256


def test_numpy_and_strided_input(tmp_path: Path) -> None:
    q = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    k = torch.randn(5, 1, 4).transpose(0, 1)  # not contiguous
    dump = write_dump(tmp_path / "d", [{"prompt": "x", "layer": 0, "q": q, "k": k, "scale": 1}])
    tensors = dump.load(dump.entries[0])
    assert np.array_equal(tensors.q.numpy(), q)
    assert torch.equal(tensors.k, k)


WRITE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"scale": None}, "lacks 'scale'"),
    "unknown key": ({"windows": 3}, "unknown key 'windows'"),
    "name": ({"prompt": ""}, "prompt must be a name"),
    "layer": ({"layer": -1}, "layer must be"),
    "scale": ({"scale": float("inf")}, "scale must be"),
    "window": ({"window": 0}, "window must be"),
    "softcap": ({"softcap": 0.0}, "softcap must be"),
    "heads": ({"query_heads": [3, 2, 1, 0, 5, 4]}, "ascending"),
    "head count": ({"query_heads": [0, 1, 2]}, "names 3 heads for 6 rows"),
    "rank": ({"q": torch.ones(4, 8)}, "must be"),
    "k tokens": ({"k": torch.ones(2, 39, 8).bfloat16()}, "must be"),
    "mixed dtype": ({"k": torch.ones(2, 40, 8)}, "all of one dtype"),
    "float64": ({n: torch.ones(2, 40, 8).double() for n in "qkv"}, "convert the tensors"),
    "uneven": ({"k": torch.ones(4, 40, 8).bfloat16(), "v": torch.ones(4, 40, 8).bfloat16()}, "evenly"),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_write_faults_leave_nothing(tmp_path: Path, fault: str) -> None:
    change, message = WRITE_FAULTS[fault]
    with pytest.raises(InputError, match=message):
        write_dump(tmp_path / "deep" / "d", [entry(layer=1), {**entry(layer=2), **change}])
    assert list(tmp_path.iterdir()) == []


def test_other_write_faults(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one entry"):
        write_dump(tmp_path / "d", [])
    with pytest.raises(InputError, match="is in the dump already"):
        write_dump(tmp_path / "d", [entry(), entry()])
    with pytest.raises(InputError, match="41 tokens where the prompt has 40"):
        write_dump(tmp_path / "d", [entry(layer=0), entry(layer=1, tokens=41)])
    with pytest.raises(InputError, match="no entry uses"):
        write_dump(tmp_path / "d", [entry()], prompts={"b": {}})
    with pytest.raises(InputError, match="3 token ids for 40 tokens"):
        write_dump(tmp_path / "d", [entry()], prompts={"a": {"token_ids": [1, 2, 3]}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def full(self: Path, *args: Any, **options: Any) -> Any:
        if self.name.endswith("layer001.safetensors.partial"):
            self.symlink_to("/dev/full")
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunFailure, match="disk is full"):
        write_dump(tmp_path / "d", [entry(layer=0), entry(layer=1, tokens=40)])
    assert list(tmp_path.iterdir()) == []


def texts_dump(folder: Path, **more: object) -> Dump:
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    entry = {"prompt": "p", "layer": 0, "q": x, "k": x, "scale": 1.0}
    return write_dump(folder, [entry], prompts={"p": {"token_ids": [5, 1, 2, 5]}}, **more)  # type: ignore[arg-type]


def test_token_texts_are_kept_for_the_ids_used(tmp_path: Path) -> None:
    dump = texts_dump(tmp_path / "d", token_texts={5: " the", 1: b"\xc3", 2: b"\xa9", 99: "never"})
    assert dump.manifest["token_texts"] == {"1": [0xC3], "2": [0xA9], "5": " the"}
    again = open_dump(tmp_path / "d")
    assert again.vocabulary is not None
    assert again.vocabulary.passage(again.prompts[0].token_ids or []) == " the\u00e9 the"
    assert verify(again).state == "verified"


def test_a_tokenizer_tells_the_texts(tmp_path: Path) -> None:
    class Words:
        def convert_ids_to_tokens(self, i: int) -> str:
            return f"\u2581{i}"

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens).replace("\u2581", " ")

    dump = texts_dump(tmp_path / "d", tokenizer=Words())
    assert dump.manifest["token_texts"] == {"1": " 1", "2": " 2", "5": " 5"}


def test_a_dump_without_texts_is_what_it_was(tmp_path: Path) -> None:
    """No new key where nothing is known, so that the same content keeps its identity."""
    dump = texts_dump(tmp_path / "d")
    assert "token_texts" not in dump.manifest
    assert dump.vocabulary is None
    with_texts = texts_dump(tmp_path / "e", token_texts={5: "x"})
    assert with_texts.identity != dump.identity
    assert [e.sha256 for e in with_texts.entries] == [e.sha256 for e in dump.entries]


@pytest.mark.parametrize("texts", [{"5": "a"}, {5: 7}, {-1: "a"}])
def test_texts_of_another_form_are_refused(tmp_path: Path, texts: dict[object, object]) -> None:
    with pytest.raises(InputError, match="token_texts must hold text or bytes"):
        texts_dump(tmp_path / "d", token_texts=texts)
    assert not (tmp_path / "d").exists()
