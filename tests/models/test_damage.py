"""Damaged, foreign and unreadable model files: one true sentence that names the file, before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load, saved

from anchorscope.cli.app import main
from anchorscope.errors import InputError, RunFailure
from anchorscope.models import hub


def settings(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in config.items() if v != "GONE"}))

    return edit


def text(name: str, content: str | bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def index(content: Any) -> Any:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return edit


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "model.safetensors is damaged or cut short"),
        (text("model.safetensors", b"\xff" * 64), "model.safetensors is damaged or cut short"),
        (text("model.safetensors", ""), "model.safetensors is empty"),
        (text("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (renamed, "holds weights.safetensors but neither"),
        (pickled, "pickle \\(pytorch_model.bin\\).*convert them to safetensors"),
        (pickled_shards, "pickle \\(pytorch_model.bin.index.json\\)"),
        (index("{broken"), "index.json is damaged, it is not valid JSON"),
        (index([]), "index.json is damaged, it holds no JSON object"),
        (index({"weight_map": {}}), "holds no weight_map"),
        (index({"weight_map": {"a": "x.bin"}}), "names x.bin: only safetensors"),
        (index({"weight_map": {"a": "../x.safetensors"}}), "lies outside of its folder"),
        (settings(transformers_weights="adapter_model.bin"), "only safetensors are read"),
        (text("config.json", "{broken"), "config.json is damaged, it is not valid JSON"),
        (text("config.json", "[1, 2]"), "config.json is damaged, it holds no JSON object"),
        (text("config.json", ""), "config.json is empty"),
        (text("config.json", DEEP), "config.json is nested too deeply"),
        (text("config.json", b"\xff\xfe\x00"), "config.json is damaged"),
        (text("config.json", POINTER), "config.json is a Git LFS pointer"),
        (settings(model_type="GONE"), "names no model_type"),
        (settings(model_type=5), "model_type must be a name"),
        (settings(model_type="no_such_kind"), "no_such_kind"),
        (settings(num_attention_heads=0), "num_attention_heads is 0"),
        (settings(num_attention_heads=-4), "num_attention_heads is -4"),
        (settings(num_key_value_heads=3), "4 query heads cannot share 3 kv heads"),
        (settings(num_key_value_heads=0), "num_key_value_heads is 0"),
        (settings(hidden_size=10**12), "hidden_size is 1000000000000"),
        (settings(hidden_size=1 << 24), "hidden_size is 16777216"),
        (settings(num_attention_heads=5, num_key_value_heads=5), "cannot be loaded: .*64.*5"),
        (settings(rope_parameters="x"), "cannot be loaded: .*rope_parameters"),
        (settings(dtype="float7"), "cannot be loaded: .*float7"),
        (settings(hidden_size="64"), "hidden_size must be a whole number, not '64'"),
        (settings(num_hidden_layers=-1), "num_hidden_layers is -1"),
        (settings(vocab_size=2.5), "vocab_size must be a whole number"),
        (settings(hidden_act="no_such"), "cannot be loaded"),
        (text("generation_config.json", "{broken"), "generation_config.json is damaged"),
        (text("tokenizer.json", "{broken"), "tokenizer.json is damaged"),
        (text("tokenizer.json", ""), "tokenizer.json is empty"),
        (text("tokenizer.json", "[]"), "tokenizer.json is damaged"),
        (text("tokenizer.json", '{"version": "1.0"}'), "the tokenizer of model .* is broken"),
        (text("tokenizer_config.json", "[}"), "tokenizer_config.json is damaged"),
        (text("adapter_config.json", "{}"), "is an adapter"),
    ],
)
def test_one_sentence(tmp_path: Path, damage: Any, words: str) -> None:
    damage(saved(tmp_path / "m"))
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_the_command_exits_with_2_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(saved(tmp_path / "m"))
    ids = tmp_path / "ids.json"
    ids.write_text("[3, 4, 5, 6]")
    capture = ["capture", "--model", str(tmp_path / "m"), "--token-ids", str(ids), "--out", str(tmp_path / "d")]
    assert main(capture) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if "error" in line] == [said.err.splitlines()[-1]]
    assert "Traceback" not in said.err
    assert not (tmp_path / "d").exists()


def test_a_missing_tokenizer_is_not_a_broken_one(tmp_path: Path) -> None:
    assert load(saved(tmp_path / "m")).tokenizer is None


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    load(tmp_path / "m")


@pytest.mark.parametrize("name", ["x.gguf", "x.GGUF"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"GGUF", "is no whole GGUF file"),
        (b"GGUF" + b"\0" * 100, "is no whole GGUF file"),
        (b"garbage" * 100, "is no whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 100, "is no whole GGUF file"),
        (POINTER.encode(), "is a Git LFS pointer"),
    ],
)
def test_damaged_gguf(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(tmp_path / name)


def test_a_folder_or_a_pipe_called_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(InputError, match=r"model folder .*a\.gguf holds no config\.json"):
        load(tmp_path / "a.gguf")
    os.mkfifo(tmp_path / "b.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        load(tmp_path / "b.gguf")
    load(saved(tmp_path / "c.gguf"))  # a folder may be called anything


def test_a_model_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    saved(tmp_path / "m")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RunFailure, match="does not fit into the memory that is free"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        ("does not appear to have a file named model.safetensors", "never read.*safetensors|safetensors.*never read"),
        ("You are trying to access a gated repo.", "is gated"),
        ("We couldn't connect to 'https://huggingface.co'", "hub .* cannot be reached"),
        ("a/b is not a valid model identifier", "check its name"),
    ],
)
def test_models_of_the_hub(monkeypatch: pytest.MonkeyPatch, offered: str, words: str) -> None:
    import transformers

    asked: list[dict[str, Any]] = []

    def say(*_: Any, **options: Any) -> None:
        asked.append({**options, "conversion": os.environ.get("DISABLE_SAFETENSORS_CONVERSION")})
        raise OSError(offered)

    def config(*_: Any, **__: Any) -> Any:
        return transformers.LlamaConfig()

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "is_offline", lambda: False)  # whatever the environment says
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", say)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", say)
    with pytest.raises(InputError, match=words):
        load("a/b")
    assert asked[-1]["use_safetensors"] is True  # transformers would take pickle without
    assert asked[-1]["conversion"] == "1"  # and would ask a service to convert it
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "m")
    opened = Path.open

    def locked(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(Permission denied\)"):
        load(tmp_path / "m")
