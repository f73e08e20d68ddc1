"""The dump format: what is written is read back exactly, and whatever is wrong is said, never accepted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anchorscope.dumps import Dump, DumpWriter, LayerSpec, open_dump, verify, write_dump
from anchorscope.dumps.format import canonical_sha256
from anchorscope.errors import DumpError, InputError, RunFailure


def entry(prompt: str = "a", layer: int = 0, tokens: int = 40, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(layer + len(prompt))

    def x(heads: int) -> torch.Tensor:
        return torch.randn(heads, tokens, 8, generator=generator).to(more.pop("dtype", torch.bfloat16))

    made = {"prompt": prompt, "layer": layer, "q": x(6), "k": x(2), "v": x(2), "scale": 0.25}
    return {**made, **more}


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    return write_dump(tmp_path / "dump", [entry(layer=0), entry(layer=3, window=16, softcap=30.0)])


def edit(dump: Dump, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the manifest on disk; `seal` keeps its checksum right, so that the change itself must be caught."""
    path = dump.path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if seal:
        manifest["sha256"] = canonical_sha256(manifest)
    path.write_text(json.dumps(manifest))


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


def test_existing_output(tmp_path: Path, dump: Dump) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_dump(dump.path, [entry()])
    replaced = write_dump(dump.path, [entry(layer=9)], overwrite=True)
    assert [e.layer for e in replaced.entries] == [9]
    assert sorted(p.name for p in dump.path.iterdir()) == ["manifest.json", replaced.entries[0].file]
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="is a file"):
        write_dump(tmp_path / "file", [entry()], overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write_dump(tmp_path / "file" / "below", [entry()])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="holds other files"):
        write_dump(other, [entry()], overwrite=True)
    assert (other / "thesis.txt").read_text() == "keep"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_dump(empty, [entry()]).complete


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="permission"):
            write_dump(tmp_path / "d", [entry()])
    finally:
        tmp_path.chmod(0o700)


def header(*names: str) -> dict[str, Any]:
    return {"prompts": [{"name": n, "tokens": 40} for n in names]}


def put(writer: DumpWriter, source: dict[str, Any]) -> None:
    out = writer.layer(
        source["prompt"],
        source["layer"],
        query_heads=range(6),
        kv_heads=range(2),
        tokens=40,
        head_dim=8,
        dtype="bf16",
        scale=0.25,
    )
    for name in "qkv":
        out.put(name, 0, source[name])
    out.close()


def test_chunks_in_any_grouping_give_the_same_file(tmp_path: Path) -> None:
    source = entry()
    whole = write_dump(tmp_path / "whole", [source])
    with DumpWriter(tmp_path / "parts", header("a")) as writer:
        out = writer.layer(
            "a", 0, query_heads=range(6), kv_heads=range(2), tokens=40, head_dim=8, dtype="bf16", scale=0.25
        )
        with pytest.raises(InputError, match="does not continue"):
            out.put("q", 5, source["q"][:, 5:])
        for start in range(0, 40, 7):
            for name in "qkv":
                out.put(name, start, source[name][:, start : start + 7])
        out.close()
        parts = writer.finish()
    assert parts.entries[0].sha256 == whole.entries[0].sha256
    assert verify(parts).state == "verified"


def test_a_layer_is_begun_by_a_spec_or_by_its_fields(tmp_path: Path) -> None:
    spec = LayerSpec(range(6), range(2), tokens=40, head_dim=8, dtype="bf16", scale=0.25, window=9)
    with DumpWriter(tmp_path / "d", header("a")) as writer:
        for layer, fields in ((0, {}), (1, {"window": None})):  # fields beside a spec take its place
            out = writer.layer("a", layer, spec, **fields)
            for name, x in entry().items():
                if name in ("q", "k", "v"):
                    out.put(name, 0, x)
            out.close()
        with pytest.raises(TypeError, match="soft_cap"):
            writer.layer("a", 2, spec, soft_cap=30.0)
        with pytest.raises(InputError, match="window must be None or a whole number of at least 1, not 0"):
            writer.layer("a", 2, spec, window=0)
        assert [e.window for e in writer.finish().entries] == [9, None]


