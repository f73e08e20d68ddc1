"""Choices against enumeration of everything that could have been chosen."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from anchorscope.calibration.choose import (
    Ladder,
    Points,
    Problem,
    hull,
    one_theta,
    reach,
    share_out,
    shared_menu,
    spend,
)
from anchorscope.calibration.costs import by_density
from anchorscope.calibration.curves import HeadCurves
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams

SMALL, LARGE = AnchorParams(64, 8), AnchorParams(128, 16)
THETAS = np.array([-math.inf, 2.0, 4.0, 6.0, math.inf])


def curve(rng, layer, head, params, *, thetas=THETAS, prompts=1, concave=False):
    """A head with random recall and density; with `concave`, even steps of density and falling gains."""
    shape = (prompts, len(thetas))
    if concave:
        density = np.broadcast_to(np.linspace(0.1, 1.0, len(thetas)), shape)
        gains = -np.sort(-rng.uniform(0.01, 1.0, (prompts, len(thetas) - 1)), axis=1)
        recall = 1 - np.concatenate([np.cumsum(gains[:, ::-1], axis=1)[:, ::-1], np.zeros((prompts, 1))], axis=1) / 8
    else:
        density, recall = (np.sort(rng.uniform(low, 0.99, shape), axis=1) for low in (0.05, 0.4))
    density, recall = density.copy(), recall.copy()
    density[:, -1] = recall[:, -1] = 1.0
    return HeadCurves(layer, head, params, thetas, recall, density, recall - 0.1, recall - 0.05)


def problem(seed, layers=2, heads=2, groups=(SMALL, LARGE), rows=(0,), statistic="mean", dense_above=1.0, **how):
    rng = np.random.default_rng(seed)
    places = [(i, h) for i in range(layers) for h in range(heads)]
    curves = {p: {at: curve(rng, *at, p, **how) for at in places} for p in groups}
    return Problem(curves, rows, statistic, by_density, dense_above)


def everything(p, by):
    """Every (choice, value, cost) there is: values and costs summed over heads."""
    layers, points = p.layers, p.points
    if by == "model":
        for params in p.curves:
            for t in THETAS:
                yield from total(p, dict.fromkeys(p.heads, (params, t)))
        return
    for groups in itertools.product(p.curves, repeat=len(layers)):
        of = {h: g for g, heads in zip(groups, layers.values(), strict=True) for h in heads}
        if by == "layer":
            for thetas in itertools.product(THETAS, repeat=len(layers)):
                at = {h: t for t, heads in zip(thetas, layers.values(), strict=True) for h in heads}
                yield from total(p, {h: (of[h], at[h]) for h in p.heads})
        else:
            for thetas in itertools.product(*(points[of[h]][h].theta for h in p.heads)):
                yield from total(p, {h: (of[h], t) for h, t in zip(p.heads, thetas, strict=True)})


def total(p, settings):
    value = cost = 0.0
    for head, (params, theta) in settings.items():
        x = p.points[params][head]
        i = max(int(np.searchsorted(x.theta, theta, side="right")) - 1, 0)
        value, cost = value + x.value[i], cost + x.cost[i]
    yield settings, value, cost


def judged(p, choice):
    theta = {h: math.inf if s.theta is None else s.theta for h, s in choice.items()}
    return next(total(p, {h: (s.params, theta[h]) for h, s in choice.items()}))


@pytest.mark.parametrize("by", ["head", "layer", "model"])
@pytest.mark.parametrize("seed", range(8))
def test_a_target_is_reached_at_least_cost(by, seed):
    p = problem(seed, dense_above=0.9 if seed % 2 else 1.0)
    target = 0.6 + 0.05 * seed
    settings, _, cost = judged(p, reach(p, target, by))

    def good(settings):
        values = {h: next(total(p, {h: s}))[1] for h, s in settings.items()}
        units = {"head": [[h] for h in p.heads], "layer": p.layers.values(), "model": [p.heads]}[by]
        return all(np.mean([values[h] for h in unit]) >= target for unit in units)

    assert good(settings)
    assert cost == pytest.approx(min(c for s, _, c in everything(p, by) if good(s)))


def test_per_head_theta_is_the_smallest_that_reaches_the_target():
    p = problem(3, layers=1, heads=3, groups=(SMALL,))
    for target in (0.5, 0.7, 0.9):
        for head, (_, theta) in reach(p, target, "head").items():
            recall = p.curves[SMALL][head].recall[0]
            want = THETAS[np.argmax(recall >= target)]
            assert (math.inf if theta is None else theta) == want


def test_pooled_over_the_fitting_prompts_only():
    p = problem(5, layers=1, heads=1, groups=(SMALL,), prompts=3, rows=(0, 2))
    recall = p.curves[SMALL][0, 0].recall
    np.testing.assert_allclose(p.points[SMALL][0, 0].value[:-1], recall[[0, 2]].mean(0)[:-1])
    p05 = dataclasses.replace(p, statistic="p05")
    np.testing.assert_allclose(p05.points[SMALL][0, 0].value[:-1], recall[[0, 2]].mean(0)[:-1] - 0.1)


def test_dense_from_where_sparse_stops_paying():
    theta = np.array([-math.inf, 1.0, 2.0, 3.0, math.inf])
    density = np.array([[0.2, 0.5, 0.7, 0.95, 1.0]])
    recall = np.array([[0.5, 0.8, 0.9, 0.99, 1.0]])
    curves = {SMALL: {(0, 0): HeadCurves(0, 0, SMALL, theta, recall, density, recall, recall)}}

    def chosen(target, **how):
        p = Problem(curves, (0,), "mean", **{"price": by_density, "dense_above": 0.9, **how})
        return reach(p, target, "head")[0, 0].theta

    assert chosen(0.9) == 2.0
    assert chosen(0.95) is None
    assert chosen(0.95, dense_above=1.0) == 3.0
    assert chosen(1.0, dense_above=1.0) is None
    # Twice the time per pair: a density of 0.5 costs as much as dense attention.
    assert chosen(0.8, price=lambda _, d: 2 * d, dense_above=1.0) is None
    assert chosen(0.5, price=lambda _, d: 2 * d, dense_above=1.0) == -math.inf


def test_groups_are_chosen_by_the_price_asked_for():
    theta = np.array([-math.inf, 1.0, math.inf])
    recall = np.array([[0.5, 0.96, 1.0]])
    curves = {
        params: {(0, 0): HeadCurves(0, 0, params, theta, recall, np.array([[low, mid, 1.0]]), recall, recall)}
        for params, low, mid in ((SMALL, 0.05, 0.1), (LARGE, 0.15, 0.2))
    }
    slow = {SMALL: 4.0, LARGE: 1.0}
    assert reach(Problem(curves, (0,), "mean", by_density, 0.9), 0.95, "head")[0, 0].params == SMALL
    by_time = Problem(curves, (0,), "mean", lambda p, d: slow[p] * d, 0.9)
    assert reach(by_time, 0.95, "head")[0, 0].params == LARGE


@pytest.mark.parametrize("seed", range(6))
def test_equal_slope_is_optimal_on_concave_curves(seed):
    """Even steps and falling gains: the greedy choice is the best of all that can be enumerated."""
    p = problem(seed, layers=2, heads=2, groups=(SMALL,), concave=True)
    options = list(everything(p, "head"))
    for budget in (0.1, 0.2, 0.33, 0.5, 0.77, 1.0):
        _, value, cost = judged(p, spend(p, budget, "head"))
        assert cost <= budget * 4 * (1 + 1e-9)
        assert value == pytest.approx(max(v for _, v, c in options if c <= budget * 4 * (1 + 1e-9)))


@pytest.mark.parametrize("by", ["head", "layer", "model"])
@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_spent_within_one_step_of_the_best(by, seed):
    p = problem(seed)
    options = list(everything(p, by))
    ladders = p.ladders(by)
    least = sum(x.cost[0] for x in ladders)
    biggest = max(float(np.diff(x.value).max()) for x in ladders if len(x.value) > 1)
    corner = np.concatenate([[(np.diff(x.value) / np.diff(x.cost)), np.diff(x.cost)] for x in ladders], axis=1)
    slopes, steps = corner[:, np.argsort(-corner[0])]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        total_budget = least + share * (4 - least)
        _, value, cost = judged(p, spend(p, total_budget / 4, by))
        assert cost <= total_budget + 1e-9
        best = max(v for _, v, c in options if c <= total_budget + 1e-9)
        taken = np.clip(total_budget - least - np.concatenate([[0], np.cumsum(steps)[:-1]]), 0, steps)
        bound = sum(x.value[0] for x in ladders) + float((taken * slopes).sum())
        assert best <= bound + 1e-9, "the hull bounds every choice"
        assert best - biggest - 1e-9 <= value <= best + 1e-9
        if by == "model":
            assert value == pytest.approx(best)


def test_a_budget_below_the_anchor_regions_says_the_minimum():
    p = problem(0)
    least = sum(min(sum(p.points[g][h].cost[0] for h in heads) for g in p.curves) for heads in p.layers.values()) / 4
    with pytest.raises(InputError, match="below what the anchor regions alone need: give at least") as error:
        spend(p, least * 0.9, "head")
    said = float(str(error.value).split("at least ")[1].split(",")[0])
    assert said == pytest.approx(least, abs=1.1e-4)
    _, _, cost = judged(p, spend(p, said, "head"))
    assert cost / 4 <= said


@pytest.mark.parametrize("seed", range(6))
def test_hull_lies_on_or_above_every_point(seed):
    rng = np.random.default_rng(seed)
    cost, value = np.sort(rng.choice(np.linspace(0, 1, 12), 30)), rng.random(30)
    at = hull(cost, value)
    assert (np.diff(cost[at]) > 0).all()
    slopes = np.diff(value[at]) / np.diff(cost[at])
    assert (slopes > 0).all()
    assert (np.diff(slopes) < 0).all()
    assert (np.interp(cost, cost[at], value[at]) >= value - 1e-12).all()
    assert value[at[-1]] == value.max()


def test_share_out_passes_over_what_does_not_fit():
    def ladder(cost, value):
        n = np.arange(len(cost))
        return Ladder([], n * 0, n, np.array(cost, float), np.array(value, float))

    # The steepest step costs 5; 3 are left: the next best that fits is taken, and then no more of the first unit.
    assert share_out([ladder([0, 5, 6], [0, 10, 11]), ladder([0, 2, 3], [0, 1, 1.2])], 3) == [0, 2]
    assert share_out([ladder([0, 5, 6], [0, 10, 11]), ladder([0, 2, 3], [0, 1, 1.2])], 8) == [2, 1]


def test_shared_theta_is_written_for_every_head_alike():
    a, b = np.array([-math.inf, 1.0, math.inf]), np.array([-math.inf, 2.0, math.inf])
    ones = np.array([[0.5, 0.8, 1.0]])
    curves = {SMALL: {(0, h): HeadCurves(0, h, SMALL, t, ones, ones, ones, ones) for h, t in enumerate((a, b))}}
    p = Problem(curves, (0,), "mean", by_density, 1.0)
    assert [s.theta for s in reach(p, 0.8, "layer").values()] == [2.0, 2.0]
    theta, choice = one_theta(p, dict.fromkeys(p.heads, SMALL), 0.7)
    assert theta == 1.0
    assert [s.theta for s in choice.values()] == [1.0, 1.0]


def test_one_theta_is_the_largest_within_the_budget():
    p = problem(11, groups=(SMALL,))
    menu = shared_menu(SMALL, p.points[SMALL])
    for budget in (0.3, 0.6, 0.9):
        found = one_theta(p, dict.fromkeys(p.heads, SMALL), budget)
        costs = [next(total(p, dict.fromkeys(p.heads, (SMALL, t))))[2] / 4 for t in menu.theta]
        allowed = [t for t, c in zip(menu.theta, costs, strict=True) if c <= budget]
        assert found is None if not allowed else found[0] == max(allowed)


def test_points_end_in_dense():
    p = Points(np.array([1.0, 2.0]), np.array([0.5, 1.0]), np.array([0.2, 1.0]))
    assert (p.setting(0), p.setting(1)) == (1.0, None)
