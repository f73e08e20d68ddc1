"""What users type: theta and index lists, good and bad."""

from __future__ import annotations

import math

import pytest

from anchorscope.errors import InputError
from anchorscope.parse import describe_indices, parse_indices, parse_thetas


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
