"""docs/example.ipynb runs, and its stored outputs are those of such a run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "example.ipynb"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like docs/, beside the samples, to run in."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "samples").symlink_to(ROOT / "samples", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "docs")
    return tmp_path / "docs"


def code_cells():
    return [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def run(source, names):
    """What a cell's last expression gives, as a notebook would show it."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(last, "cell", "eval"), names)


def stored(cell):
    """Text and table that the repository holds of a cell's result, or None."""
    data = next((o["data"] for o in cell["outputs"] if o["output_type"] == "execute_result"), None)
    return None if data is None else tuple("".join(data[kind]) for kind in ("text/plain", "text/html"))


def test_cells_run_and_give_what_is_stored(place, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, object] = {"__name__": "__main__"}
    seen = 0
    for cell in code_cells():
        value = run("".join(cell["source"]), names)
        if stored(cell) is not None:
            seen += 1
            assert (repr(value), value._repr_html_()) == stored(cell)
    assert seen == 4
    anchors = json.loads((place / "results" / "calibration" / "anchors.json").read_text())
    assert [x["layer"] for x in anchors["layers"]] == [5, 15, 20]


def test_what_is_stored_is_small_and_asks_for_nothing():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 150_000
    assert all(cell["outputs"] for cell in code_cells())
    outputs = json.dumps([o for cell in code_cells() for o in cell["outputs"]])
    assert not any(word in outputs for word in ("http", "<script", "/tmp", "/home", "Traceback"))


def test_a_kernel_runs_it(place, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    made = json.loads(json.dumps([cell for cell in book.cells if cell.cell_type == "code"]))
    assert [stored(cell) for cell in made] == [stored(cell) for cell in code_cells()]
    assert any("image/png" in o.get("data", {}) for cell in made for o in cell["outputs"]), "the curves"
