"""`DumpWriter`: in any pieces, interrupted, resumed, and one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorscope.dumps import DumpWriter, LayerSpec, open_dump, verify, write_dump
from anchorscope.errors import DumpError, InputError

from .entries import entry, header, put


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
