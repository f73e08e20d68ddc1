"""Running a model sparse: generation, caches, batches, nesting, registration, and every way to be refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import prompt, tiny
from sparse_models import SMALL, brute_force, divergence, everywhere, unregister

from anchorscope import attention_clock, register_attention, sparse_attention
from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.errors import InputError, MissingBackendError
from anchorscope.models import intercept, model_facts
from anchorscope.models.kvcache import cache_option
from anchorscope.params import AnchorParams

MIXED = (0.5, 2.0, None, None, None, None)  # 6 query heads on 2 kv heads: one of both kinds, one dense throughout


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def ids(count: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.tensor([prompt(count, seed=seed).token_ids])


def logits(model: Any, x: torch.Tensor, cache: Any = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **cache_option(model, cache), **options).logits


def chunked(model: Any, x: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of a prefill in chunks."""
    cache = transformers.DynamicCache()
    return torch.cat([logits(model, part, cache, use_cache=True) for part in x.split(size, dim=1)], 1)


def generate(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(x, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return float((x - y).abs().max()) < 2e-6


def test_generate(model: Any) -> None:
    own = generate(model, ids())
    for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        with sparse_attention(model, everywhere(model, math.inf)) as run:
            assert torch.equal(generate(model, ids(), **options), own)
        assert all(x.kind == "sparse" for x in run.layers())
    with sparse_attention(model, everywhere(model, -math.inf)) as run:
        assert not torch.equal(generate(model, ids()), own)
    assert [(x.calls, x.queries) for x in run.layers()] == [(1, 80)] * 3  # decoding is not counted


def test_a_static_cache_hides_its_empty_end(model: Any) -> None:
    config = everywhere(model, 0.5)
    with sparse_attention(model, config) as run:
        dynamic, first = generate(model, ids()), run.layers()
        run.reset()
        static = generate(model, ids(), cache_implementation="static")
    assert torch.equal(dynamic, static)
    assert [x.kept_pairs for x in first] == [x.kept_pairs for x in run.layers()]


def test_pipeline(model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in ids()[0].tolist())
    options = {"max_new_tokens": 6, "do_sample": False}
    own = pipe(text, **options)
    with sparse_attention(model, everywhere(model, math.inf)) as run:
        assert pipe(text, **options) == own
    assert run.layers()[0].queries == 80
    with sparse_attention(model, everywhere(model, -math.inf)):
        assert pipe(text, **options) != own


@pytest.mark.parametrize("thetas", [(0.5,) * 6, MIXED, (None,) * 3 + (math.inf, -math.inf, 1.0)])
def test_heads_run_as_they_are_told(model: Any, thetas: tuple[float | None, ...]) -> None:
    config = everywhere(model, thetas)
    with sparse_attention(model, config) as run:
        ours = logits(model, ids())
    with brute_force(model, config):
        assert close(ours, logits(model, ids()))
    assert all(x.kind == "sparse" and x.density < 1 for x in run.layers())


def test_layers_that_are_not_named_stay_dense(model: Any) -> None:
    config = AnchorConfig((LayerAnchors(1, SMALL, (0.5,) * 6),))
    seen = []
    with intercept(model, lambda call: seen.append(call.layer)), sparse_attention(model, config) as run:
        logits(model, ids())
    assert [x.kind for x in run.layers()] == ["dense", "sparse", "dense"]
    assert [x.density < 1 for x in run.layers()] == [False, True, False]
    assert seen[-2:] == [0, 2]  # the kernels' own call never reaches the context around it


def test_dense_heads_alone_are_the_models_own(model: Any) -> None:
    with sparse_attention(model, everywhere(model, (None,) * 6)) as run:
        assert torch.equal(logits(model, ids()), logits(tiny(), ids()))
    assert all(x.kind == "dense" and x.density == 1 for x in run.layers())


@pytest.mark.parametrize("chunk", [16, 48])
def test_chunks_of_whole_groups_equal_the_whole(model: Any, chunk: int) -> None:
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        whole, once = logits(model, ids()), run.layers()
        run.reset()
        assert close(chunked(model, ids(), chunk), whole)
    assert [x.kept_pairs for x in run.layers()] == [x.kept_pairs for x in once]
    assert [x.visible_pairs for x in run.layers()] == [x.visible_pairs for x in once]


def test_other_chunks_start_their_own_groups(model: Any) -> None:
    """Equal to the specification in chunks, whatever the chunk; only theta = +inf equals the whole."""
    for theta, same in ((math.inf, True), (0.5, False)):
        config = everywhere(model, theta)
        results = []
        for context in (sparse_attention(model, config), brute_force(model, config)):
            with context:
                results.append(chunked(model, ids(), 23))
        assert close(*results)
        assert close(results[0], logits(model, ids())) == same


def test_windows_of_cropped_caches_are_left_dense() -> None:
    mistral = tiny("mistral")
    with sparse_attention(mistral, everywhere(mistral, -math.inf)) as run:
        cache = transformers.DynamicCache(config=mistral.config)
        first = logits(mistral, ids()[:, :48], cache)
        assert [x.kind for x in run.layers()] == ["sparse"] * 3
        run.reset()
        logits(mistral, ids()[:, 48:], cache)
        assert [x.kind for x in run.layers()] == ["dense"] * 3
        assert [x.visible_pairs for x in run.layers()] == [6 * 32 * 24] * 3
    assert not close(first, logits(mistral, ids()[:, :48]))


def test_windows_are_dense_unless_named() -> None:
    gemma = tiny("gemma3_text")
    with sparse_attention(gemma, 6.0) as run:
        logits(gemma, ids())
    # 128 x 16 queries and 80 tokens: everything is anchor region, so nothing needs the kernels
    assert [x.kind for x in run.layers()] == ["dense"] * 3
    assert [x.visible_pairs for x in run.layers()] == [6 * (24 * 25 // 2 + 56 * 24)] * 2 + [6 * 80 * 81 // 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_batches_equal_their_prompts(attention: str, side: str) -> None:
    model = tiny(attn_implementation=attention)
    lengths = (70, 70 if side == "none" else 50)
    prompts = [ids(n, seed=n + i) for i, n in enumerate(lengths)]
    start = 20 if side == "left" else 0
    batch, mask = torch.zeros(2, 70, dtype=torch.long), torch.zeros(2, 70, dtype=torch.long)
    for row, x in enumerate(prompts):
        at = slice(start * row, start * row + x.shape[1])
        batch[row, at], mask[row, at] = x[0], 1
    options = {} if side == "none" else {"attention_mask": mask}
    with sparse_attention(model, everywhere(model, MIXED), measure=True) as run:
        together, counts = logits(model, batch, **options), run.layers()
        run.reset()
        alone = [logits(model, x) for x in prompts]
    for row, x in enumerate(alone):
        assert close(together[row, start * row : start * row + x.shape[1]], x[0])
    for a, b in zip(counts, run.layers(), strict=True):
        assert (a.queries, a.visible_pairs, a.kept_pairs) == (b.queries, b.visible_pairs, b.kept_pairs)
        assert a.recall == pytest.approx(b.recall, abs=1e-6)


def test_padded_batches_generate_what_their_prompts_do(model: Any) -> None:
    short = ids(50, seed=9)
    batch = torch.cat((ids(70), torch.cat((torch.zeros(1, 20, dtype=torch.long), short), 1)))
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    with sparse_attention(model, everywhere(model, 0.5)):
        both = generate(model, batch, attention_mask=mask)
        assert torch.equal(both[1, 70:], generate(model, short)[0, 50:])


def test_recall_and_pairs_are_those_of_the_specification(model: Any) -> None:
    from anchorscope.kernels import reference

    config = everywhere(model, MIXED)
    expected: dict[int, tuple[int, float]] = {}

    def judge(call: Any) -> None:
        geo = reference.geometry(call.q, call.k, block=8, step=2, init=4, lookback=4, scale=call.scale)
        theta = torch.tensor([[math.inf if t is None else t for t in MIXED]])
        s = reference.scores(call.q, call.k, scale=call.scale)
        mask = reference.keep_mask(reference.margins(call.q, call.k, geo), theta, geo)
        expected[call.layer] = int(mask.sum()), float(reference.recall_rows(s, mask, geo).mean())

    with brute_force(model, config), intercept(model, judge):
        logits(model, ids())
    with sparse_attention(model, config, measure=True) as run:
        logits(model, ids())
    for x in run.layers():
        kept, recall = expected[x.layer]
        assert x.kept_pairs == kept
        assert x.recall == pytest.approx(recall, abs=1e-6)
        assert x.visible_pairs == 6 * 80 * 81 // 2
        assert x.seconds > 0


def test_the_clock_counts_and_changes_nothing(model: Any) -> None:
    with attention_clock(model) as run:
        timed = logits(model, ids())
    assert torch.equal(timed, logits(model, ids()))
    assert [(x.layer, x.kind, x.calls, x.density, x.recall) for x in run.layers()] == [
        (i, "dense", 1, 1.0, None) for i in range(3)
    ]
    assert all(x.seconds > 0 for x in run.layers())
    run.reset()
    assert run.layers() == []


def test_nested_the_innermost_decides_alone(model: Any) -> None:
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, 0.5)) as outer:
        sparse = logits(model, ids())
        outer.reset()
        with sparse_attention(model, AnchorConfig(())) as inner:
            assert torch.equal(logits(model, ids()), own)
        assert outer.layers() == []  # not even the inner one's trial run
        assert len(inner.layers()) == 3
        with attention_clock(model) as clock:
            assert torch.equal(logits(model, ids()), sparse)
        assert [x.kind for x in outer.layers()] == ["sparse"] * 3
        assert len(clock.layers()) == 3
    assert torch.equal(logits(model, ids()), own)


def test_two_models_at_once(model: Any) -> None:
    other = tiny("qwen3")
    with (
        sparse_attention(model, everywhere(model, 0.5)) as one,
        sparse_attention(other, everywhere(other, -math.inf)) as two,
    ):
        logits(model, ids())
        logits(other, ids())
    assert one.layers()[0].kept_pairs != two.layers()[0].kept_pairs


def test_restored_after_an_exception(model: Any) -> None:
    own = logits(model, ids())
    with pytest.raises(IndexError), sparse_attention(model, everywhere(model, 0.5)):
        logits(model, ids() + 97)  # no such tokens
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids()), own)


