"""The oldest versions that pyproject.toml admits are the ones that the code and the constraints speak of."""

from __future__ import annotations

import pytest
from oldest import minima

from anchorscope.errors import MissingBackendError
from anchorscope.models import load


def test_the_oldest_transformers_is_said_once() -> None:
    assert minima()["transformers"] == ".".join(map(str, load.OLDEST_TRANSFORMERS))


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.21.9"])
def test_older_ones_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(MissingBackendError, match=f"needs transformers 5.22 or newer, not {version}"):
        load.require_transformers()


@pytest.mark.parametrize("version", ["5.22.0", "5.24.0", "6.0.0.dev0"])
def test_newer_ones_are_not(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", version)
    load.require_transformers()
