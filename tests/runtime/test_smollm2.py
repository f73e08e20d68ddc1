"""Real weights (SmolLM2-135M): theta = +inf is the model itself, finite thetas keep their promise. Figures with -s."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from sparse_models import divergence

from anchorscope import AnchorParams, attention_clock, sparse_attention
from anchorscope.anchors import AnchorConfig
from anchorscope.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.network]
N = 1024
SHAPE = AnchorParams(64, 2)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("smollm2", device="cpu", notify=print)


@pytest.fixture(scope="module")
def ids(loaded: Any) -> torch.Tensor:
    """Real source code, a module that every Python carries."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return torch.tensor([loaded.tokenizer(text)["input_ids"][:N]])


def test_everything_kept_is_the_model_itself(loaded: Any, ids: torch.Tensor) -> None:
    model = loaded.model
    with torch.inference_mode(), attention_clock(model) as clock:
        own = model(ids).logits
    with torch.inference_mode(), sparse_attention(model, AnchorConfig.uniform(math.inf, range(30), 9, SHAPE)) as run:
        ours = model(ids).logits
    kl = divergence(ours, own)
    agreement = float((ours.argmax(-1) == own.argmax(-1)).double().mean())
    times = sum(x.seconds for x in clock.layers()), sum(x.seconds for x in run.layers())
    print(f"\ntheta inf: KL mean {kl.mean():.2e}, max {kl.max():.2e}; top-1 agreement {agreement:.5f}; seconds {times}")
    assert [x.kind for x in run.layers()] == ["sparse"] * 30
    assert all(x.kept_pairs == x.visible_pairs for x in run.layers())
    assert float(kl.max()) < 1e-4
    assert agreement > 0.999


def test_recall_falls_and_divergence_grows_with_less(loaded: Any, ids: torch.Tensor) -> None:
    model, rows = loaded.model, []
    with torch.inference_mode():
        own = model(ids).logits
        for theta in (10.0, 6.0, -math.inf):
            config = AnchorConfig.uniform(theta, range(30), 9, AnchorParams(16, 2))
            with sparse_attention(model, config, measure=True) as run:
                kl = float(divergence(model(ids).logits, own).mean())
            layers = run.layers()
            density = sum(x.kept_pairs for x in layers) / sum(x.visible_pairs for x in layers)
            recall = sum(x.recall for x in layers) / len(layers)
            print(f"theta {theta}: density {density:.3f}, recall {recall:.4f}, KL {kl:.2e}")
            rows.append((density, recall, -kl))
    for column in zip(*rows, strict=True):
        assert list(column) == sorted(column, reverse=True)
    assert rows[0][1] > 0.99


def test_greedy_text_is_unchanged(loaded: Any, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 16, "do_sample": False}
    own = loaded.model.generate(ids, **options)
    with sparse_attention(loaded.model, AnchorConfig.uniform(math.inf, range(30), 9, SHAPE)):
        assert torch.equal(loaded.model.generate(ids, **options), own)
