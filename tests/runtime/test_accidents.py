"""What users do to a model inside a context: right, or refused by name; never silently something else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import prompt, tiny
from sparse_models import everywhere

from anchorscope import sparse_attention
from anchorscope.errors import InputError
from anchorscope.models.kvcache import cache_option


@pytest.fixture
def model() -> Any:
    return tiny()


def ids() -> torch.Tensor:
    return torch.tensor([prompt().token_ids])


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), **options).logits


def test_a_mask_changed_in_place_is_read_again(model: Any) -> None:
    mask = torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()
    with sparse_attention(model, everywhere(model, 0.5)):
        whole = logits(model, attention_mask=mask)
        mask[..., :20] = False
        changed = logits(model, attention_mask=mask)[:, 20:]
        assert torch.equal(changed, logits(model, attention_mask=mask.clone())[:, 20:])
    assert not torch.equal(changed, whole[:, 20:])


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_no_gradient_is_lost_in_silence(model: Any, name: str) -> None:
    """Also where a single projection is trained, as by an adapter, and the first layer's other inputs need none."""
    model.requires_grad_(False)
    getattr(model.model.layers[0].self_attn, name).weight.requires_grad_(True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)  # another path for gradients
    with sparse_attention(model, everywhere(model, 0.5)):
        loss = model(ids(), labels=ids()).loss
        with pytest.raises(InputError, match="no backward pass"):
            loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_refused(model: Any, inside: bool) -> None:
    config = everywhere(model, 0.5)
    refusal = pytest.raises(
        InputError, match=r"layer 0 cannot run sparse: autocast rounds .*load the model in that dtype"
    )
    if inside:
        with sparse_attention(model, config), refusal, torch.autocast("cpu", torch.bfloat16):
            logits(model)
    else:
        with refusal, torch.autocast("cpu", torch.bfloat16), sparse_attention(model, config):
            pass


def test_weights_of_attention_asked_for_by_the_configuration() -> None:
    model = tiny(attn_implementation="eager")
    model.config.output_attentions = True
    assert len(model(ids()).attentions) == 3
    with (
        sparse_attention(model, everywhere(model, 0.5)),
        pytest.raises(InputError, match="asked for its attention weights"),
    ):
        logits(model)


def test_another_dtype_inside(model: Any) -> None:
    with sparse_attention(model, everywhere(model, math.inf)) as run:
        model.bfloat16()
        ours = logits(model)
    own = logits(model)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    assert ours.dtype == torch.bfloat16
    assert float((ours - own).abs().max()) < 0.02 * float(own.abs().max())


def test_a_static_cache_used_again(model: Any) -> None:
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        alone, once = logits(model), run.layers()
        run.reset()
        cache = transformers.StaticCache(config=model.config, max_cache_len=120)
        for _ in range(2):
            cache.reset()
            assert torch.equal(logits(model, use_cache=True, **cache_option(model, cache)), alone)
    assert [(x.queries, x.kept_pairs) for x in run.layers()] == [(2 * x.queries, 2 * x.kept_pairs) for x in once]


def test_prefill_in_chunks_of_generate(model: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        whole = model.generate(ids(), **options)
        once = run.layers()
        run.reset()
        assert torch.equal(model.generate(ids(), prefill_chunk_size=32, **options), whole)
    assert [x.calls for x in run.layers()] == [3] * 3
    assert [(x.queries, x.kept_pairs) for x in run.layers()] == [(x.queries, x.kept_pairs) for x in once]


def test_layers_compiled_one_by_one(model: Any) -> None:
    torch._dynamo.reset()
    with sparse_attention(model, everywhere(model, 0.5)):
        expected = logits(model, use_cache=False)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    own = logits(model, use_cache=False)
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        assert float((logits(model, use_cache=False) - expected).abs().max()) < 2e-6
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    assert torch.equal(logits(model, use_cache=False), own)
    torch._dynamo.reset()


def test_data_parallel_is_refused(model: Any) -> None:
    with (
        pytest.raises(InputError, match="needs a loaded transformers model, not DataParallel"),
        sparse_attention(torch.nn.DataParallel(model), 1.0),
    ):
        pass
