"""Cells and tables as every command shows them."""

from __future__ import annotations

from pathlib import Path

from anchorscope.cli.common import stdout_console
from anchorscope.cli.tables import clean_name, new_table, optional, print_places


def test_names_are_cut_in_the_middle_and_printable():
    assert clean_name("short", 10) == "short"
    assert clean_name("\x1b[31mred", 20) == "?[31mred"
    assert clean_name("abcdefghijklmnop", 10, "~") == "abcde~mnop"
    assert len(clean_name("x" * 99, 36)) == 36


def test_numbers_stand_at_the_right_and_never_fold(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    table = new_table(("prompt", "n"), title="[red]a title", fold=("prompt",))
    table.add_row("a name of many words", optional(12345, ",.0f"))
    table.add_row("b", optional(None, ",.0f"))
    stdout_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "[red]a title"
    assert sum("12,345" in line for line in lines) == 1
    assert any(line.split() == ["b", "-"] for line in lines)
    assert len(lines) > 6  # the name folded


def test_places_are_whole_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    long = Path("a" * 40)
    print_places(stdout_console(), "Tables", long, [long / "figures" / "x.png"])
    assert capsys.readouterr().out.splitlines() == [f"Tables: {long}", f"Figures: {long / 'figures'}"]
