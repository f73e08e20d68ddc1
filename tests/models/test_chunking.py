"""A prompt in chunks is the prompt run whole, or chunks are refused: caches, recurrent state, short convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.errors import InputError
from anchorscope.models.chunking import MOST_TOKENS, SHORT, check_chunks, check_sizes
from anchorscope.models.prefill import Prefill, forwards

pytest.importorskip("transformers")

from families import collect, ids, prompt, quiet, relative, tiny
from family_runs import CORE

HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "minimax", "nemotron_h", "qwen3_next")
SLOW = ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h")  # their recurrence in plain torch takes its time
# pieces of one token, shorter than the kernels of short convolutions, last ones of one or two, longer than all windows
SIZES = ((1,) * 5, (2,) * 4, (3, 3, 1), (11, 11, 2), (30, 30, 30), (7, 60, 1, 3))


def attention_of(model: Any, sizes: tuple[int, ...]) -> dict[tuple[int, str], torch.Tensor]:
    """Queries, keys, values and outputs (N, *) of a run in pieces, seen by transformers' own interface alone."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    own = model.config._attn_implementation
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def look(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        n = q.shape[2]
        result = AttentionInterface()["sdpa"](module, q, k, v, mask, **options)
        output = result[0].transpose(1, 2)
        for name, x in (("q", q), ("k", k[:, :, -n:]), ("v", v[:, :, -n:]), ("output", output)):
            seen.setdefault((module.layer_idx, name), []).append(x[0].transpose(0, 1).flatten(1).float().clone())
        return result

    AttentionInterface.register("looking", look)
    AttentionMaskInterface.register("looking", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.set_attn_implementation("looking")
        list(forwards(model, ids(sum(sizes)), sizes))
    finally:
        model.set_attn_implementation(own)
        AttentionInterface._global_mapping.pop("looking")
        AttentionMaskInterface._global_mapping.pop("looking")
    return {key: torch.cat(parts) for key, parts in seen.items()}


def layers_of(model: Any) -> list[int]:
    return sorted(collect(model, ids(20)))


def accepted(model: Any, layers: list[int], sizes: tuple[int, ...]) -> bool:
    try:
        check_sizes(model, ids(sum(sizes)), layers, sizes)
    except (InputError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "family",  # gemma2's soft-cap is not sdpa's
    [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in sorted({*CORE, *HYBRIDS} - {"gemma2"})],
)
def test_every_family_is_the_same_in_chunks_or_refused(family: str) -> None:
    """Across windows and boundaries of all kinds; what is accepted is right by the model's own attention."""
    model = tiny(family)
    layers = layers_of(model)
    verdicts = {}
    for sizes in SIZES:
        whole, parts = attention_of(model, (sum(sizes),)), attention_of(model, sizes)
        error = max(
            float(((parts[key] - x).norm(dim=1) / x.norm(dim=1).clamp_min(float(x.norm(dim=1).median()))).max())
            for key, x in whole.items()
        )
        verdicts[sizes] = accepted(model, layers, sizes)
        assert verdicts[sizes] == (error < 3e-5), (sizes, error)
    if family in CORE:
        assert all(verdicts.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW))
        for x in sorted({"llama", "gemma3_text", "mixtral", "qwen3_moe", *HYBRIDS})
    ],
)
def test_rounding_of_16_bits_changes_no_verdict(family: str, dtype: torch.dtype) -> None:
    """Experts that rounding chooses otherwise are no false alarm, and lost state is found as in float32."""
    exact, rounded = tiny(family), tiny(family).to(dtype)
    layers = layers_of(exact)
    for sizes in ((1,) * 6, (3, 3, 2), (11, 11, 2)):
        assert accepted(rounded, layers, sizes) == accepted(exact, layers, sizes), sizes


def test_jamba_is_refused_by_the_tokens_behind_a_boundary(tmp_path: Path) -> None:
    """The median token hides it: most queries are far from a boundary."""
    model = tiny("jamba")
    whole, parts = attention_of(model, (80,)), attention_of(model, (17, 17, 17, 17, 12))
    error = ((parts[1, "q"] - whole[1, "q"]).norm(dim=1) / whole[1, "q"].norm(dim=1))[17:]
    assert error.max() > 0.1
    assert error.median() < 0.01
    with pytest.raises(InputError, match=r"computes something else in chunks.*capture without --chunk"):
        capture_model(model, [prompt(80)], tmp_path / "a", chunk=17, notify=quiet)
    # its state does pass from one token to the next
    one = capture_model(model, [prompt(30)], tmp_path / "b", chunk=1, notify=quiet)
    two = capture_model(model, [prompt(30)], tmp_path / "c", notify=quiet)
    assert relative(one.load(one.entries[0]).q, two.load(two.entries[0]).q) < 1e-5


