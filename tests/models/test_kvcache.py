"""The KV cache goes by the name that the model's forward has: the new one, the old one, or an inner module's."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from families import prompt, tiny

from anchorscope.models import prefill
from anchorscope.models.kvcache import cache_option, result_cache

CACHE = object()


class New(torch.nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **options: Any) -> Any:
        return cache


class Old(torch.nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return past_key_values


class Wrapper(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


@pytest.mark.parametrize("module", [New(), Old(), Wrapper(New()), Wrapper(Wrapper(Old()))])
def test_the_forward_receives_the_cache(module: torch.nn.Module) -> None:
    assert module(None, **cache_option(module, CACHE)) is CACHE
    assert cache_option(module, None) == {}


def test_a_result_by_either_name() -> None:
    assert result_cache(SimpleNamespace(cache=CACHE, past_key_values=None)) is CACHE
    assert result_cache(SimpleNamespace(past_key_values=CACHE)) is CACHE
    assert result_cache(SimpleNamespace(logits=None)) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "lfm2"])
def test_chunks_run_without_a_warning(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(family)
    expected = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    assert list(cache_option(model, CACHE)) == [expected]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, parts = (prefill(model, prompt().token_ids or (), chunk=chunk) for chunk in (None, 23))
    assert whole is not None
    assert parts is not None
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert not [r for r in caplog.records if "past_key_values" in r.getMessage()]
