"""Warnings of short prompts: said where they are true, with groups that do what is said of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from anchorscope import write_dump
from anchorscope.analysis.run import plan_analysis
from anchorscope.heads import plan_heads
from anchorscope.params import CUSTOMARY, AnchorParams, anchor_pairs, cheapest_groups, visible_pairs

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 128, 300, 2048, 4096)
GROUPS = (AnchorParams(128, 16), AnchorParams(64, 4), AnchorParams(16, 1))


def dump_of(folder: Any, tokens: int, window: int | None = None) -> Any:
    q = torch.zeros(1, tokens, 4)
    entry = {"prompt": "p", "layer": 0, "q": q, "k": q, "v": q, "scale": 0.5, "window": window}
    return write_dump(folder / f"d{tokens}", [entry])


def share(tokens: int, params: AnchorParams, window: int | None = None) -> float:
    return anchor_pairs(tokens, params, window) / visible_pairs(tokens, window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_what_is_said_of_the_anchor_region_is_true(tmp_path, tokens, window):
    dump = dump_of(tmp_path, tokens, window)
    for params in GROUPS:
        own = share(tokens, params, window)
        warnings = plan_analysis(dump, params=params, device="cpu").warnings
        assert len(warnings) == (own > 0.25)
        for sentence in warnings:
            found = re.search(r"--block (\d+) --step (\d+) would keep (\d\.\d+)", sentence)
            if found is not None:
                better = AnchorParams(int(found[1]), int(found[2]))
                assert share(tokens, better, window) < own
                assert float(found[3]) == pytest.approx(share(tokens, better, window), abs=0.006)
            elif "too short" in sentence:
                assert min(share(tokens, p, window) for p in CUSTOMARY) == 1
            else:
                assert "no customary groups keep fewer" in sentence
                assert own <= min(share(tokens, p, window) for p in CUSTOMARY)


def test_three_hundred_tokens_are_not_too_short(tmp_path):
    (sentence,) = plan_analysis(dump_of(tmp_path, 300), device="cpu").warnings
    assert "too short" not in sentence
    assert "--block 16 --step 1 would keep 0.2" in sentence
    assert cheapest_groups(300) == AnchorParams(16, 1)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_groups_that_are_said_to_make_neighbors_do(tmp_path, tokens):
    sentences = [w for w in plan_heads(dump_of(tmp_path, tokens), device="cpu").warnings if "neighbors" in w]
    assert bool(sentences) == (AnchorParams(128, 4).groups(tokens) < 3)
    for sentence in sentences:
        found = re.search(r"groups of at most ([\d,]+) token", sentence)
        if found is None:
            assert tokens < 3
        else:
            assert AnchorParams(1, int(found[1].replace(",", ""))).groups(tokens) >= 3
            assert AnchorParams(1, int(found[1].replace(",", "")) + 1).groups(tokens) < 3