@pytest.mark.parametrize("inside", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled(inside: bool) -> None:
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    own = logits(model, ids(), use_cache=False)
    if not inside:
        assert torch.equal(logits(compiled, ids(), use_cache=False), own)
    config = everywhere(model, 0.5)
    with sparse_attention(model, config):
        expected = logits(model, ids())
    with sparse_attention(compiled, config) as run:
        assert close(logits(compiled, ids(), use_cache=False), expected)
    assert [x.calls for x in run.layers()] == [1]
    assert torch.equal(logits(compiled, ids(), use_cache=False), own)
    torch._dynamo.reset()


@pytest.fixture
def _unregistered() -> Iterator[None]:
    yield
    unregister("anchorscope")


@pytest.mark.usefixtures("_unregistered")
def test_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    config = everywhere(model, 0.5)
    with sparse_attention(model, config) as context:
        expected = logits(model, ids())
    run = register_attention(config)
    model.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="anchorscope")
    assert torch.equal(logits(loaded.eval(), ids()), expected)
    assert [x.kept_pairs for x in run.layers()] == [x.kept_pairs for x in context.layers()]

    config.save(tmp_path / "anchors.json")
    monkeypatch.setenv("ANCHORSCOPE_ANCHORS", str(tmp_path / "anchors.json"))
    register_attention()
    switched = tiny()
    own = generate(switched, ids())
    switched.set_attn_implementation("anchorscope")
    assert torch.equal(logits(switched, ids()), expected)
    assert not torch.equal(generate(switched, ids()), own)
    with sparse_attention(switched, everywhere(switched, math.inf)):
        assert torch.equal(generate(switched, ids()), own)
    switched.set_attn_implementation("sdpa")
    assert torch.equal(generate(switched, ids()), own)


