"""What users type: theta and index lists, good and bad."""

from __future__ import annotations

import math

import pytest

from anchorscope.errors import InputError
from anchorscope.parse import (
    check_word,
    closest,
    describe_indices,
    parse_indices,
    parse_lengths,
    parse_shares,
    parse_thetas,
    parse_tokens,
)
from anchorscope.shown import counted


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("12", (12.0,)),
        ("6, 8,10", (6.0, 8.0, 10.0)),
        ("0:1:0.5", (0.0, 0.5, 1.0)),
        ("0:1:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("-inf,0,inf", (-math.inf, 0.0, math.inf)),
        ("-2:-1:1", (-2.0, -1.0)),
        ("5:5:1", (5.0,)),
        ("1e1", (10.0,)),
    ],
)
def test_thetas(text, want):
    assert parse_thetas(text) == want


def test_long_range_hits_its_end_exactly():
    thetas = parse_thetas("0:20:0.1")
    assert len(thetas) == 201
    assert thetas[-1] == 20.0
    assert 12.0 in thetas


@pytest.mark.parametrize(
    "text", ["", "abc", "nan", "1,,2", "1:2", "3:1:0.5", "0:1:0", "0:1:-1", "0:inf:1", "0:1e9:1", "1:2:3:4"]
)
def test_bad_thetas(text):
    with pytest.raises(InputError, match="--theta"):
        parse_thetas(text)


@pytest.mark.parametrize(
    ("text", "want"), [("all", (0, 1, 2, 5)), ("5,0", (0, 5)), ("0-2", (0, 1, 2)), (" 1 , 2 ", (1, 2)), ("1,1", (1,))]
)
def test_indices(text, want):
    assert parse_indices(text, "--layers", [5, 0, 1, 2]) == want


@pytest.mark.parametrize("text", ["", "a", "-1", "3", "2-0", "0-9", "1.5", "0,", "0x1"])
def test_bad_indices(text):
    with pytest.raises(InputError, match="--layers"):
        parse_indices(text, "--layers", [0, 1, 2])


def test_describe():
    assert describe_indices([7, 0, 1, 2]) == "0-2,7"
    assert describe_indices([]) == "none"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1", 1),
        ("4096", 4096),
        (" 300 ", 300),
        ("4k", 4096),
        ("128K", 131072),
        ("1m", 1 << 20),
        ("0k", 0),
        ("+2k", 2048),
    ],
)
def test_tokens(text, want):
    assert parse_tokens(text, "--tokens", least=0) == want


@pytest.mark.parametrize(
    "text",
    ["4.5k", "4kk", "k", "", "four", "4 k", "0x10", "1e3", "4k,8k", "4g", "١٢", "4_0", "4,096", "9" * 16, "nan"],
)
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(InputError, match=r"^--chunk '.*' is no number of tokens; write .* 4k for 4,096"):
        parse_tokens(text, "--chunk")


@pytest.mark.parametrize("text", ["-5", "-1k", "0", "1", "16m1", "17m", "99999999"])
def test_tokens_out_of_range(text):
    with pytest.raises(InputError, match="--tokens"):
        parse_tokens(text, "--tokens", least=2)


def test_lengths():
    assert parse_lengths("4096, 16k,1K") == (4096, 16384, 1024)
    assert parse_lengths("1m") == (1048576,)
    for text, word in (
        ("4k,4096", "twice"),
        ("4k,,8", "'' is no number"),
        ("0", "out of range"),
        ("4k;8k", "no number"),
    ):
        with pytest.raises(InputError, match=word):
            parse_lengths(text)
    with pytest.raises(InputError, match="it takes 2 to 4,096 tokens"):
        parse_lengths("8k", least=2, most=4096)


def test_shares():
    assert parse_shares("1,0, 0.5,0.5,-0.0", "--depths") == (0.0, 0.5, 1.0)
    for text in ("1.5", "-0.1", "a", "", "0,,1", "nan", "inf"):
        with pytest.raises(InputError, match=r"--depths: '.*' is not a share from 0 to 1"):
            parse_shares(text, "--depths")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("needel", "needle"), ("NEEDLE", "needle"), ("multineedle", "multi-needle"), ("comon-words", "common-words")],
)
def test_a_misspelt_word_suggests_the_right_one(word, meant):
    known = ["needle", "multi-needle", "common-words"]
    assert closest(word, known) == meant
    with pytest.raises(InputError, match=rf"--task '{word}' is unknown \(did you mean {meant}\?\); use needle, .* or "):
        check_word("--task", word, known)


def test_a_word_like_no_other_lists_them_all():
    assert closest("zzz", ["needle", "haystack"]) is None
    assert closest("", ["needle"]) is None
    with pytest.raises(InputError, match=r"^--task 'zzz' is unknown; use needle or haystack$"):
        check_word("--task", "zzz", ["needle", "haystack"])
    check_word("--task", "needle", ["needle"])


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, ("0 heads", "0 queries")), (1, ("1 head", "1 query")), (2048, ("2,048 heads", "2,048 queries"))],
)
def test_things_are_counted_in_words(number, words):
    assert (counted(number, "head"), counted(number, "query", "queries")) == words
