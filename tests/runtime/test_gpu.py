"""On a GPU: models run through the Triton kernels like through the specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from families import prompt, tiny
from sparse_models import brute_force, divergence, everywhere

from anchorscope import AnchorParams, SparseRun, sparse_attention
from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.models.calls import AttentionInputs
from anchorscope.models.kvcache import cache_option, result_cache
from anchorscope.runtime.assignment import Assignment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
N = 1500
SHAPE = AnchorParams(64, 4)
TYPES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # largest relative error of the logits
MIXED = (0.5, 2.0, None, None, None, None)


def model_of(dtype: torch.dtype, head_dim: int, **changes: Any) -> Any:
    model = tiny(head_dim=head_dim, hidden_size=192, max_position_embeddings=2048, **changes)
    return model.to("cuda", dtype)


def ids(count: int = N, seed: int = 0) -> torch.Tensor:
    return torch.tensor([prompt(count, seed=seed).token_ids], device="cuda")


def logits(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **options).logits.float()


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_the_specification(dtype: torch.dtype, head_dim: int) -> None:
    model = model_of(dtype, head_dim)
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, math.inf, SHAPE), measure=True) as run:
        everything = logits(model, ids())
    assert error(everything, own) < TYPES[dtype]
    assert all(x.kind == "sparse" and x.kept_pairs == x.visible_pairs for x in run.layers())
    assert all(abs(x.recall - 1) < 1e-3 and x.seconds > 0 for x in run.layers())
    for thetas in (1.0, MIXED):
        config = everywhere(model, thetas, SHAPE)
        with sparse_attention(model, config, measure=True) as run:
            ours = logits(model, ids())
        with sparse_attention(model, config, backend="torch", measure=True) as plain:
            logits(model, ids())
        with brute_force(model, config):
            expected = logits(model, ids())
        print(f"{dtype} {head_dim} {thetas}: error {error(ours, expected):.2e}, dense {error(own, expected):.2e}")
        assert error(ours, expected) < TYPES[dtype] < error(own, expected)
        for a, b in zip(run.layers(), plain.layers(), strict=True):
            assert a.kept_pairs == pytest.approx(b.kept_pairs, rel=1e-2)  # pooled queries are rounded
            assert a.recall == pytest.approx(b.recall, abs=1e-2)


def test_generation_caches_and_batches() -> None:
    model = model_of(torch.float32, 64)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    own = model.generate(ids(), **options)
    with sparse_attention(model, everywhere(model, math.inf, SHAPE)):
        assert torch.equal(model.generate(ids(), **options), own)
    batch = torch.cat((ids(700), torch.cat((torch.zeros_like(ids(100)), ids(600, 3)), 1)))
    mask = torch.ones_like(batch)
    mask[1, :100] = 0
    with sparse_attention(model, everywhere(model, 0.5, SHAPE)) as run:
        together = logits(model, batch, attention_mask=mask)
        counted = run.layers()
        run.reset()
        assert error(together[:1], logits(model, ids(700))) < 1e-4
        assert error(together[1:, 100:], logits(model, ids(600, 3))) < 1e-4
        assert [x.kept_pairs for x in run.layers()] == [x.kept_pairs for x in counted]
        whole = logits(model, ids())
        cached = result_cache(model(ids()[:, :1024], use_cache=True))
        assert error(logits(model, ids()[:, 1024:], **cache_option(model, cached)), whole[:, 1024:]) < 1e-4


def test_softcap_and_windows() -> None:
    model = tiny("gemma2", max_position_embeddings=2048, sliding_window=500).cuda()
    config = everywhere(model, 0.3, SHAPE)
    with sparse_attention(model, config):
        ours = logits(model, ids())
    with brute_force(model, config):
        assert error(ours, logits(model, ids())) < 1e-4
    assert float(divergence(ours, logits(model, ids())).mean()) > 1e-6


def test_attention_never_waits_for_the_gpu() -> None:
    config = AnchorConfig((LayerAnchors(0, SHAPE, MIXED),))
    run = SparseRun(Assignment(config), measure=True)
    q, k = (torch.randn(2, h, N, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2))
    call = AttentionInputs(torch.nn.Identity(), 0, "sdpa", q, k, k, None, 0.125, {})

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    run.attend(call, own)  # compiles, and moves the thetas
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.attend(call, own)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (use,) = run.layers()
    assert (use.calls, use.kind) == (2, "sparse")
    assert use.recall is not None
    assert 0 < use.recall < 1