@pytest.mark.usefixtures("_unregistered")
def test_registered_anchors_are_checked_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANCHORSCOPE_ANCHORS", raising=False)
    with pytest.raises(InputError, match=r"no anchors for anchorscope: .*ANCHORSCOPE_ANCHORS"):
        register_attention()
    with pytest.raises(InputError, match="no attention implementation 'sdpaa'"):
        register_attention(1.0, dense="sdpaa")
    uniform = AnchorConfig.uniform(1.0, range(3), 6, SMALL)
    for config, message in (
        (AnchorConfig(uniform.layers, {"type": "qwen3"}), "are for another model"),
        (AnchorConfig.uniform(1.0, range(3), 4, SMALL), "have 4 heads in layer 0, but LlamaAttention of layer 0 has 6"),
        (AnchorConfig.uniform(1.0, range(4), 6, SMALL), "has layers 0 to 2"),
    ):
        register_attention(config)
        with pytest.raises(InputError, match=message):
            logits(tiny(attn_implementation="anchorscope"), ids())


def test_bad_configurations_are_one_sentence(model: Any, tmp_path: Path) -> None:
    other = model_facts(tiny("qwen3"))
    same_shape = {**model_facts(model), "fingerprint": "0"}
    good = AnchorConfig.uniform(1.0, range(3), 6, SMALL)
    (tmp_path / "bad.json").write_text("{}")
    for config, message in (
        (math.nan, "theta is NaN"),
        (str(tmp_path / "none.json"), "none.json cannot be read"),
        (tmp_path / "bad.json", "not an anchors.json"),
        (True, "not bool"),
        (None, "not NoneType"),
        (AnchorConfig(good.layers, other), "these anchors are for"),
        (AnchorConfig(good.layers, same_shape), "are for another model"),
        (AnchorConfig.uniform(1.0, range(3), 4, SMALL), "4 heads in layer 0"),
        (AnchorConfig.uniform(1.0, [7], 6, SMALL), "name layer 7"),
    ):
        with pytest.raises(InputError, match=message) as caught, sparse_attention(model, config):
            pass
        assert "\n" not in str(caught.value)
    with sparse_attention(model, AnchorConfig(good.layers, same_shape), force=True):
        pass
    hybrid = tiny("qwen3_next")
    for broken, config, options, message in (
        (hybrid, AnchorConfig.uniform(1.0, [0], 6), {}, r"name layer 0 of \w+, which uses no .*; layers \[2\] do"),
        (torch.nn.Linear(2, 2), 1.0, {}, "needs a loaded transformers model, not Linear"),
        (model, 1.0, {"backend": "cuda"}, "backend 'cuda' is unknown"),
    ):
        with pytest.raises(InputError, match=message), sparse_attention(broken, config, **options):
            pass


