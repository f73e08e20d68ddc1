"""Folders that a dump may not be written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anchorscope.dumps import Dump, write_dump
from anchorscope.errors import InputError

from .entries import entry


def test_existing_output(tmp_path: Path, dump: Dump) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_dump(dump.path, [entry()])
    replaced = write_dump(dump.path, [entry(layer=9)], overwrite=True)
    assert [e.layer for e in replaced.entries] == [9]
    assert sorted(p.name for p in dump.path.iterdir()) == ["manifest.json", replaced.entries[0].file]
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="is a file"):
        write_dump(tmp_path / "file", [entry()], overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        write_dump(tmp_path / "file" / "below", [entry()])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="holds other files"):
        write_dump(other, [entry()], overwrite=True)
    assert (other / "thesis.txt").read_text() == "keep"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_dump(empty, [entry()]).complete


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="permission"):
            write_dump(tmp_path / "d", [entry()])
    finally:
        tmp_path.chmod(0o700)
