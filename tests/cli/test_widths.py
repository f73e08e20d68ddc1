"""The tables of every command at several widths: whole columns are left out and named, numbers are never cut."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resumable import COMMANDS, Inputs

from anchorscope.cli import analyze, bench, calibrate, compare, evaluate, heads
from anchorscope.cli.app import main
from anchorscope.cli.common import note, stdout_console, warn
from anchorscope.cli.tables import boxed_table, new_table

WIDTHS = (40, 60, 80, 120)
SUMMARIES: dict[str, Callable[[Any], None]] = {
    "analyze": analyze.print_summary,
    "compare": compare.print_summary,
    "heads": heads.print_summary,
    "calibrate": calibrate.print_summary,
    "evaluate": evaluate.print_summary,
    "bench": lambda result: bench.print_result(result.report),
    "capture": lambda result: _info(result.path),
}
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]\d+)?%?")
PLACES = re.compile(r"^(Tables|Figures|Anchors|Details|Tables and profiles|dump +|error:)[: ]")


def _info(path: Path) -> None:
    assert main(["info", str(path)]) == 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each command returns for a tiny request."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("widths")
    inputs = Inputs.make(base, 300)
    yield {
        c.name: c.run(inputs, base / c.name, **({} if c.name == "capture" else {"figures": False})) for c in COMMANDS
    }
    torch.set_num_threads(threads)


def shown(capsys, monkeypatch, width: int | None, show: Callable[[], None]) -> str:
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    show()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SUMMARIES)
def test_tables_at_every_width(capsys, monkeypatch, results, name):
    pages = {w: shown(capsys, monkeypatch, w, lambda: SUMMARIES[name](results[name])) for w in WIDTHS}
    whole = set(NUMBER.findall(pages[120]))
    assert len(whole) > 5
    for width, page in pages.items():
        assert "…" not in page, page
        for line in page.splitlines():
            assert len(line) <= width or PLACES.match(line), line
        assert set(NUMBER.findall(page)) <= whole, f"a number is cut at {width} columns"
        if width >= 80:
            assert "left out" not in page
    # the narrow page was in need of it
    assert "columns left out: " in " ".join(pages[40].split())


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_pipe_loses_no_column(capsys, monkeypatch, results, name):
    piped = shown(capsys, monkeypatch, None, lambda: SUMMARIES[name](results[name]))
    assert "left out" not in piped
    assert "…" not in piped


@pytest.mark.parametrize("name", SUMMARIES)
def test_one_thing_is_not_many(capsys, monkeypatch, results, name):
    page = shown(capsys, monkeypatch, 120, lambda: SUMMARIES[name](results[name]))
    nouns = "heads|layers|prompts|files|tokens|groups|thetas|units|samples|methods|settings|queries|keys|threads"
    assert not re.search(rf"(?<![\d.,:x])\b1 (?:[a-z]+ )?(?:{nouns})\b", page), page


def many(build=new_table, **options: Any) -> Any:
    names = ["name", *(f"column {i:02d}" for i in range(12))]
    table = build(names, left=("name",), drop=names[1:-1], **options)
    table.add_row("some name", *(f"{i}.12345" for i in range(12)))
    return table


@pytest.mark.parametrize("build", [new_table, boxed_table])
def test_the_least_important_go_first_and_are_named(capsys, monkeypatch, build):
    page = shown(capsys, monkeypatch, 40, lambda: stdout_console().print(many(build)))
    table, said = page.split("columns left out:")
    assert re.findall(r"\d+\.\d+", table) == ["10.12345", "11.12345"] if build is new_table else ["11.12345"]
    assert "column 00, column 01," in " ".join(said.split())
    assert "wider terminal or --json" in " ".join(said.split())
    assert max(map(len, page.splitlines())) <= 40


def test_a_pipe_is_as_wide_as_it_needs_to_be(capsys, monkeypatch):
    page = shown(capsys, monkeypatch, None, lambda: stdout_console().print(many()))
    assert page.count(".12345") == 12
    assert len([line for line in page.splitlines() if ".12345" in line]) == 1
    assert shown(capsys, monkeypatch, None, lambda: stdout_console().print(many())) == page


def test_texts_take_several_lines_before_columns_go(capsys, monkeypatch):
    table = new_table(["prompt", "a", "b"], fold=("prompt",), drop=("a",))
    table.add_row("a name of many words that is long", "0.12345", "0.54321")
    page = shown(capsys, monkeypatch, 40, lambda: stdout_console().print(table))
    assert "left out" not in page
    assert "0.12345" in page
    assert len(page.splitlines()) >= 4


def test_rows_of_another_length_are_a_defect():
    with pytest.raises(AssertionError):
        new_table(["a", "b"]).add_row("1")
    with pytest.raises(AssertionError):
        new_table(["a"], drop=("b",))


def test_remarks_wrap_at_words_on_a_terminal_and_are_one_line_in_a_pipe(capsys, monkeypatch):
    import sys

    sentence = "a remark of many words that is far longer than forty columns of a terminal in a train"
    note(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"
    monkeypatch.setenv("COLUMNS", "40")
    written: list[str] = []
    terminal = types.SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", terminal)
    warn(sentence)
    lines = "".join(written).rstrip("\n").split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 40
    assert " ".join(lines) == f"warning: {sentence}"


def test_a_narrow_terminal_shows_the_tokens_of_a_head_below_it():
    tokens = [{"position": p, "token": " a rather long token", "token_id": 1} for p in (254, 2369, 3467)]
    rows = [{"prompt": "p", "layer": 5, "head": 0, "window_recall": 0.5, "stripe_tokens": tokens}]
    (wide,) = heads.token_lines(rows, 80)
    assert "254" in wide
    name, below = heads.token_lines(rows, 40)
    assert name == "layer 5, head 0 keeps"
    assert "254" in below
