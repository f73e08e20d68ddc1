"""Contexts on models: left in any order, threads, copies made inside, implementations changed inside."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import prompt, tiny
from sparse_models import everywhere

from anchorscope import attention_clock, sparse_attention
from anchorscope.errors import InputError
from anchorscope.models import intercept

OPENERS: dict[str, Callable[[Any], Any]] = {
    "sparse": lambda model: sparse_attention(model, everywhere(model, 0.5)),
    "clock": attention_clock,
    "intercept": lambda model: intercept(model, lambda call: None),
}


@pytest.fixture
def model() -> Any:
    return tiny()


def ids(count: int = 80) -> torch.Tensor:
    return torch.tensor([prompt(count).token_ids])


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("inner", OPENERS)
@pytest.mark.parametrize("outer", OPENERS)
def test_left_in_the_other_order(model: Any, outer: str, inner: str) -> None:
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, 0.5)):
        sparse = logits(model, ids())
    assert not torch.equal(own, sparse)
    first, second = OPENERS[outer](model), OPENERS[inner](model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, ids()), sparse if inner == "sparse" else own)
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.config._attn_implementation) is str
    assert torch.equal(logits(model, ids()), own)
    with sparse_attention(model, everywhere(model, 0.5)):
        assert torch.equal(logits(model, ids()), sparse)


def test_contexts_that_nobody_leaves_are_closed_with_their_generators(model: Any) -> None:
    def steps() -> Iterator[int]:
        with sparse_attention(model, everywhere(model, 0.5)):
            yield 1
            yield 2

    own = logits(model, ids())
    one, two = steps(), steps()
    next(one), next(two)
    one.close()
    assert not torch.equal(logits(model, ids()), own)
    two.close()
    assert torch.equal(logits(model, ids()), own)


def test_nothing_is_open_after_a_refusal(model: Any) -> None:
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, 0.5)):
        sparse = logits(model, ids())
        with pytest.raises(InputError, match="theta is NaN"), sparse_attention(model, math.nan):
            pass
        assert torch.equal(logits(model, ids()), sparse)
    assert torch.equal(logits(model, ids()), own)


@pytest.mark.parametrize("other", OPENERS)
def test_another_thread_is_refused_while_a_context_is_open(model: Any, other: str) -> None:
    own = logits(model, ids())

    def enter() -> None:
        with OPENERS[other](model):
            pass

    with sparse_attention(model, everywhere(model, 0.5)):
        sparse = logits(model, ids())
        refusal = in_thread(enter)
        assert isinstance(refusal, InputError)
        assert "another thread has a context open on this LlamaForCausalLM" in str(refusal)
        assert torch.equal(logits(model, ids()), sparse)
    assert torch.equal(logits(model, ids()), own)
    assert in_thread(enter) is None


def test_another_thread_may_run_the_model(model: Any) -> None:
    """As in streaming: one thread generates inside the context of another."""
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        sparse = logits(model, ids())
        run.reset()
        assert torch.equal(in_thread(lambda: logits(model, ids())), sparse)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3


def test_threads_on_two_models(model: Any) -> None:
    other = tiny("qwen3")
    with sparse_attention(model, everywhere(model, 0.5)):
        sparse = logits(model, ids())

        def run_other() -> bool:
            own = logits(other, ids())
            with sparse_attention(other, everywhere(other, 0.5)):
                return torch.equal(logits(other, ids()), own)

        assert in_thread(run_other) is False
        assert torch.equal(logits(model, ids()), sparse)


def test_models_that_share_a_config_are_told_apart(model: Any) -> None:
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        sparse = logits(model, ids())
        run.reset()
        assert torch.equal(logits(other, ids()), own)
        assert run.layers() == []
        with attention_clock(other) as clock:
            assert torch.equal(logits(other, ids()), own)
            assert torch.equal(logits(model, ids()), sparse)
        assert [x.calls for x in clock.layers()] == [1] * 3
    assert torch.equal(logits(model, ids()), own)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save_pretrained", "shallow config"])
def test_copies_made_inside_are_ordinary_models(model: Any, tmp_path: Path, way: str) -> None:
    own = logits(model, ids())
    with sparse_attention(model, everywhere(model, 0.5)):
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        elif way == "save_pretrained":
            model.save_pretrained(tmp_path)
            assert "anchorscope" not in (tmp_path / "config.json").read_text()
            other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        else:
            other = type(model)(copy.copy(model.config))
            other.load_state_dict(model.state_dict())
        other.eval()
        inside = logits(other, ids())
        assert not torch.equal(logits(model, ids()), own)
    assert torch.equal(inside, own)
    assert torch.equal(logits(other, ids()), own)
    with sparse_attention(other, everywhere(other, 0.5)):
        assert not torch.equal(logits(other, ids()), own)
    assert torch.equal(logits(other, ids()), own)
    if way != "shallow config":
        assert type(other.config._attn_implementation) is str
        assert other.config._attn_implementation == "sdpa"


def test_another_implementation_chosen_inside_is_said(model: Any) -> None:
    with (
        pytest.raises(InputError, match="was changed to 'eager' inside a context"),
        sparse_attention(model, everywhere(model, 0.5)),
    ):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        logits(model, ids())
    assert [x.kind for x in run.layers()] == ["sparse"] * 3


def test_modules_put_in_later_are_seen(model: Any) -> None:
    with sparse_attention(model, everywhere(model, 0.5)) as run:
        sparse = logits(model, ids())
        model.model.layers[1] = copy.deepcopy(model.model.layers[1])
        model.model.layers[1].self_attn.config = model.config
        run.reset()
        assert torch.equal(logits(model, ids()), sparse)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3


def test_replicas_are_refused(model: Any) -> None:
    replica = model.model.layers[0].self_attn._replicate_for_data_parallel()
    with sparse_attention(model, everywhere(model, 0.5)):
        model.model.layers[0].__dict__["_modules"]["self_attn"], kept = replica, model.model.layers[0].self_attn
        replica._parameters = kept._parameters
        listed = type(model).modules
        try:
            model.modules = lambda: (m for m in listed(model) if m is not replica)
            with pytest.raises(InputError, match="layer 0 is a replica"):
                logits(model, ids())
        finally:
            del model.modules
            model.model.layers[0].self_attn = kept


def test_delegates_that_look_their_name_up_find_the_models_own(model: Any) -> None:
    """As FlashAttention does; and the config itself keeps the private name, which other threads read."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    names: list[tuple[str, str]] = []

    def looks_up(module: Any, *args: Any, **options: Any) -> Any:
        names.append((module.config._attn_implementation, model.config._attn_implementation))
        assert module.is_causal
        return sdpa_attention_forward(module, *args, **options)

    AttentionInterface.register("my_flash", looks_up)
    AttentionMaskInterface.register("my_flash", sdpa_mask)
    try:
        own = logits(model, ids())
        model.config._attn_implementation = "my_flash"
        with attention_clock(model), attention_clock(model):
            assert torch.equal(logits(model, ids()), own)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("my_flash")
    assert len(names) == 3
    assert all(seen == "my_flash" and "anchorscope" in kept and "flash" in kept for seen, kept in names)
