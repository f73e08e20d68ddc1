"""Token texts out of tokenizer files."""

from __future__ import annotations

import json

import pytest

from anchorscope.errors import InputError
from anchorscope.tokens import load_pieces, token_texts


def write(path, vocabulary, added=()):
    path.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": list(added)}), encoding="utf-8")
    return path


def test_bytewise_vocabulary(tmp_path):
    vocabulary = {"\u0120the": 0, "\u010a": 1, "\u00c3\u00a9": 2, "\u00e2": 3}
    path = write(tmp_path / "tokenizer.json", vocabulary, [{"id": 5, "content": "<|\u2581end|>"}])
    assert load_pieces(path) == [" the", "\n", "é", "\ufffd", "", "<|\u2581end|>"]
    assert load_pieces(tmp_path) == load_pieces(path)


def test_sentencepiece_vocabulary_as_a_list(tmp_path):
    path = write(tmp_path / "t.json", [["<unk>", 0.0], ["\u2581the", -1.0], ["x", -2.0]])
    assert load_pieces(path) == ["<unk>", " the", "x"]


def test_gguf_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["\u0120a", "b\u010a", "\u4e2d"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert load_pieces(path) == [" a", "b\n", "\u4e2d"]


def test_texts_of_ids():
    assert token_texts([1, 0, 7, -1], ["a", ""]) == ["#1 ", "a", "#7 ", "#-1 "]
    assert token_texts([3]) == ["#3 "]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": {}}}']
)
def test_no_vocabulary(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match="no vocabulary"):
        load_pieces(tmp_path / "t.json")


def test_missing_or_damaged(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_pieces(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    pytest.importorskip("gguf")
    with pytest.raises(InputError, match="no vocabulary"):
        load_pieces(tmp_path / "x.gguf")


def test_a_lack_of_memory_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(gguf, "GGUFReader", full)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(MemoryError):
        load_pieces(tmp_path / "model.gguf")
