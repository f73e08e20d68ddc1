"""Token texts out of tokenizer files."""

from __future__ import annotations

import json

import pytest

from anchorscope.errors import InputError
from anchorscope.tokens import load_pieces, load_vocabulary, token_texts, tokenizer_texts


def write(path, vocabulary, added=()):
    path.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": list(added)}), encoding="utf-8")
    return path


def test_bytewise_vocabulary(tmp_path):
    vocabulary = {"\u0120the": 0, "\u010a": 1, "\u00c3\u00a9": 2, "\u00e2": 3}
    path = write(tmp_path / "tokenizer.json", vocabulary, [{"id": 5, "content": "<|\u2581end|>"}])
    assert load_pieces(path) == [" the", "\n", "é", "<0xE2>", "", "<|\u2581end|>"]
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


# ---- how vocabularies are written -----------------------------------------------------------------------------------


def test_a_decoder_that_is_named_counts_before_the_look_of_the_pieces(tmp_path):
    """A SentencePiece vocabulary may hold the letter that stands for a blank in GPT-2's alphabet."""
    vocabulary = {"\u2581the": 0, "\u0120": 1, "\u0120a": 2, "<0xE2>": 3}
    steps = [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    content = {"model": {"vocab": vocabulary}, "decoder": {"type": "Sequence", "decoders": steps}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_pieces(tmp_path) == [" the", "\u0120", "\u0120a", "<0xE2>"]
    assert load_vocabulary(tmp_path).piece(3) == b"\xe2"


def test_an_added_token_is_no_stand_in_for_bytes(tmp_path):
    path = write(tmp_path / "t.json", {"\u0120a": 0, "\u00e9": 1}, [{"id": 2, "content": "\u00e9"}])
    assert load_pieces(path) == [" a", "<0xE9>", "\u00e9"]


def test_gguf_says_which_vocabulary_it_holds(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<s>", "\u0120", "\u2581a", "<0xC3>", "<0xC3>"])
    writer.add_token_types([3, 1, 1, 6, 4])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    known = load_vocabulary(path)
    assert [known.piece(i) for i in range(5)] == [b"<s>", "\u0120".encode(), b" a", b"\xc3", b"<0xC3>"]


def decoders():
    tokenizers = pytest.importorskip("tokenizers")
    d = tokenizers.decoders
    fallback = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return {
        "ByteLevel": (d.ByteLevel(), ["\u0120the", "\u00c3", "\u010a", "\u2581x"], [" the", "<0xC3>", "\n", "\u2581x"]),
        "ByteFallback": (fallback, ["\u2581the", "<0xC3>", "a", "\u0120"], [" the", "<0xC3>", "a", "\u0120"]),
        "Metaspace": (d.Metaspace(), ["\u2581the", "a"], [" the", "a"]),
        "WordPiece": (d.WordPiece(), ["the", "##re"], [" the", "re"]),
        "BPE": (d.BPEDecoder(), ["the</w>", "a"], ["the ", "a"]),
        "none": (None, ["the", "a"], [" the", " a"]),
        "none, marked": (None, ["\u2581the", "a"], [" the", "a"]),
    }


@pytest.mark.parametrize("name", ["ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "BPE", "none", "none, marked"])
def test_a_fast_tokenizer_of_every_style(name):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    decoder, raw, texts = decoders()[name]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({p: i for i, p in enumerate(raw)}, unk_token=raw[0]))
    if decoder is not None:
        inner.decoder = decoder
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"bos_token": "<|\u0120\u2581bos|>"})
    known = tokenizer_texts(made, [*range(len(raw) + 1), 900, -1])
    assert [known.text(i) for i in range(len(raw) + 1)] == [*texts, "<|\u0120\u2581bos|>"]
    assert len(known) == len(raw) + 1, "ids that the tokenizer lacks are unknown"


def test_a_slow_tokenizer_of_bytes_makes_whole_characters():
    transformers = pytest.importorskip("transformers")
    made = transformers.ByT5Tokenizer()
    assert not made.is_fast
    ids = made("\u6f22 \U0001f600")["input_ids"]
    known = tokenizer_texts(made, ids)
    assert known.passage(ids) == "\u6f22 \U0001f600</s>"
    assert known.text(ids[0]) == "<0xE6>"


class Slow:
    """A tokenizer of SentencePiece, as transformers wraps it: single ids only, an error for others."""

    pieces = ("<unk>", "\u2581the", "re", "<0xF0>")

    def convert_ids_to_tokens(self, i):
        return self.pieces[i]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("\u2581", " ").strip()


def test_a_slow_tokenizer_of_pieces():
    known = tokenizer_texts(Slow(), [1, 2, 3, 77])
    assert {i: known.text(i) for i in known} == {1: " the", 2: "re", 3: "<0xF0>"}


def test_tiktoken_ranks_are_bytes():
    class Ranks(Slow):
        pieces = (b" a", b"\xe2\x82", b"\xac")

        def convert_tokens_to_string(self, tokens):
            raise NotImplementedError

    known = tokenizer_texts(Ranks(), range(3))
    assert known.passage([0, 1, 2]) == " a\u20ac"
    assert known.text(1) == "<0xE2><0x82>"


def test_a_tokenizer_that_fails_costs_its_words_and_no_more():
    assert len(tokenizer_texts(object(), [1, 2])) == 0

    class Full(Slow):
        def convert_ids_to_tokens(self, i):
            raise MemoryError

    with pytest.raises(MemoryError):
        tokenizer_texts(Full(), [1])
