"""A dump of two layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorscope.dumps import Dump, write_dump

from .entries import entry


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    return write_dump(tmp_path / "dump", [entry(layer=0), entry(layer=3, window=16, softcap=30.0)])
