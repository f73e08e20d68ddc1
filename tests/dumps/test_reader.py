"""Reading tensors: the right heads, and no damage that goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anchorscope.dumps import Dump, open_dump, verify, write_dump
from anchorscope.errors import DumpError, InputError

from .entries import entry


def test_heads_are_picked_by_original_index(tmp_path: Path) -> None:
    source = entry(query_heads=[0, 1, 2, 9, 10, 11], kv_heads=[0, 3])
    dump = write_dump(tmp_path / "d", [source])
    tensors = dump.load(dump.entries[0], [10, 2])
    assert torch.equal(tensors.q, source["q"][[4, 2]])
    assert tensors.k.shape[0] == 2
    assert (tensors.kv_index(10), tensors.kv_index(2)) == (1, 0)
    with pytest.raises(InputError, match="query head 3"):
        dump.load(dump.entries[0], [3])
    with pytest.raises(InputError, match="query head 9 was not loaded"):
        tensors.kv_index(9)
    with pytest.raises(InputError, match="at least one"):
        dump.load(dump.entries[0], [])


def test_a_dump_made_by_hand_with_ten_lines_is_read(tmp_path: Path) -> None:
    q, k = torch.randn(4, 10, 8), torch.randn(2, 10, 8)
    save_file({"q": q, "k": k}, tmp_path / "layer0.safetensors")
    manifest = {
        "format": "anchorscope-dump",
        "version": 1,
        "prompts": [{"name": "mine"}],
        "entries": [{"prompt": "mine", "layer": 0, "file": "layer0.safetensors", "scale": 0.35}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    dump = open_dump(tmp_path)
    assert dump.prompts[0].tokens == 10
    assert dump.entries[0].query_heads == (0, 1, 2, 3)
    assert torch.equal(dump.load(dump.entries[0]).q, q)
    assert verify(tmp_path).state == "unverified"


def test_identity_follows_content(dump: Dump, tmp_path: Path) -> None:
    assert open_dump(dump.path).identity == dump.identity
    other = write_dump(tmp_path / "other", [entry(layer=0, scale=0.5)])
    assert other.identity != dump.identity


def test_truncated_manifest_and_tensor_file(dump: Dump) -> None:
    path = dump.path / dump.entries[1].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DumpError, match="truncated"):
        open_dump(dump.path)
    checked = verify(dump.path)
    assert (checked.state, [c.layer for c in checked.damaged]) == ("damaged", [3])
    path.write_bytes(whole)
    manifest = dump.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(DumpError, match=r"manifest\.json is truncated"):
        open_dump(dump.path)


def test_a_flipped_bit_is_found_before_the_tensor_is_used(dump: Dump) -> None:
    path = dump.path / dump.entries[0].file
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    reopened = open_dump(dump.path)
    with pytest.raises(DumpError, match="checksum"):
        reopened.load(reopened.entries[0])
    assert reopened.load(reopened.entries[1]).q.shape == (6, 40, 8)
    assert [c.state for c in verify(dump.path).checks] == ["damaged", "verified"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nonfinite_values_are_named_by_layer_and_head(tmp_path: Path, name: str, value: float) -> None:
    source = entry(layer=5)
    source[name] = source[name].clone()
    source[name][1, 17, 3] = value
    with pytest.raises(InputError, match=rf"layer 5.*{name} of (query|kv) head 1 holds NaN"):
        write_dump(tmp_path / "d", [source])
    assert not (tmp_path / "d").exists()
    # a foreign file gets past the writer, not past the reader
    save_file({n: source[n].contiguous() for n in "qkv"}, tmp_path / "x.safetensors")
    manifest = {"format": "anchorscope-dump", "version": 1, "prompts": [{"name": "p"}]}
    manifest["entries"] = [{"prompt": "p", "layer": 5, "file": "x.safetensors", "scale": 1.0}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    opened = open_dump(tmp_path)
    with pytest.raises(DumpError, match=rf"{name} of layer 5, (query|kv) head 1 holds NaN"):
        opened.load(opened.entries[0])
    assert verify(tmp_path).state == "damaged"


def test_large_finite_float32_is_fine(tmp_path: Path) -> None:
    big = torch.full((1, 300, 8), 3e38)
    dump = write_dump(tmp_path / "d", [{"prompt": "p", "layer": 0, "q": big, "k": 1 / big, "scale": 1.0}])
    assert torch.equal(dump.load(dump.entries[0]).q, big)
