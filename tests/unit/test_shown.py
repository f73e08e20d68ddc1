"""Numbers as people are shown them."""

from __future__ import annotations

import math

import pytest

from anchorscope.shown import exact_theta, share_text, short_name, theta_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (1.0, "1.000"),
        (0.9994, "0.999"),
        (0.9996, "0.9996"),
        (0.99996, "0.99996"),
        (1 - 1e-9, "1.000"),  # rounding of float32 sums
        (0.0002, "0.0002"),
        (0.00004, "0.00004"),
        (3e-9, "3.0e-09"),
        (0.4764, "0.476"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_share(value, text):
    assert share_text(value) == text


def test_a_share_below_its_target_looks_so():
    assert share_text(0.94997, below=0.95) == "0.94997"
    assert share_text(0.95, below=0.95) == "0.950"
    assert share_text(0.951, below=0.95) == "0.951"
    assert share_text(0.99996, below=0.95) == "0.99996"
    assert share_text(99.97, 1, below=100) == "99.97"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (11.5625, "11.57"),  # of profiles measured every 1/16
        (11.55, "11.55"),
        (0.07, "0.07"),
        (-3.0, "-3.00"),
        (-3.001, "-3.00"),
        (131072.0, "131072.00"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("inf", "inf"),
        (None, "-"),
    ],
)
def test_theta(value, text):
    assert theta_text(value) == text


def test_every_theta_of_the_curve_is_shown_in_full():
    from anchorscope.analysis.accumulate import CURVE_THETAS

    assert all(float(theta_text(float(x))) == x for x in CURVE_THETAS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.0, "8"), (7.25, "7.25"), (math.inf, "inf"), (-math.inf, "-inf"), ("inf", "inf"), (None, "-")],
)
def test_a_theta_is_shown_as_it_was_asked_for(value, text):
    assert exact_theta(value) == text


def test_a_long_name_keeps_both_ends():
    assert short_name("abcdefghij", 10) == "abcdefghij"
    assert short_name("abcdefghijk", 10) == "abcd...ijk"
    assert short_name("abcdefghijk", 6, "~") == "abc~jk"
