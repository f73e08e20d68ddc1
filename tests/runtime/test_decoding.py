"""Decoding stays the model's own: speculative candidates, beams, several answers, later turns of a conversation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import prompt, tiny
from sparse_models import SMALL, everywhere

from anchorscope import sparse_attention
from anchorscope.models.calls import AttentionInputs
from anchorscope.models.hook import divert
from anchorscope.models.kvcache import cache_option, result_cache

FAMILIES = ["cohere2", "exaone4", "gemma2", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]
NEW = 24


def ids(count: int = 80, period: int = 23) -> torch.Tensor:
    """A prompt that repeats itself, so that looking up finds candidates."""
    return torch.tensor([(prompt(period).token_ids * 9)[:count]])


def generate(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(
        x, max_new_tokens=NEW, **{"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    )


class Lengths:
    """The queries of every call of layer 0."""

    def __init__(self, model: Any) -> None:
        self.seen: list[int] = []
        self._context = divert(model, self._note)

    def _note(self, call: AttentionInputs, own: Any) -> Any:
        if call.layer == 0:
            self.seen.append(call.q.shape[2])
        return own(call.q, call.k, call.v)

    def __enter__(self) -> list[int]:
        self._context.__enter__()
        return self.seen

    def __exit__(self, *reason: Any) -> None:
        self._context.__exit__(*reason)


@pytest.mark.parametrize("count", [5, 12])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_no_token(family: str, way: str, count: int) -> None:
    """Candidates below and above `block`, which is 8 here."""
    assert SMALL.block == 8
    model = tiny(family, max_position_embeddings=512)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": count}
    if way == "assistant":
        assistant = tiny(family, max_position_embeddings=512)  # of the same weights: its candidates are accepted
        assistant.generation_config.num_assistant_tokens = count
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": assistant}
    config = everywhere(model, -math.inf)  # what would run sparse keeps 2% of the candidates' pairs
    with sparse_attention(model, config) as run:
        plain = generate(model, ids(150))
        alone = run.layers()
        run.reset()
        with Lengths(model) as seen:
            speculative = generate(model, ids(150), **options)
    pieces = [n for n in seen[1:] if n > 1]
    assert seen[0] > 150
    assert pieces
    assert torch.equal(speculative, plain)
    for with_pieces, one in zip(run.layers(), alone, strict=True):
        assert with_pieces.kind == one.kind == "sparse"
        assert with_pieces.calls == one.calls + len(pieces)
        # the first candidates come in one forward with the prompt
        assert with_pieces.queries == one.queries + sum(pieces) + seen[0] - 150
        kept, visible = (getattr(with_pieces, x) - getattr(one, x) for x in ("kept_pairs", "visible_pairs"))
        assert kept == visible > 0  # counted as what they are: dense


def test_pieces_longer_than_a_block_run_sparse() -> None:
    """A second turn of a conversation is prefill; its last short chunk is not."""
    model = tiny()
    x = ids(160)
    for size, sparse in ((8, False), (9, True), (60, True)):
        with sparse_attention(model, everywhere(model, -math.inf)) as run, torch.no_grad():
            cache = result_cache(model(x[:, :100], use_cache=True))
            run.reset()
            ours = model(x[:, 100 : 100 + size], **cache_option(model, cache), use_cache=True).logits
        assert [y.kind for y in run.layers()] == ["sparse" if sparse else "dense"] * 3
        assert [y.density < 1 for y in run.layers()] == [sparse] * 3
        assert [y.queries for y in run.layers()] == [size] * 3
        assert [y.visible_pairs for y in run.layers()] == [6 * sum(range(101, 101 + size))] * 3
        with sparse_attention(model, everywhere(model, -math.inf)), torch.no_grad():
            cache = result_cache(model(x[:, :100], use_cache=True))
        with torch.no_grad():
            own = model(x[:, 100 : 100 + size], **cache_option(model, cache), use_cache=True).logits
        assert torch.equal(ours, own) is not sparse


def test_short_pieces_are_counted_in_static_caches_too() -> None:
    model = tiny()
    with sparse_attention(model, everywhere(model, -math.inf)) as run, torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=200)
        model(ids(100), **cache_option(model, cache), use_cache=True)
        run.reset()
        model(ids(105)[:, 100:], **cache_option(model, cache), use_cache=True)
    assert [(x.kind, x.queries, x.visible_pairs, x.kept_pairs) for x in run.layers()] == [
        ("dense", 5, 6 * sum(range(101, 106)), 6 * sum(range(101, 106)))
    ] * 3


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "qwen2"])
def test_turns_of_a_conversation(family: str) -> None:
    """`generate` goes on with the cache of the turn before: equal to the same pieces by hand."""
    model = tiny(family, max_position_embeddings=512)
    config = everywhere(model, 0.5)
    with sparse_attention(model, config) as run:
        first = model.generate(
            ids(80), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None
        )
        second = torch.cat((first.sequences, ids(60)), 1)
        run.reset()
        answer = generate(model, second, **cache_option(model, result_cache(first)))
        assert [x.queries for x in run.layers()] == [61] * 3  # the last token of the first answer, and the new ones
        with torch.no_grad():
            cache = result_cache(model(ids(80), use_cache=True))
            for at in range(80, 83):
                cache = result_cache(
                    model(first.sequences[:, at : at + 1], **cache_option(model, cache), use_cache=True)
                )
            last = model(second[:, 83:], **cache_option(model, cache), use_cache=True).logits[0, -1]
    assert int(answer[0, second.shape[1]]) == int(last.argmax())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 4, "top_k": 20},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_strategies(options: dict[str, Any]) -> None:
    """With every key kept, each strategy finds what it finds without; with few, something else."""
    model, x = tiny(), ids(150, 150)
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloaded caches need a GPU")
    torch.manual_seed(3)
    own = generate(model, x, **options)
    with sparse_attention(model, everywhere(model, math.inf)) as run:
        torch.manual_seed(3)
        assert torch.equal(generate(model, x, **options), own)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    with sparse_attention(model, everywhere(model, -math.inf)):
        torch.manual_seed(3)
        assert not torch.equal(generate(model, x, **options), own)
