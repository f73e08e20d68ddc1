"""Names of models: presets and almost presets, and a hub that cannot be reached; nothing here uses the network."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import pytest
from tiny_models import saved

from anchorscope.errors import InputError
from anchorscope.models import hub, locate
from anchorscope.models.load import load_model

CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the hub or fetches a preset fails the test."""

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub, "reachable", reached)
    monkeypatch.setattr(subprocess, "run", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)


@pytest.fixture
def closed_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that refuses every connection, and an empty cache; the waits of whoever retries are collected."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", CLOSED)
    monkeypatch.setattr("huggingface_hub.file_download.constants.ENDPOINT", CLOSED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", waits.append)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return waits


@pytest.mark.parametrize("name", ["smollm", "smollm-2", "smol_lm2", "SmoLM2", "smolm2", "smollm2b", "smollm2-135m"])
def test_almost_a_preset_is_refused_with_the_preset_and_without_network(no_network: None, name: str) -> None:
    with pytest.raises(InputError, match=rf"model {name} is no file or folder here, .* did you mean smollm2\?"):
        load_model(name, device="cpu", notify=print)


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2", "SMOLLM2"])
def test_a_preset_has_letters_of_any_case(name: str) -> None:
    assert locate.named_preset(name) == "smollm2"


@pytest.mark.parametrize(
    "name", ["gpt2", "distilgpt2", "HuggingFaceTB/SmolLM2-135M", "smollm2.gguf", "some/smollm2", "./smollm-2"]
)
def test_other_names_are_not_taken_for_presets(name: str) -> None:
    assert locate.named_preset(name) is None


def test_a_folder_of_a_name_close_to_a_preset_is_that_folder(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "SmolLM2")
    loaded = load_model("SmolLM2", device="cpu", notify=print)
    assert loaded.model.config.num_hidden_layers == 2
    assert loaded.name == "SmolLM2"


def test_a_hub_that_cannot_be_reached_is_asked_once(closed_hub: list[float]) -> None:
    told: list[str] = []
    with pytest.raises(InputError, match="not in the local cache") as refused:
        load_model("nobody/nothing", device="cpu", notify=told.append)
    assert closed_hub == [], "somebody waited and tried again"
    assert CLOSED in str(refused.value)
    assert "cache" in str(refused.value)
    assert "--model ./my-model" in str(refused.value)
    assert any("cannot be reached" in sentence for sentence in told)


def test_a_cached_model_loads_without_the_hub(closed_hub: list[float], tmp_path: Path) -> None:
    home = tmp_path / "cache" / "models--some--body"
    saved(home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    loaded = load_model("some/body", device="cpu", notify=lambda _: None)
    assert loaded.model.config.hidden_size == 64
    assert closed_hub == []


def test_a_hub_that_says_no_more_than_an_error_of_its_own_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Session:
        def __init__(self, code: int) -> None:
            self.status_code = code

        def head(self, *_: object, **__: object) -> Session:
            return self

    for code, there in ((200, True), (302, True), (401, True), (502, False), (503, False)):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda code=code: Session(code))
        assert hub.reachable() is there


def test_a_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    import huggingface_hub

    forever = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_session", forever.wait)
    monkeypatch.setattr(hub, "REACH_SECONDS", -0.9)
    try:
        assert not hub.reachable()
    finally:
        forever.set()


def test_a_user_who_forbids_the_hub_is_told_so(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing", device="cpu", notify=print)