def test_an_incomplete_layer_is_not_listed(tmp_path: Path) -> None:
    def leave_one_open() -> None:
        with DumpWriter(tmp_path / "d", header("a")) as writer:
            put(writer, entry(layer=0))
            out = writer.layer(
                "a",
                1,
                query_heads=range(6),
                kv_heads=range(2),
                tokens=40,
                head_dim=8,
                dtype="bf16",
                scale=0.25,
            )
            out.put("q", 0, entry()["q"][:, :7])
            assert [e.layer for e in open_dump(tmp_path / "d", allow_incomplete=True).entries] == [0]
            out.close()

    with pytest.raises(InputError, match="q holds 7 of 40"):
        leave_one_open()
    assert not (tmp_path / "d").exists()


def interrupt(path: Path, *, layers: int) -> None:
    """A capture of prompts a and b that Ctrl-C ends after some layers of a."""

    def run() -> None:
        with DumpWriter(path, header("a", "b")) as writer:
            for layer in range(layers):
                put(writer, entry("a", layer))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_interrupted_then_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "d", layers=2)
    with pytest.raises(DumpError, match="unfinished"):
        open_dump(tmp_path / "d")
    with pytest.raises(InputError, match="--resume continues it"):
        write_dump(tmp_path / "d", [entry()])
    assert not verify(tmp_path / "d").complete
    created = open_dump(tmp_path / "d", allow_incomplete=True).manifest["created"]
    (tmp_path / "d" / "prompt00-layer007.safetensors").write_bytes(b"stray")
    (tmp_path / "d" / "prompt00-layer002.safetensors.partial").write_bytes(b"stray")

    everything = [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    with DumpWriter(tmp_path / "d", header("a", "b"), resume=True) as writer:
        assert writer.done == {("a", 0), ("a", 1)}
        for prompt, layer in everything[2:]:
            put(writer, entry(prompt, layer))
        writer.finish()
    with DumpWriter(tmp_path / "straight", header("a", "b")) as writer:
        writer._manifest["created"] = created
        for prompt, layer in everything:
            put(writer, entry(prompt, layer))
        writer.finish()
    contents = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("d", "straight")]
    assert contents[0] == contents[1]


def test_resume_redoes_damaged_layers_and_refuses_other_settings(tmp_path: Path) -> None:
    interrupt(tmp_path / "d", layers=2)
    with pytest.raises(InputError, match=r"other settings \(prompts\)"):
        DumpWriter(tmp_path / "d", header("a"), resume=True)
    victim = tmp_path / "d" / "prompt00-layer001.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 4
    victim.write_bytes(raw)
    with DumpWriter(tmp_path / "d", header("a", "b"), resume=True) as writer:
        assert writer.done == {("a", 0)}
        put(writer, entry("a", 1))
        assert verify(writer.finish()).state == "verified"
    with pytest.raises(InputError, match="nothing to resume"):
        DumpWriter(tmp_path / "d", header("a", "b"), resume=True)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with DumpWriter(tmp_path / "d", header("a")) as writer:
        put(writer, entry())
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match="another run"):
                DumpWriter(tmp_path / "d", header("a"), **options)
        writer.finish()
    assert sorted(p.suffix for p in (tmp_path / "d").iterdir()) == [".json", ".safetensors"]


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


def test_messages_stay_one_short_line_whatever_the_file_says(dump: Dump) -> None:
    edit(dump, lambda m: m["entries"][0].update(prompt="\x1b[31m\n" + "x" * 10_000))
    with pytest.raises(DumpError) as caught:
        open_dump(dump.path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert "no prompt is named" in message
