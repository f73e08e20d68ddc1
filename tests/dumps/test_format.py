"""Manifests and tensor files of anybody's: whatever is wrong is said, never accepted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anchorscope.dumps import Dump, open_dump, verify
from anchorscope.errors import DumpError

from .entries import edit

MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer version": (lambda m: m.update(version=2), "upgrade anchorscope"),
    "version true": (lambda m: m.update(version=True), "no valid format version"),
    "other format": (lambda m: m.update(format="x"), "not an AnchorScope manifest"),
    "no entries": (lambda m: m.update(entries=[]), "at least one element"),
    "entries no list": (lambda m: m.update(entries={}), "must be a list"),
    "entry no object": (lambda m: m["entries"].append(3), "entry 2 is not an object"),
    "duplicate entry": (lambda m: m["entries"].append(m["entries"][0]), "twice"),
    "same file": (lambda m: m["entries"][1].update(file=m["entries"][0]["file"]), "twice"),
    "unknown prompt": (lambda m: m["entries"][0].update(prompt="b"), "no prompt is named"),
    "prompt twice": (lambda m: m["prompts"].append(m["prompts"][0]), "used twice"),
    "control characters": (lambda m: m["prompts"][0].update(name="a\nb"), "printable"),
    "tokens disagree": (lambda m: m["prompts"][0].update(tokens=41), "40 tokens where the prompt has 41"),
    "ids disagree": (lambda m: m["prompts"][0].update(token_ids=[1, 2]), "token_ids"),
    "ids no numbers": (lambda m: m["prompts"][0].update(token_ids=["a"] * 40), "token_ids"),
    "negative layer": (lambda m: m["entries"][0].update(layer=-1), "layer must be"),
    "scale zero": (lambda m: m["entries"][0].update(scale=0), "scale must be"),
    "scale text": (lambda m: m["entries"][0].update(scale="1"), "scale must be"),
    "scale huge": (lambda m: m["entries"][0].update(scale=10**400), "401 digits"),
    "window zero": (lambda m: m["entries"][0].update(window=0), "window must be"),
    "cap negative": (lambda m: m["entries"][0].update(softcap=-1.0), "softcap must be"),
    "parent": (lambda m: m["entries"][0].update(file="../x.safetensors"), "inside the dump's folder"),
    "absolute": (
        lambda m: m["entries"][0].update(file="/etc/passwd.safetensors"),
        "inside the dump's folder",
    ),
    "backslash": (lambda m: m["entries"][0].update(file="..\\x.safetensors"), "inside the dump's folder"),
    "drive": (lambda m: m["entries"][0].update(file="C:x.safetensors"), "inside the dump's folder"),
    "file number": (lambda m: m["entries"][0].update(file=7), "inside the dump's folder"),
    "missing file": (lambda m: m["entries"][0].update(file="none.safetensors"), "is missing"),
    "size": (lambda m: m["entries"][0].update(bytes=1), "truncated or damaged"),
    "shape": (
        lambda m: m["entries"][0].update(shape={"q": [6, 40, 9], "k": [2, 40, 8]}),
        "differ from the manifest",
    ),
    "dtype": (lambda m: m["entries"][0].update(dtype="fp16"), "holds bf16"),
    "values": (lambda m: m["entries"][0].update(values=False), "values"),
    "heads count": (lambda m: m["entries"][0].update(query_heads=[0, 1]), "query_heads must list"),
    "heads order": (lambda m: m["entries"][0].update(kv_heads=[1, 0]), "ascending"),
    "heads repeated": (lambda m: m["entries"][0].update(kv_heads=[1, 1]), "ascending"),
    "checksum form": (lambda m: m["entries"][0].update(sha256="abc"), "64 hexadecimal"),
    "model list": (lambda m: m.update(model=[]), "model must be"),
    "texts a list": (lambda m: m.update(token_texts=["a"]), "token_texts must be an object"),
    "texts by name": (lambda m: m.update(token_texts={"a": "b"}), "token_texts has the key 'a'"),
    "texts no text": (lambda m: m.update(token_texts={"1": {}}), "token_texts holds neither"),
    "texts too long": (lambda m: m.update(token_texts={"1": "x" * 5000}), "more than 1024 bytes for token 1"),
    "complete text": (lambda m: m.update(complete="yes"), "complete must be"),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_manifest_faults_are_named(dump: Dump, fault: str) -> None:
    change, message = MANIFEST_FAULTS[fault]
    edit(dump, change)
    with pytest.raises(DumpError, match=message):
        open_dump(dump.path)


def test_an_edited_manifest_is_not_trusted(dump: Dump) -> None:
    edit(dump, lambda m: m["entries"][0].update(scale=0.26), seal=False)
    with pytest.raises(DumpError, match="does not match its own checksum"):
        open_dump(dump.path)
    edit(dump, lambda m: m.pop("sha256"), seal=False)  # the documented way to accept an edit
    assert open_dump(dump.path).entries[0].scale == 0.26
    assert verify(dump.path).state == "unverified"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1]", "no JSON object"),
        ('{"version": NaN}', "NaN is not a number"),
        ('{"version": 1, "version": 1}', "a key twice"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_broken_json(dump: Dump, text: str, message: str) -> None:
    (dump.path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DumpError, match=message):
        open_dump(dump.path)


TENSOR_FAULTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no k": ({"q": torch.ones(2, 4, 8)}, "must hold the tensors"),
    "extra": ({n: torch.ones(2, 4, 8) for n in "qkvw"}, "must hold the tensors"),
    "tokens": ({"q": torch.ones(2, 4, 8), "k": torch.ones(2, 5, 8)}, "needs"),
    "dims": ({"q": torch.ones(2, 4, 8), "k": torch.ones(2, 4, 9)}, "needs"),
    "v heads": ({"q": torch.ones(2, 4, 8), "k": torch.ones(2, 4, 8), "v": torch.ones(1, 4, 8)}, "needs"),
    "dtypes": ({"q": torch.ones(2, 4, 8), "k": torch.ones(2, 4, 8).half()}, "needs"),
    "integers": ({"q": torch.ones(2, 4, 8).int(), "k": torch.ones(2, 4, 8).int()}, "dumps hold"),
    "uneven": ({"q": torch.ones(3, 4, 8), "k": torch.ones(2, 4, 8)}, "evenly"),
    "rank": ({"q": torch.ones(1, 2, 4, 8), "k": torch.ones(2, 4, 8)}, "heads, tokens, head_dim"),
    "empty": ({"q": torch.ones(2, 0, 8), "k": torch.ones(2, 0, 8)}, "none of them zero"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor_faults_are_named(tmp_path: Path, fault: str) -> None:
    tensors, message = TENSOR_FAULTS[fault]
    save_file(tensors, tmp_path / "x.safetensors")
    manifest = {"format": "anchorscope-dump", "version": 1, "prompts": [{"name": "p"}]}
    manifest["entries"] = [{"prompt": "p", "layer": 0, "file": "x.safetensors", "scale": 1.0}]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DumpError, match=message):
        open_dump(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_links_and_pipes_are_refused(dump: Dump, tmp_path: Path) -> None:
    path = dump.path / dump.entries[0].file
    outside = tmp_path / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DumpError, match="no link"):
        open_dump(dump.path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DumpError, match="no link"):  # and does not hang
        open_dump(dump.path)
    manifest = dump.path / "manifest.json"
    manifest.rename(tmp_path / "m.json")
    manifest.symlink_to(tmp_path / "m.json")
    with pytest.raises(DumpError, match="regular file"):
        open_dump(dump.path)


def test_not_a_dump(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="does not exist"):
        open_dump(tmp_path / "none")
    with pytest.raises(DumpError, match="holds no manifest"):
        open_dump(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DumpError, match="is a file"):
        open_dump(tmp_path / "file")


def test_messages_stay_one_short_line_whatever_the_file_says(dump: Dump) -> None:
    edit(dump, lambda m: m["entries"][0].update(prompt="\x1b[31m\n" + "x" * 10_000))
    with pytest.raises(DumpError) as caught:
        open_dump(dump.path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert "no prompt is named" in message
