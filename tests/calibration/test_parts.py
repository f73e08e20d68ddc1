"""Curves, measured times, hold-out, promise, lengths and the comparison with one theta, on synthetic profiles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_profile

from anchorscope.calibration.choose import Problem, Setting, reach
from anchorscope.calibration.costs import Costs, by_density
from anchorscope.calibration.curves import HeadCurves, PromptCurve, common_grid
from anchorscope.calibration.outcome import Outcome, against_one_theta, gain, lengths, promise, relative_time
from anchorscope.calibration.prompts import Prompt, hold_out, labels, same_text
from anchorscope.calibration.sources import parse_groups
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams

BENCH = Path(__file__).parents[2] / "docs" / "benchmarks" / "h100" / "bench.json"
SMALL, LARGE = AnchorParams(64, 8), AnchorParams(128, 16)
ASKED = (8.0, -math.inf, 4.0, 12.0)


# ----------------------------------------------------------------------------------------------------------------
# curves


def test_mean_is_read_on_the_fine_curve():
    p = make_profile(tokens=2048, thetas=ASKED)
    c = PromptCurve.of(p, "mean")
    assert len(c.theta) < len(p.curve_theta) == len(c.grid)
    at = np.searchsorted(c.theta, p.curve_theta, side="right") - 1
    np.testing.assert_array_equal(c.density[at], p.curve_pairs / p.visible_pairs)
    np.testing.assert_array_equal(c.recall[at][:-1], p.curve_recall[:-1])
    assert (c.recall[-1], c.p05[-1], c.last[-1], c.density[-1]) == (1, 1, 1, 1)
    # Row statistics are the asked theta's below: never more than what was measured.
    for theta, want in ((4.0, 4.0), (7.75, 4.0), (8.0, 8.0), (11.0, 8.0), (-3.0, -math.inf), (20.0, 12.0)):
        asked = list(p.thetas).index(want)
        i = np.searchsorted(c.theta, theta, side="right") - 1
        assert c.p05[i] == p.recall_p05[asked]
        assert c.last[i] == p.recall_last[asked]


def test_row_statistics_know_nothing_below_the_asked_thetas():
    c = PromptCurve.of(make_profile(tokens=2048, thetas=(8.0,)), "mean")
    assert (c.p05[c.theta < 8] == 0).all()
    assert (c.p05[c.theta >= 8] > 0).all()


@pytest.mark.parametrize("statistic", ["p05", "last"])
def test_row_statistics_are_chosen_on_the_asked_thetas(statistic):
    p = make_profile(tokens=2048, thetas=ASKED)
    c = PromptCurve.of(p, statistic)
    assert c.grid.tolist() == [-math.inf, 4.0, 8.0, 12.0, math.inf]
    for name, exact in (("p05", p.recall_p05), ("last", p.recall_last), ("recall", p.recall), ("density", p.density)):
        for theta, value in zip(p.thetas, exact, strict=True):
            assert getattr(c, name)[np.searchsorted(c.theta, theta, side="right") - 1] == value


def test_pooling_reads_every_prompt_at_its_own_steps():
    profiles = [make_profile(prompt=str(i), tokens=2048, thetas=ASKED, seed=i) for i in range(3)]
    grids = {}
    curves = [PromptCurve.of(p, "mean", grids) for p in profiles]
    assert len(grids) == 1
    pooled = HeadCurves.of(0, 0, profiles[0].params, curves, common_grid(curves))
    for i, p in enumerate(profiles):
        for t, theta in enumerate(pooled.theta[:-1]):
            want = int(np.flatnonzero(p.curve_theta == theta)[0])
            assert pooled.recall[i, t] == p.curve_recall[want]
            assert pooled.density[i, t] == p.curve_pairs[want] / p.visible_pairs
    assert pooled.at(5.1) == np.flatnonzero(pooled.theta <= 5.1)[-1]


def test_thetas_are_those_every_profile_was_measured_at():
    a = PromptCurve.of(make_profile(tokens=2048, thetas=(1.0, 2.0, 3.0)), "p05")
    b = PromptCurve.of(make_profile(tokens=2048, thetas=(2.0, 2.5, 3.0)), "p05")
    assert common_grid([a, b]).tolist() == [2.0, 3.0, math.inf]
    c = PromptCurve.of(make_profile(tokens=2048, thetas=(9.0,)), "p05")
    with pytest.raises(InputError, match="no theta in common"):
        common_grid([a, c])


# ----------------------------------------------------------------------------------------------------------------
# measured times


def bench(path, group, rows, device="H100"):
    """A bench result with (length, density, speed-up) rows."""
    data = {
        "format": "anchorscope-bench",
        "format_version": 1,
        "settings": {"block": group[0], "step": group[1], "backend": "triton", "dtype": "bf16"},
        "hardware": {"name": device},
        "rows": [{"n": n, "sparse": [{"density": d, "efficiency": s * d}]} for n, d, s in rows],
    }
    path.write_text(json.dumps(data))
    return path


def test_times_are_interpolated_over_density(tmp_path):
    file = bench(tmp_path / "b.json", (64, 8), [(8192, 0.1, 5.0), (8192, 0.5, 2.0), (65536, 0.1, 10.0)])
    price = Costs.load([file]).price([SMALL], 10_000)
    got = price(SMALL, np.array([0.02, 0.1, 0.3, 0.5, 1.0]))
    # Held below the least density, linear between, at constant efficiency above the largest.
    np.testing.assert_allclose(got, [0.2, 0.2, 0.35, 0.5, 1.0])
    np.testing.assert_allclose(Costs.load([file]).price([SMALL], 50_000)(SMALL, np.array([0.1])), [0.1])


def test_times_of_a_real_bench():
    costs = Costs.load([BENCH])
    data = json.loads(BENCH.read_text())
    for row in data["rows"]:
        price = costs.price([LARGE], row["n"])
        assert costs.length(LARGE, row["n"]) == row["n"]
        for s in row["sparse"]:
            assert price(LARGE, np.array([s["density"]]))[0] == pytest.approx(1 / s["speedup"], rel=1e-6)
    assert "H100" in costs.hardware


def test_several_groups_and_what_is_refused(tmp_path):
    a = bench(tmp_path / "a.json", (64, 8), [(4096, 0.1, 4.0)])
    b = bench(tmp_path / "b.json", (128, 16), [(4096, 0.1, 8.0)])
    price = Costs.load([a, b]).price([SMALL, LARGE], 4096)
    assert price(SMALL, np.array([0.1]))[0] == 2 * price(LARGE, np.array([0.1]))[0]
    with pytest.raises(InputError, match=r"holds no times of groups 128x4, only of 64x8, 128x16"):
        Costs.load([a, b]).price([AnchorParams(128, 4)], 4096)
    with pytest.raises(InputError, match="of one device"):
        Costs.load([a, bench(tmp_path / "c.json", (128, 4), [(4096, 0.1, 8.0)], "A100")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "no bench result"),
        ('{"format": "anchorscope-bench", "format_version": 2}', "no bench result of version 1"),
        ('{"format": "anchorscope-bench", "format_version": 1}', "damaged"),
    ],
)
def test_files_that_are_no_bench(tmp_path, content, words):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        Costs.load([path])


def test_bench_without_a_sparse_run_or_with_nonsense(tmp_path):
    with pytest.raises(InputError, match="timed no sparse run"):
        Costs.load([bench(tmp_path / "a.json", (64, 8), [])])
    with pytest.raises(InputError, match="makes no sense"):
        Costs.load([bench(tmp_path / "b.json", (64, 8), [(4096, 1.5, 2.0)])])


# ----------------------------------------------------------------------------------------------------------------
# prompts


def prompts(*names, tokens=1000):
    return [Prompt("d", n, tokens) for n in names]


def test_holdout_is_a_fixed_share_by_name():
    some = prompts(*"abcdefghij")
    held = hold_out(some, 0.3, 0)
    assert sum(held) == 3
    assert held == hold_out(some, 0.3, 0)
    by_name = dict(zip("abcdefghij", held, strict=True))
    back = hold_out(some[::-1], 0.3, 0)
    assert by_name == dict(zip("jihgfedcba", back, strict=True)), "the order given does not matter"
    assert len({tuple(hold_out(some, 0.3, seed)) for seed in range(8)}) > 1
    assert [sum(hold_out(prompts("a", "b"), share, 0)) for share in (0.01, 0.5, 0.99)] == [1, 1, 1]
    assert hold_out(some, 0, 0) == [False] * 10
    assert hold_out(some, ["c", "a"], 0) == [n in "ac" for n in "abcdefghij"]


def test_a_text_is_never_on_both_sides():
    ids = tuple(range(40))
    some = [
        Prompt("x", "story-1k", 10, token_ids=ids[:10]),
        Prompt("y", "story-2k", 20, token_ids=ids[:20]),
        Prompt("z", "story", 40, token_ids=ids),
        Prompt("x", "code", 10, token_ids=ids[1:11]),
        Prompt("y", "code", 20),
    ]
    keys = same_text(some)
    assert keys[0] == keys[1] == keys[2] != keys[3] == keys[4]
    for seed in range(6):
        held = hold_out(some, 0.5, seed)
        assert held[0] == held[1] == held[2] != held[3] == held[4]
    assert hold_out(some, ["story"], 0) == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("some", "holdout", "words"),
    [
        (prompts("a"), 0.3, "there is only one prompt, so none can be held out"),
        ([*prompts("a"), *prompts("a", tokens=2000)], 0.3, "only lengths of one text"),
        (prompts("a", "b"), 1.0, "share from 0 to below 1"),
        (prompts("a", "b"), math.nan, "share from 0 to below 1"),
        (prompts("a", "b"), ["c"], "no prompt 'c'; there are a, b"),
        (prompts("a", "b"), ["a", "b"], "names every prompt"),
    ],
)
def test_holdouts_that_cannot_be(some, holdout, words):
    with pytest.raises(InputError, match=words):
        hold_out(some, holdout, 0)


def test_labels_tell_prompts_apart():
    some = [Prompt("x", "a", 10), Prompt("y", "a", 2000), Prompt("z", "a", 2000), Prompt("x", "b", 10)]
    assert labels(some) == ["a (10)", "a (2,000) #1", "a (2,000) #2", "b"]


@pytest.mark.parametrize("text", ["64", "64x", "64x8,", "0x4", "64x8,64x8", "x", "64*8", "-1x8"])
def test_groups_that_make_no_sense(text):
    with pytest.raises(InputError):
        parse_groups(text)


# ----------------------------------------------------------------------------------------------------------------
# outcomes


def flat(layer, head, recall, density, theta=(-math.inf, 5.0, math.inf), params=SMALL):
    """A head with given recall and density (P, 2) at -inf and 5 nats."""
    recall, density = (np.column_stack([np.asarray(x, float), np.ones(len(x))]) for x in (recall, density))
    return HeadCurves(layer, head, params, np.array(theta), recall, density, recall / 2, recall / 4)


@pytest.fixture
def three():
    """Two layers, three heads, two prompts; the second prompt is the held-out one."""
    return {
        SMALL: {
            (0, 0): flat(0, 0, [[0.5, 0.95], [0.5, 0.93]], [[0.1, 0.2], [0.1, 0.3]]),
            (0, 1): flat(0, 1, [[0.6, 0.96], [0.6, 0.99]], [[0.1, 0.4], [0.1, 0.5]]),
            (3, 0): flat(3, 0, [[0.1, 0.2], [0.1, 0.1]], [[0.1, 0.5], [0.1, 0.5]]),
        }
    }


def test_outcome_and_promise(three):
    choice = reach(Problem(three, (0,), "mean", by_density, 0.9), 0.95, "head")
    assert choice[3, 0].theta is None
    held = Outcome.of(choice, three, [1])
    assert held.recall[:, 0].tolist() == [0.93, 0.99, 1.0]
    assert held.density[:, 0].tolist() == [0.3, 0.5, 1.0]
    assert held.p05[:, 0].tolist() == [0.465, 0.495, 1.0]
    found = promise(held, "mean", 0.95, "head")
    assert (found["units"], found["broken"], found["broken_clearly"], found["heads_missed"]) == (3, 1, 1, 1)
    assert found["broken_share"] == pytest.approx(1 / 3)
    assert found["pooled"] == pytest.approx((0.93 + 0.99 + 1) / 3)
    (short,) = found["shortfalls"]
    assert (short["layer"], short["head"], short["shortfall"]) == (0, 0, pytest.approx(0.02))
    by_layer = promise(held, "mean", 0.97, "layer")
    assert (by_layer["units"], by_layer["broken"], by_layer["heads_missed"]) == (2, 1, 1)
    assert by_layer["shortfalls"][0]["layer"] == 0
    assert promise(held, "mean", 0.97, "model")["broken"] == 0
    assert promise(held, "mean", 0.93, "head")["broken"] == 0, "reached exactly is reached"
    summary = held.summary(["the one"])
    assert summary["worst_head"] == {"layer": 0, "head": 0, "recall": 0.93}
    assert summary["worst_prompt"]["prompt"] == "the one"
    assert relative_time(choice, held, lambda _, d: d / 2) == pytest.approx((0.15 + 0.25 + 1) / 3)


def test_lengths_are_fitted_apart_and_read_everywhere():
    """At 200 tokens the same theta keeps less: fitted at 100 it misses there, fitted at 200 it holds at 100."""
    theta = (-math.inf, 2.0, 4.0, math.inf)
    recall = [[0.5, 0.96, 0.99], [0.5, 0.96, 0.99], [0.3, 0.8, 0.97], [0.3, 0.7, 0.96]]
    density = [[0.2, 0.4, 0.6]] * 2 + [[0.1, 0.2, 0.3]] * 2
    curves = {SMALL: {(0, 0): flat(0, 0, recall, density, theta)}}
    problem = Problem(curves, (0, 2), "mean", by_density, 0.9)
    tokens, held = [100, 100, 200, 200], [False, False, False, True]
    cells = lengths(problem, lambda p: reach(p, 0.95, "head"), tokens, held, 0.95)
    got = {(c["fit_tokens"], c["tokens"]): c for c in cells}
    assert got[100, 100]["value"] == 0.96
    assert not got[100, 100]["held_out"]
    assert got[100, 200]["value"] == 0.7
    assert (got[100, 200]["heads_missed_share"], got[100, 200]["held_out"]) == (1.0, True)
    assert (got[200, 200]["value"], got[200, 200]["heads_missed_share"]) == (0.96, 0.0)
    assert (got[200, 100]["value"], got[200, 100]["density"]) == (0.99, 0.6)
    assert lengths(problem, lambda p: reach(p, 0.95, "head"), [100] * 4, held, 0.95) is None


def test_against_one_theta_at_equal_density():
    """Two heads that need different thetas: one theta must spend on the easy one what the hard one needs."""
    theta = np.array([-math.inf, 2.0, 4.0, 6.0, math.inf])

    def head(h, params, recall, density):
        r, d = (np.append(x, 1.0)[None].repeat(2, 0) for x in (recall, density))
        return HeadCurves(0, h, params, theta, r, d, r, r)

    easy, hard = ([0.9, 0.98, 0.99, 0.995], [0.1, 0.2, 0.4, 0.7]), ([0.2, 0.5, 0.8, 0.96], [0.1, 0.15, 0.2, 0.4])
    curves = {
        g: {(0, h): head(h, g, x[0], np.array(x[1]) * more) for h, x in enumerate((easy, hard))}
        for g, more in ((SMALL, 1.0), (LARGE, 1.4))
    }
    problem = Problem(curves, (0,), "mean", by_density, 0.9)
    choice = reach(problem, 0.95, "head")
    assert choice == {(0, 0): Setting(SMALL, 2.0), (0, 1): Setting(SMALL, 6.0)}
    found = against_one_theta(problem, choice, [1], "head", 0.95)
    assert found["density"] == pytest.approx(0.3)
    rows = {(r["method"], r.get("group")): r for r in found["at_choice"]}
    same = rows["one theta, same groups", None]
    assert (same["theta"], same["fitted"]["density"]) == (4.0, pytest.approx(0.3))
    assert same["held_out"]["value"] == pytest.approx((0.99 + 0.8) / 2)
    assert rows["one theta, one group", "128x16"]["theta"] == 2.0
    assert [r["best"] for r in found["at_choice"] if "best" in r] == [True, False]
    better = gain(found, "fitted")
    assert better["value"] == pytest.approx((0.98 + 0.96) / 2 - (0.99 + 0.8) / 2)
    assert better["value_worst_head"] == pytest.approx(0.16)
    for entry in found["budgets"]:
        own, *uniform = entry["rows"]
        assert own["fitted"]["density"] <= entry["budget"] + 1e-9
        for row in uniform:
            assert row["fitted"]["density"] <= entry["budget"] + 1e-9
            assert own["fitted"]["value"] >= row["fitted"]["value"] - 0.25  # one step of these coarse curves
    assert 0.95 in [r["target"] for r in found["targets"]]