def test_positions_do_not_come_from_a_recurrent_layers_cache(tmp_path: Path) -> None:
    """bamba counts positions by its first layer's cache, a recurrent one, unless they are given."""
    model = tiny("bamba")
    whole = capture_model(model, [prompt(30)], tmp_path / "a", notify=quiet)
    parts = capture_model(model, [prompt(30)], tmp_path / "b", chunk=13, notify=quiet)
    for a, b in zip(whole.entries, parts.entries, strict=True):
        assert relative(parts.load(b).k, whole.load(a).k) < 1e-5


def lose_convolution(model: Any) -> None:
    """Every convolution begins each piece with zeros."""
    for layer in model.model.layers[:2]:
        conv = layer.conv
        conv.forward = lambda hidden_states, conv=conv, **_: type(conv).forward(conv, hidden_states)


def lose_keys(model: Any) -> None:
    """The last layer forgets its first key once there is a cache."""
    own = model.model.layers[2].self_attn.forward

    def forward(*args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values", options.get("cache"))
        if cache is not None and cache.get_seq_length(2):
            cache.layers[2].keys[:, :, 0] = 0
        return own(*args, **options)

    model.model.layers[2].self_attn.forward = forward


def move_keys(model: Any) -> None:
    """The second layer's cache is rounded, as by a cache that quantizes."""
    own = model.model.layers[1].self_attn.forward

    def forward(*args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values", options.get("cache"))
        if cache is not None and cache.get_seq_length(1):
            cache.layers[1].keys = cache.layers[1].keys.bfloat16().float()
        return own(*args, **options)

    model.model.layers[1].self_attn.forward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "spoil"), [("lfm2", lose_convolution), ("llama", lose_keys), ("mixtral", lose_keys)]
)
def test_lost_state_is_found(family: str, spoil: Callable[[Any], None], dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    layers = layers_of(model)
    check_chunks(model, ids(80), layers, [Prefill(80, 17)])
    spoil(model)
    with pytest.raises(InputError, match=r"computes something else in chunks.* behind a boundary"):
        check_chunks(model, ids(80), layers, [Prefill(80, 17)])


def test_a_rounded_cache_is_found() -> None:
    model = tiny()
    move_keys(model)
    with pytest.raises(InputError, match=r"LlamaAttention model.layers.1.self_attn"):
        check_sizes(model, ids(33), [0], (11, 11, 11))


def test_a_cache_that_changes_late_is_found_during_the_run(tmp_path: Path) -> None:
    """What no trial can see: the keys change once the cache is longer than any trial."""
    model = tiny()
    own = model.model.layers[1].self_attn.forward

    def forward(*args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values", options.get("cache"))
        if cache is not None and cache.get_seq_length(1) > 60:
            cache.layers[1].keys[:, :, 5:40] *= 1.001
        return own(*args, **options)

    model.model.layers[1].self_attn.forward = forward
    with pytest.raises(InputError, match="the cache of LlamaAttention of layer 1 does not give back"):
        capture_model(model, [prompt(100)], tmp_path / "d", chunk=20, notify=quiet)
    assert not list((tmp_path / "d").glob("*.safetensors")) or not (tmp_path / "d").exists()


def test_a_model_that_fails_in_chunks_is_one_sentence(tmp_path: Path) -> None:
    model = tiny()
    own = model.model.layers[1].self_attn.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        if hidden_states.shape[1] == 2:  # the last piece's length, nothing else has it
            raise ValueError("odd length")
        return own(hidden_states, *args, **options)

    model.model.layers[1].self_attn.forward = forward
    with pytest.raises(InputError, match=r"cannot run in chunks.*ValueError: odd length; capture without --chunk"):
        check_chunks(model, ids(53), [0, 1, 2], [Prefill(53, 17)])


@pytest.mark.parametrize(
    ("tokens", "chunk", "want"),
    [
        (80, 17, (11, 11, 11, 11)),
        (53, 17, (11, 11, 11, 2)),
        (35, 17, (11, 11, 1)),
        (34, 17, (11, 11)),
        (9, 4, (4, 4, 1)),
        (5, 1, (1, 1, 1, 1, 1)),
        (100_001, 2048, (11, 11, 11, 11)),
        (4097, 2048, (11, 11, 1)),
    ],
)
def test_trials_are_cut_as_the_real_run_is(tokens: int, chunk: int, want: tuple[int, ...]) -> None:
    assert Prefill(tokens, chunk).small(SHORT, 4 * SHORT) == want
    assert sum(Prefill(tokens, chunk).sizes) == tokens


def test_windows_are_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 24 tokens: some trial is longer, and cut within it and behind it."""
    import anchorscope.models.chunking as module

    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(module, "check_sizes", lambda *a: tried.append(a[3]))
    check_chunks(tiny("mistral"), ids(200), [0], [Prefill(200, 50), Prefill(200, 300)])
    assert any(24 + SHORT <= sum(x) <= MOST_TOKENS and x[0] < 24 for x in tried)
    tried.clear()
    check_chunks(tiny("qwen3_next"), ids(1000), [2], [Prefill(1000, 400)])
    assert (300, 200) in tried  # the scans of recurrent layers work on up to 256 tokens at a time
    tried.clear()
    check_chunks(tiny(), ids(200), [0], [Prefill(200, 200)])
    assert tried == []
