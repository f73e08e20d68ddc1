"""The disk stated beforehand against the bytes that runs really write."""

from __future__ import annotations

import pytest
import torch

import anchorscope
from anchorscope.analysis.run import analyze, plan_analysis
from anchorscope.calibration import calibrate, plan_calibration
from anchorscope.compare import compare, plan_compare
from anchorscope.heads import diagnose, plan_heads
from anchorscope.methods import line_up
from anchorscope.params import AnchorParams


def written(path, tokens, layers, heads, prompts=("a",)):
    g = torch.Generator().manual_seed(0)
    entries = []
    for prompt in prompts:
        for layer in range(layers):
            q, k, v = (torch.randn(h, tokens, 16, generator=g) for h in (heads, 1, 1))
            k[:, ::31] += 1
            entries.append({"prompt": prompt, "layer": 3 * layer, "q": q + 0.5, "k": k, "v": v, "scale": 0.3})
    return anchorscope.write_dump(path, entries)


def used(path):
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name[0] != ".")


@pytest.mark.parametrize(
    ("tokens", "layers", "heads", "params", "thetas"),
    [
        (300, 1, 2, AnchorParams(16, 2), (8.0,)),
        (1024, 2, 4, AnchorParams(16, 2), (8.0,)),
        (700, 1, 3, AnchorParams(32, 2), tuple(range(40))),
    ],
)
def test_analyze_without_figures_within_a_fifth(tmp_path, tokens, layers, heads, params, thetas):
    plan = plan_analysis(written(tmp_path / "d", tokens, layers, heads), thetas=thetas, params=params)
    analyze(tmp_path / "d", tmp_path / "o", plan=plan, figures=False)
    assert 0.8 * used(tmp_path / "o") <= plan.disk <= 1.2 * used(tmp_path / "o")


def test_small_runs_with_figures_are_not_overstated(tmp_path):
    """Pictures differ by what they show: within a factor of two, where it was eighty."""
    dump = written(tmp_path / "d", 300, 2, 2)
    runs = {
        "analyze": (analyze, plan_analysis(dump, params=AnchorParams(16, 2)), {}),
        "heads": (diagnose, plan_heads(dump), {}),
        "compare": (compare, plan_compare(dump, lineup=line_up("streaming,anchor,block-topk,oracle-stripe")), {}),
    }
    for name, (run, plan, options) in runs.items():
        run(dump, tmp_path / name, plan=plan, **options)
        real = used(tmp_path / name)
        assert real / 2 <= plan.disk + plan.pictures <= 2 * real, (name, real, plan.disk, plan.pictures)


def test_tables_of_heads_and_compare_within_a_fifth_and_a_grain(tmp_path):
    dump = written(tmp_path / "d", 400, 3, 4)
    plan = plan_heads(dump, params=AnchorParams(16, 4))
    diagnose(dump, tmp_path / "h", plan=plan, figures=False)
    assert abs(plan.disk - used(tmp_path / "h")) <= 0.2 * plan.disk + 10_000
    plan = plan_compare(dump, lineup=line_up("streaming,anchor,block-topk,oracle-stripe"))
    compare(dump, tmp_path / "c", plan=plan, figures=False)
    assert abs(plan.disk - used(tmp_path / "c")) <= 0.2 * plan.disk + 10_000


def test_calibrate_within_a_fifth_and_a_grain(tmp_path):
    dump = written(tmp_path / "d", 500, 2, 3, ("a", "b"))
    plan = plan_calibration(dump.path, groups=[AnchorParams(16, 2), AnchorParams(32, 2)], thetas=(2.0, 4.0, 8.0))
    calibrate(dump.path, tmp_path / "o", plan=plan, figures=False)
    real = used(tmp_path / "o")
    assert abs(plan.disk - real) <= 0.2 * real + 100_000


def test_memory_of_short_prompts_is_not_half_a_gigabyte(tmp_path):
    dump = written(tmp_path / "d", 300, 1, 2)
    assert plan_compare(dump).memory < 50e6
