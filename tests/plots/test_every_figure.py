"""Every figure of every command, of awkward input, looked at by `looking.py`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from looking import assert_cells_readable, assert_legends_hide_nothing, assert_no_text_overlap, colors_used, drawn_texts
from matplotlib.figure import Figure
from synthetic import make_profile

from anchorscope.bench import figures as bench_figures
from anchorscope.calibration import figures as calibration_figures
from anchorscope.compare import figures as compare_figures
from anchorscope.compare.tables import Point
from anchorscope.evaluation import figures as evaluation_figures
from anchorscope.heads import figures as heads_figures
from anchorscope.heads.tables import METRICS, HeadRow
from anchorscope.methods import line_up
from anchorscope.plots import draw

ROOT = Path(__file__).parents[2]
LONG = (
    "a-prompt/whose name is much longer than any title of a figure: $x_1^2$ \\undefined _and_ then some more words.txt"
)
MODEL = {"name": "an-organization-with-a-name/a$b$c_x^-Instruct-of-a-model-with-a-very-long-name-indeed-70B"}
Named = Iterator[tuple[str, Figure]]


def analyses() -> Named:
    """Of `analyze`: one head; 40 layers; 12 thetas, infinite ones among them; a window; long names."""
    few = [make_profile(tokens=600, block=16, step=2, prompt=LONG, thetas=tuple(range(2, 26, 2)))]
    many = [
        make_profile(layer=layer, head=head, tokens=300, block=16, step=2, thetas=(8.0, -math.inf, math.inf))
        for layer in range(40)
        for head in range(9)
    ]
    window = [make_profile(head=h, tokens=3000, block=32, step=2, window=700) for h in range(12)]
    yield from figures_of_analysis(few, "few")
    yield "many-grid", draw.layer_head_grid(many, model=MODEL)
    yield from figures_of_analysis(window, "window")


def figures_of_analysis(profiles: list, name: str) -> Named:
    note = "theta 8, the first of 41 to reach mean recall 0.95 over all prompts and heads"
    heads = [draw._Head(p, p) for p in profiles]
    how = {"model": MODEL, "note": note}
    yield from draw._figures(heads, {profiles[0].prompt: name}, None, None, 0.95, how)


def diagnoses() -> Named:
    """Of `heads`: one head, 40 layers, nine heads with numbers, shares that round to all and nothing."""
    for layers, heads in ((1, 1), (40, 8), (4, 32)):
        rows = [head_row(layer, head) for layer in range(layers) for head in range(heads)]
        report = {
            "dump": {"model": MODEL},
            "prompts": [{"name": LONG, "tokens": 123456}],
            "settings": {"block": 128, "step": 4, "theta": 12.0},
        }
        for name, figure in heads_figures._figures(rows, report):
            yield f"{layers}x{heads}-{name}", figure


def head_row(layer: int, head: int) -> HeadRow:
    rng = np.random.default_rng([layer, head])
    known: dict[str, Any] = {name: float(rng.random()) for name in METRICS}
    known |= {"sink_4": 0.9996, "local_128": 0.00001, "vertical_mass": 1.0, "slash_mass": 0.9999999}
    known |= {"distance_1024": 1024 * rng.random(), "effective_keys_median": 10 ** (5 * rng.random())}
    empty = {"hidden_sinks": (), "influential": (), "stripe_tokens": (), "previous_layer": layer - 2 if layer else None}
    kind = ("streaming", "mixed", "retrieval")[(layer + head) % 3]
    fields = {"prompt": LONG, "layer": layer, "head": head, "kv_head": head // 4, "kind": kind, **known, **empty}
    return HeadRow(**{f.name: fields[f.name] for f in dataclasses.fields(HeadRow)})


def comparisons() -> Named:
    """Of `compare`: the whole line-up on many heads of ten prompts; one head of one."""
    for prompts, heads in ((10, 4), (1, 1)):
        lineup = line_up("all", ["anchor.block=32"], [LONG[-40:]])
        methods = [
            {
                "label": c.label,
                "method": c.method.name,
                "settings": c.method.settings,
                "oracle": c.method.oracle,
                "granularity": c.method.granularity,
            }
            for c in lineup
        ]
        points = [
            Point(f"{p} {LONG}", layer, head, c.label, "x", x, r, r, r, min(1.0, r**9 + 0.01 * i), 0.0, 0.0)
            for p in range(prompts)
            for layer in (3,)
            for head in range(heads)
            for i, c in enumerate(lineup)
            for x, r in ((1, 0.5 + 0.01 * i), (2, 0.9), (3, 0.99), (4, 1.0))
        ]
        report = {
            "settings": {"methods": methods, "target_recall": 0.95},
            "dump": {"model": MODEL},
            "prompts": [{"name": f"{p} {LONG}", "tokens": 1000 * p + 5000} for p in range(prompts)],
        }
        for name, figure in itertools.islice(compare_figures._figures(points, report), 5):
            yield f"{prompts}-{name}", figure


def calibrations() -> Named:
    """Of `calibrate`: several prompts, lengths and groups; heads that crowd below the target; nothing sparse."""
    rng = np.random.default_rng(0)
    for layers, heads, target in ((2, 4, 0.9), (40, 12, None)):
        rows = []
        for layer in range(layers):
            for head in range(heads):
                held, fitted = 0.9 - 0.0004 * head, 0.9 + 0.0001 * rng.random()
                theta = ["dense", "-inf", "inf", 3.3 + head + layer / 7][min(head, 3)]
                short = None if target is None else max(target - held, 0.0)
                rows.append(
                    {
                        "layer": layer,
                        "head": head,
                        "theta": theta,
                        "fitted_recall": fitted,
                        "held_out_recall": held,
                        "fitted_density": 0.1,
                        "held_out_density": 0.1003,
                        "shortfall": short,
                        "kept": None if short is None else not short,
                    }
                )
        yield from calibration_of(rows, layers, target)


def calibration_of(rows: list[dict[str, Any]], layers: int, target: float | None) -> Named:
    names = ("value", "value_worst_head", "density")

    def part(x: float) -> dict[str, Any]:
        return {side: dict(zip(names, (x, x - 0.04, x**20 + 0.05), strict=True)) for side in ("fitted", "held_out")}

    methods = ("equal slope", "one theta, same groups", "one theta, one group")
    budgets = [
        {"rows": [{"method": m, **({"group": g} if m.endswith("one group") else {}), **part(x)} for m in methods]}
        for x in (0.9, 0.95, 0.999, 1.0)
        for g in ("64x8", "128x4", "128x16")
    ]
    lengths = [
        {"fit_tokens": a, "tokens": b, "held_out": a == b, "value": v, "density": 0.1 * v, "heads_missed_share": m}
        for a in (1024, 131072)
        for b in (1024, 131072)
        for v, m in ((0.9996 if a == b else 0.5, 0.9997 if a < b else 0.0001),)
    ]
    report = {
        "settings": {
            "target": target,
            "budget_density": 0.1,
            "by": "head",
            "statistic": "mean",
        },
        "model": MODEL,
        "prompts": [{"name": f"{i} {LONG}", "tokens": 1024 << i, "held_out": i == 0} for i in range(8)],
        "held_out": {},
        "promise": None if target is None else {"heads_missed": 3},
        "heads": rows,
        "layers": [{"layer": i, "block": 64 << i % 3, "step": 4} for i in range(layers)],
        "lengths": lengths,
        "against_one_theta": {
            "budgets": budgets,
            "targets": [part(x) for x in (0.9, 0.99)],
            "at_choice": [part(0.95)],
        },
    }
    for function in ("theta_map", "fitted_held_out", "recall_density", "length_matrix"):
        yield f"{layers}-{function}", getattr(calibration_figures, function)(report)


def evaluations() -> Named:
    """Of `evaluate`: one arm and five, one sample and several, long names, differences that mean nothing."""
    for names, lengths, samples in (
        (["a"], [512], 1),
        ([LONG, "_b", "theta 8", "d", "e"], [2048, 4096, 8192, 131072], 4),
    ):
        report = evaluation(names, lengths, samples)
        for name, figure in evaluation_figures._figures(report):
            yield f"{len(names)}-{name}", figure


def evaluation(names: list[str], lengths: list[int], samples: int) -> dict[str, Any]:
    def answers(task: str, length: int, arm: str, depth: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {"task": task, "length": length, "arm": arm, "depth": depth, "samples": samples}
        found["intervals"] = {}
        for side, shift in (("dense", 0.0), ("sparse", 0.0001)):
            found[f"score_{side}"], found[f"logprob_{side}"] = 0.9996, -5.25 + shift
            found["intervals"][f"score_{side}"] = [0.5, 1.0]
            found["intervals"][f"logprob_{side}"] = [-5.3, -5.2] if samples > 1 else None
        return found

    tasks = ["needle", "multi-needle", "variable-tracking"]
    prompts = [
        {
            "prompt": p,
            "length": n,
            "arm": arm,
            "perplexity_ratio": 1.0 + 1e-9,
            "perplexity_dense": 123456.78,
            "intervals": {"perplexity_ratio": [1 - 1e-9, 1 + 2e-9]},
            "by_position": {"position": list(range(0, n, n // 8)), "kl": [0.0] * 8, "agreement": [1.0] * 8},
            "layers": [{"layer": i, "density": 0.5 + i / 90, "recall": 0.9996} for i in range(40)],
        }
        for p in (LONG, "b")
        for n in lengths[:2]
        for arm in names
    ]
    arms = [{"name": name, "theta_low": 2.0, "theta_high": 2.0 + i, "groups": ["64x8"]} for i, name in enumerate(names)]
    return {
        "model": MODEL,
        "arms": arms,
        "prompts": prompts,
        "tasks": [answers(t, n, a, None) for t in tasks for n in lengths for a in names],
        "depths": [answers("needle", n, a, d) for n in lengths for a in names for d in (0.0, 0.25, 0.5, 1.0)],
    }


def benches() -> Named:
    """Of `bench`: twelve lengths, inputs with long names, a pipeline slower than dense, twelve thetas."""
    saved = json.loads((ROOT / "docs/benchmarks/h100/bench.json").read_text())
    row = saved["rows"][0]

    def rows(sources: list[str], lengths: list[int], thetas: int) -> dict[str, Any]:
        made = []
        for source in sources:
            for n in lengths:
                sparse = [
                    {
                        **row["sparse"][0],
                        "theta": t if t else "-inf",
                        "density": 0.05 + 0.07 * t,
                        "speedup": 2 - 0.15 * t,
                    }
                    for t in range(thetas)
                ]
                whole = sparse[0]["whole"]["median_ms"]
                slow = [{**d, "timing": dict.fromkeys(d["timing"], whole / 9)} for d in row["dense"]]
                made.append({**row, "source": source, "n": n, "sparse": sparse, "dense": slow})
        return {**saved, "rows": made, "settings": {**saved["settings"], "input": "dump"}}

    cases = {
        "lengths": rows(["planted"], [1024 * (i + 1) for i in range(12)], 2),
        "inputs": rows([f"{LONG}/layer {i}" for i in range(4)], [131072], 12),
        "panels": rows([f"{LONG}/layer {i}" for i in range(4)], [1024, 131072], 2),
    }
    for name, data in cases.items():
        yield f"{name}-time", bench_figures.figure_time(data, MODEL)
        density = bench_figures.figure_density(data, MODEL)
        assert density is not None
        yield f"{name}-density", density


COMMANDS = {
    "analyze": analyses,
    "heads": diagnoses,
    "compare": comparisons,
    "calibrate": calibrations,
    "evaluate": evaluations,
    "bench": benches,
}
# Where the two colors with one meaning everywhere may stand.
MISSED = ("grid", "heatmap", "fitted_held_out")
ORACLE = ("recall-density", "density-needed", "winners")


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_figure_can_be_read(command: str) -> None:
    count = 0
    for name, figure in COMMANDS[command]():
        count += 1
        try:
            assert_no_text_overlap(figure)
            assert_legends_hide_nothing(figure)
            assert_cells_readable(figure)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        words = "\n".join(text.get_text() for text, _ in drawn_texts(figure))
        assert "an-organization" in words, f"{name} does not name the model"
        used = colors_used(figure)
        assert "missed" not in used or name.endswith(MISSED), f"{name}: orange-red is for what is missed"
        assert "oracle" not in used or name.endswith(ORACLE), f"{name}: yellow-orange is for the stripe oracle"
    assert count >= 6