def test_calls_that_the_kernels_would_compute_wrongly(model: Any) -> None:
    with sparse_attention(model, everywhere(model, 0.5)):
        with pytest.raises(InputError, match="asked for its attention weights"):
            logits(model, ids(), output_attentions=True)
        packed = torch.cat((torch.arange(40), torch.arange(40)))[None]
        with pytest.raises(InputError, match=r"its mask is not causal .*several prompts"):
            logits(model, ids(), position_ids=packed, use_cache=False)
        holes = torch.ones_like(ids())
        holes[0, 30] = 0
        with pytest.raises(InputError, match="hides tokens in the middle"):
            logits(model, ids(), attention_mask=holes)
        with pytest.raises(InputError, match="no backward pass"):
            model(ids(), labels=ids()).loss.backward()


def test_triton_kernels_do_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter here; on a GPU see test_gpu.py."""
    config = everywhere(model, MIXED, AnchorParams(16, 1, 16, 8))
    with sparse_attention(model, config, measure=True) as plain:
        expected = logits(model, ids())
    with sparse_attention(model, config, backend="triton", measure=True) as run:
        assert float((logits(model, ids()) - expected).abs().max()) < 1e-4
    for a, b in zip(run.layers(), plain.layers(), strict=True):
        assert (a.kind, a.kept_pairs) == (b.kind, b.kept_pairs)
        assert a.recall == pytest.approx(b.recall, abs=1e-4)
    monkeypatch.delenv("TRITON_INTERPRET")
    with (
        pytest.raises(MissingBackendError, match="needs a CUDA GPU"),
        sparse_attention(model, config, backend="triton"),
    ):
        logits(model, ids())


def test_one_theta_for_a_whole_model() -> None:
    long = tiny(max_position_embeddings=8192)
    x = torch.randint(3, 97, (1, 4200), generator=torch.Generator().manual_seed(1))
    own = logits(long, x)
    with sparse_attention(long, 0.5, measure=True) as run:
        ours = logits(long, x)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    assert all(x.density < 0.9 and x.recall < 1 for x in run.layers())
    assert float(divergence(ours, own).mean()) > 0
    with sparse_attention(long, math.inf):
        assert float(divergence(logits(long, x), own).max()) < 1e-5


def test_dtypes_are_kept() -> None:
    half = tiny().to(torch.bfloat16)
    own = logits(half, ids())
    with sparse_attention(half, everywhere(half, math.inf)):
        ours = logits(half, ids())
    assert ours.dtype == torch.bfloat16
    assert float(divergence(ours, own).mean()) < 1e-4


def test_layers_that_the_anchors_leave_out_are_warned_of(model: Any) -> None:
    """They run dense. Heads without a theta, in a layer that is named, were left dense on purpose."""
    named = AnchorConfig((LayerAnchors(0, SMALL, MIXED),))
    said = r"these anchors run 2 of the model's \d+ heads sparse \(\d+%\), naming 1 of \d layers; the rest runs dense"
    with pytest.warns(UserWarning, match=said) as found, sparse_attention(model, named):
        pass
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = sorted({x.layer for x in everywhere(model, 1.0).layers})
        for config in (everywhere(model, 1.0), AnchorConfig(tuple(LayerAnchors(i, SMALL, MIXED) for i in every))):
            with sparse_attention(model, config):
                pass
