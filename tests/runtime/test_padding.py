"""Padded batches, with windows that the configuration names: every prompt as if it were alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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

MIXED = (0.5, 2.0, None, None, None, None)  # one kv head sparse, one dense throughout
WINDOWED = ["cohere2", "gemma2", "gemma3_text", "mistral", "qwen2"]


def logits(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **options).logits


def batch_of(lengths: Sequence[int], side: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[int]]:
    """Inputs of a padded batch; its prompts (1, length); where each begins."""
    most = max(lengths)
    prompts = [torch.tensor([prompt(n, seed=i).token_ids]) if n else torch.zeros(1, 0) for i, n in enumerate(lengths)]
    starts = [{"left": most - n, "right": 0, "both": (most - n) // 2}[side] for n in lengths]
    x, mask = (torch.zeros(len(lengths), most, dtype=torch.long) for _ in range(2))
    for row, (start, one) in enumerate(zip(starts, prompts, strict=True)):
        x[row, start : start + one.shape[1]] = one
        mask[row, start : start + one.shape[1]] = 1
    inputs = {"input_ids": x, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return inputs, prompts, starts


def check(model: Any, lengths: Sequence[int], side: str) -> None:
    """The batch against each prompt alone: logits to 1e-5 of the largest, and the counts."""
    inputs, prompts, starts = batch_of(lengths, side)
    with torch.no_grad():
        own = model(**inputs).logits
    with sparse_attention(model, everywhere(model, MIXED)) as run:
        together = logits(model, inputs.pop("input_ids"), **inputs)
        counts = run.layers()
        run.reset()
        alone = [logits(model, x) if x.shape[1] else None for x in prompts]
        expected = run.layers()
    for row, one in enumerate(alone):
        if one is not None:
            mine = together[row, starts[row] : starts[row] + one.shape[1]]
            assert float((mine - one[0]).abs().max()) < 1e-5 * max(1.0, float(one.abs().max()))
    assert [x.kind for x in counts] == ["sparse"] * len(counts)
    assert float((together[0] - own[0]).abs().max()) > 1e-4  # it did run sparse
    single = sum(n == 1 for n in lengths)  # alone, a prompt of one token is not counted as prefill
    for a, b in zip(counts, expected, strict=True):
        assert (a.queries - single, a.visible_pairs - 6 * single, a.kept_pairs - 6 * single) == (
            b.queries,
            b.visible_pairs,
            b.kept_pairs,
        )


@pytest.mark.parametrize("lengths", [(70, 50), (70, 20, 70), (70, 1, 5, 0)], ids=str)
@pytest.mark.parametrize("window", [6, 24, 55, 100])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_windows(side: str, window: int, lengths: tuple[int, ...]) -> None:
    """Windows below the padding, below the prompts, and above all of them."""
    check(tiny("mistral", sliding_window=window), lengths, side)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_families(family: str, attention: str, side: str) -> None:
    """Layers with and without a window, grouped queries, soft-caps."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers' sdpa refuses soft-caps")
    check(tiny(family, attn_implementation=attention), (70, 40), side)


