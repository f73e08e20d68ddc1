"""Every test of the runtime runs on one thread and leaves no context open on a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anchorscope.models.hook import _named, _open


@pytest.fixture(autouse=True)
def _contexts_are_closed(one_thread: None) -> Iterator[None]:
    yield
    assert not _open
    assert not _named
