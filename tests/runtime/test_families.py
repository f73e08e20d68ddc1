"""Every family runs sparse or is refused: theta = +inf is its own attention, a finite one is the method's."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, prompt, tiny
from family_runs import UnknownFamily, check_refusal, runnable
from sparse_models import brute_force, divergence, everywhere

from anchorscope import sparse_attention
from anchorscope.errors import InputError

THETA = {"granite": 0.05}  # its small scale leaves no score further than that from its anchor


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def check(model: torch.nn.Module, family: str) -> None:
    ids = torch.tensor([prompt().token_ids])
    own = logits(model, ids)
    with sparse_attention(model, everywhere(model, math.inf)) as run:
        all_kept = logits(model, ids)
    assert run.layers()
    assert all(x.kind == "sparse" and x.kept_pairs == x.visible_pairs for x in run.layers())
    assert float(divergence(all_kept, own).max()) < 1e-5
    assert torch.equal(all_kept.argmax(-1), own.argmax(-1))
    assert float((all_kept - own).abs().max()) < 1e-5 * max(1.0, float(own.abs().max()))

    config = everywhere(model, THETA.get(family, 1.0))
    with sparse_attention(model, config, measure=True) as run:
        ours = logits(model, ids)
    with brute_force(model, config):
        expected = logits(model, ids)
    difference = float((ours - expected).abs().max())
    assert difference < 1e-5 * max(1.0, float(own.abs().max()))
    assert float((ours - own).abs().max()) > 10 * difference
    assert all(0 < x.density < 1 and 0 < x.recall < 1 for x in run.layers())
    assert torch.equal(logits(model, ids), own)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_specification_or_is_refused_with_a_reason(family: str) -> None:
    try:
        model = runnable(family)
    except UnknownFamily as error:
        pytest.skip(str(error))
    try:
        with sparse_attention(model, 1.0):
            logits(model, torch.tensor([prompt().token_ids]))
    except InputError as error:
        check_refusal(family, str(error))
        return
    check(model, family)


def test_chunked_layers() -> None:
    """Attention in chunks looks like the causal attention of a padded prompt in its last row, and is not."""
    model, ids = tiny("llama4_text"), torch.tensor([prompt().token_ids])
    config = everywhere(model, math.inf)
    with (
        pytest.raises(InputError, match=r"layer 0 cannot run sparse: its mask is not causal"),
        sparse_attention(model, config),
    ):
        logits(model, ids)
    full = type(config)(config.layers[2:])
    with sparse_attention(model, full) as run:
        ours = logits(model, ids)
    assert [x.kind for x in run.layers()] == ["dense", "dense", "sparse"]
    assert float(divergence(ours, logits(model, ids)).max()) < 1e-5
