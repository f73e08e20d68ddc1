"""Token texts as a dump holds them."""

from __future__ import annotations

import json

import pytest

from anchorscope.vocabulary import MAX_PIECE_BYTES, Vocabulary, as_vocabulary


def test_a_passage_reads_as_the_text_did_whatever_the_tokens_split():
    text = "na\u00efve \u6f22\u5b57 \U0001f600\n"
    known = Vocabulary({i: text.encode()[i : i + 1] for i in range(len(text.encode()))})
    assert known.passage(range(len(text.encode()))) == text
    assert known.text(2) == "<0xC3>"
    assert known.passage([0, 2, 1]) == "n<0xC3>a", "a byte that nothing completes"
    assert known.text(900) == "#900 "


def test_json_round_trip_keeps_bytes_and_order():
    known = Vocabulary({12: " the", 3: b"\xe2\x82", 7: "", 100: '"\u202e'})
    saved = json.loads(json.dumps(known.to_json()))
    assert list(saved) == ["3", "7", "12", "100"]
    assert saved["3"] == [0xE2, 0x82]
    assert Vocabulary.from_json(saved) == known
    assert known.part([12, 5]).to_json() == {"12": " the"}


def test_what_is_too_long_is_left_out():
    known = Vocabulary({1: "a" * MAX_PIECE_BYTES, 2: "a" * (MAX_PIECE_BYTES + 1)})
    assert list(known.to_json()) == ["1"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "an object"),
        ({"x": "a"}, "no token id"),
        ({"-1": "a"}, "no token id"),
        ({"01": "a"}, "no token id"),
        ({"\u0661": "a"}, "no token id"),
        ({"9" * 10: "a"}, "no token id"),
        ({"1": 5}, "neither text nor"),
        ({"1": [256]}, "neither text nor"),
        ({"1": [True]}, "neither text nor"),
        ({"1": [1.0]}, "neither text nor"),
        ({"1": "\ud800"}, "neither text nor"),
        ({"1": "a" * 1025}, "more than 1024 bytes"),
        ({"1": [65] * 1025}, "more than 1024 bytes"),
    ],
)
def test_other_shapes_are_refused_by_name(found, words):
    with pytest.raises(ValueError, match=words):
        Vocabulary.from_json(found)


def test_lists_of_texts_are_vocabularies():
    assert as_vocabulary(["a", "", "c"]).text(1) == "#1 "
    assert as_vocabulary(None) is None
