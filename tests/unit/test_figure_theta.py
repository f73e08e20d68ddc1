"""Which theta figures show, of any set of thetas in any order."""

from __future__ import annotations

import itertools
import math

import pytest

from anchorscope.errors import InputError
from anchorscope.figure_theta import choose_figure_theta, find_theta, saved_figure_theta

INF = math.inf


@pytest.mark.parametrize(
    ("recalls", "target", "theta", "why"),
    [
        ({0: 0.5, 6: 0.94, 12: 0.97, 20: 1.0}, 0.95, 12, "reaches"),
        ({0: 0.96, 6: 0.97, 12: 0.98}, 0.95, 0, "reaches"),
        ({0: 0.5, 6: 0.95}, 0.95, 6, "reaches"),  # exactly the target is enough
        ({0: 0.5, 6: 0.8}, 0.95, 6, "falls short"),
        ({0: 0.5, 6: 0.8, 8: 0.8}, 0.95, 6, "falls short"),  # no larger than useful
        ({-INF: 0.3, 6: 0.8, INF: 1.0}, 0.95, 6, "falls short"),  # dense pictures show nothing
        ({-INF: 0.97, 6: 0.99}, 0.95, 6, "reaches"),
        ({-INF: 0.3, INF: 1.0}, 0.95, INF, "reaches"),
        ({-INF: 0.3}, 0.95, -INF, "asked"),
        ({7.5: 0.1}, 0.95, 7.5, "asked"),
    ],
)
def test_smallest_that_reaches_whatever_the_order(recalls, target, theta, why):
    for order in itertools.permutations(recalls):
        got = choose_figure_theta(order, [recalls[t] for t in order], target)
        assert (got.theta, got.why, got.of) == (theta, why, len(recalls))
        assert order[got.index] == theta


def test_repeated_thetas_count_once():
    got = choose_figure_theta((6.0, 6.0), (0.5, 0.5), 0.95)
    assert (got.index, got.of, got.sentence()) == (0, 1, "theta 6")


def test_sentences():
    thetas = [x / 2 for x in range(41)]
    recalls = [x / 40 for x in range(41)]
    assert choose_figure_theta(thetas, recalls, 0.95).sentence() == (
        "theta 19, the first of 41 to reach mean recall 0.95"
    )
    low = choose_figure_theta((12.0, 6.0, INF), (0.5, 0.4, 1.0), 0.95).sentence()
    assert low == "theta 12 of 3: no finite one reaches mean recall 0.95"
    assert choose_figure_theta(thetas, recalls, 0.95, 0.0).sentence() == "theta 0, one of 41"


def test_asked_for_must_be_measured():
    thetas = [x / 2 for x in range(41)]
    assert find_theta(thetas, 9.5) == 19
    for asked, near in ((7.3, "7.5"), (-3.0, "0"), (INF, "20"), (-INF, "0"), (7.25, "7.5"), (math.nan, None)):
        with pytest.raises(InputError) as caught:
            choose_figure_theta(thetas, thetas, 0.95, asked)
        if near is not None:
            assert str(caught.value).endswith(f"; the nearest of the 41 from 0 to 20 is {near}")
    with pytest.raises(InputError, match=r"not 7; there are 6, 12, inf$"):
        find_theta((12.0, 6.0, INF), 7.0)
    with pytest.raises(InputError, match=r"not inf; there is only 6$"):
        find_theta((6.0,), INF)


def test_of_a_saved_report():
    report = {"settings": {"theta": ["inf", 4.0, 6.0], "target_recall": 0.9}}
    assert saved_figure_theta(report).theta == INF  # of an earlier version: the first
    got = saved_figure_theta({**report, "figure_theta": {"theta": 6.0, "why": "reaches"}})
    assert (got.theta, got.index, got.of) == (6.0, 2, 3)
    with pytest.raises(InputError):
        saved_figure_theta({**report, "figure_theta": {"theta": 5.0, "why": "reaches"}})