@pytest.mark.parametrize("lengths", [(70, 38), (70, 45, 54)], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks(attention: str, side: str, lengths: tuple[int, ...]) -> None:
    """Each prompt as if alone in the pieces that the batch's chunks make of it, the last short ones dense."""
    model, size = tiny(attn_implementation=attention), 32
    inputs, prompts, starts = batch_of(lengths, side)

    def pieces(cuts: Sequence[int], at: int | None) -> torch.Tensor:
        cache, parts = transformers.DynamicCache(), []
        for begin, end in itertools.pairwise(cuts):
            if at is None:
                now = {k: v[:, begin:end] for k, v in inputs.items()}
                now["attention_mask"] = inputs["attention_mask"][:, :end]
            else:
                now = {"input_ids": prompts[at][:, begin:end]}
            x = now.pop("input_ids")
            parts.append(logits(model, x, **cache_option(model, cache), use_cache=True, **now))
        return torch.cat(parts, 1)

    with sparse_attention(model, everywhere(model, MIXED)) as run:
        together, counts = pieces((0, 32, 64, 70), None), run.layers()
        run.reset()
        for row, (n, start) in enumerate(zip(lengths, starts, strict=True)):
            cuts = sorted({0, *(min(max(x - start, 0), n) for x in (size, 2 * size)), n})
            one = pieces(cuts, row)[0]
            assert float((together[row, start : start + n] - one).abs().max()) < 1e-5
    assert [(x.queries, x.kept_pairs, x.visible_pairs) for x in counts] == [
        (x.queries, x.kept_pairs, x.visible_pairs) for x in run.layers()
    ]
    assert all(x.density < 1 for x in counts)


def test_static_caches() -> None:
    """Prompts that are all padded on the right: the first query is not found from the end of the last prompt."""
    model = tiny()
    inputs, prompts, _ = batch_of((70, 40), "right")
    wide = {k: torch.nn.functional.pad(v, (0, 10)) for k, v in inputs.items()}
    with sparse_attention(model, everywhere(model, MIXED)) as run:
        alone = [logits(model, x)[0] for x in prompts]
        expected = run.layers()
        run.reset()
        cache = transformers.StaticCache(config=model.config, max_cache_len=120)
        together = logits(model, **{"x": wide.pop("input_ids"), **wide}, **cache_option(model, cache), use_cache=True)
    for row, one in enumerate(alone):
        assert float((together[row, : len(one)] - one).abs().max()) < 1e-5
    assert [(x.queries, x.kept_pairs, x.visible_pairs) for x in run.layers()] == [
        (x.queries, x.kept_pairs, x.visible_pairs) for x in expected
    ]


def test_generation() -> None:
    model = tiny("mistral")
    inputs, prompts, _ = batch_of((70, 30, 50), "left")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sparse_attention(model, everywhere(model, 0.5)):
        together = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        for row, x in enumerate(prompts):
            assert torch.equal(together[row, 70:], model.generate(x, **options)[0, x.shape[1] :])


def four(mask: torch.Tensor, additive: bool) -> torch.Tensor:
    """(1, 1, N, N)."""
    mask = mask[None, None]
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_ones_own(additive: bool) -> None:
    """Four-dimensional masks: one that is causal with padding runs, any other is refused for what it is."""
    model = tiny(attn_implementation="sdpa")
    x = torch.tensor([prompt(80).token_ids])
    i, j = torch.arange(80)[:, None], torch.arange(80)
    with sparse_attention(model, everywhere(model, MIXED)) as run:
        expected = logits(model, x)
        assert torch.equal(logits(model, x, attention_mask=four(j <= i, additive)), expected)
        padded = four((j <= i) & (j >= 20), additive)
        alone = logits(model, x[:, 20:])
        assert float((logits(model, x, attention_mask=padded)[:, 20:] - alone).abs().max()) < 1e-5
        several = "is not causal with padding and at most a sliding window .*several prompts in a row"
        for mask, reason in (
            ((j <= i) & ((i < 50) == (j < 50)), several),
            ((j <= i) | (j < 10), several),
            ((j <= i) & (i - j < 30), several),  # a window that the layer does not name
            ((j <= i) & (j != 7), "hides tokens in the middle of a prompt"),
        ):
            run.reset()
            with pytest.raises(InputError, match=f"LlamaAttention of layer 0 cannot run sparse: its mask {reason}"):
                logits(model, x, attention_mask=four(mask, additive))
        with pytest.raises(InputError, match="is not one for all heads"):
            logits(model, x, attention_mask=four(j <= i, additive).expand(1, 6, 80, 80))


@pytest.mark.parametrize("position_ids", [True, False])
def test_packed_prompts_are_refused(position_ids: bool) -> None:
    model = tiny()
    x = torch.tensor([prompt(80).token_ids])
    two = torch.cat((torch.arange(40), torch.arange(40)))[None]
    ends = torch.tensor([0, 40, 80], dtype=torch.int32)
    options: dict[str, Any] = (
        {"position_ids": two, "use_cache": False} if position_ids else {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    )
    with (
        sparse_attention(model, everywhere(model, MIXED)),
        pytest.raises(InputError, match=r"several prompts in a row|several sequences are packed"),
    ):
        logits(model, x, **options)
