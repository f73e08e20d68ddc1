"""`anchorscope report` as a user types it."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from anchorscope.cli.report import report
from anchorscope.dumps import open_dump
from anchorscope.errors import AnchorScopeError
from anchorscope.report import html

from .runs import make_profiles, renamed, write_diagnostics, write_methods, write_run
from .test_html import parsed, unpack


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    monkeypatch.setattr(html, "plotly_source", lambda: "/* plotly */")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", make_profiles(layers=1, heads=2))


def invoke(*arguments):
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def make_dump(folder, tokens=2048, **more):
    """A dump with token ids, as `write_dump` writes it, and its identity."""
    import torch

    from anchorscope.dumps import write_dump

    q, k = torch.randn(2, tokens, 8), torch.randn(1, tokens, 8)
    write_dump(
        folder,
        [{"prompt": "prose", "layer": 0, "q": q, "k": k, "v": k, "scale": 0.35}],
        prompts={"prose": {"token_ids": [i % 3 for i in range(tokens)]}},
        **more,
    )
    return open_dump(folder).identity


def test_writes_the_page_into_the_first_analysis(run):
    done = invoke(run)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(run / "report.html")
    assert parsed((run / "report.html").read_text(encoding="utf-8"))["sets"][0]["prompt"] == "prose"


def test_other_file_and_a_comparison(run, tmp_path):
    methods = write_methods(tmp_path / "m", make_profiles(layers=1, heads=2))
    assert invoke(methods, run, "--html", tmp_path / "x.html").exit_code == 0
    assert not (run / "report.html").exists()
    assert parsed((tmp_path / "x.html").read_text(encoding="utf-8"))["sets"][0]["methods"]["labels"][0] == "rival"


def test_open_shows_the_file(run, monkeypatch):
    import webbrowser

    seen = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: seen.append(uri) or True)
    assert invoke(run, "--open").exit_code == 0
    assert seen == [(run / "report.html").resolve().as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda uri: False)
    assert "open it yourself" in invoke(run, "--open").output.replace(str(run / "report.html"), "it")


def test_tokens_of_the_dump(tmp_path):
    identity = make_dump(tmp_path / "dump")
    profiles = [renamed(p, dump_identity=identity) for p in make_profiles(layers=1, heads=1)]
    folder = write_run(tmp_path / "run", profiles)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"\u0120a": 0, "<b>": 1}}}))
    for options, expected in (
        ([], ["#0 ", "#1 ", "#2 "]),
        (["--tokenizer", tmp_path], [" a", "<b>", "#2 "]),
    ):
        done = invoke(folder, "--dump", tmp_path / "dump", *options)
        assert done.exit_code == 0, done.exception
        data = parsed((folder / "report.html").read_text(encoding="utf-8"))
        words = json.loads(unpack(data["words"][data["sets"][0]["text"]]))
        assert words[:3] == expected
        assert len(words) == 2048


def words_of(folder):
    data = parsed((folder / "report.html").read_text(encoding="utf-8"))
    name = data["sets"][0]["text"]
    return None if name is None else json.loads(unpack(data["words"][name]))


def test_words_of_the_analysis_need_no_dump(tmp_path):
    """analyze keeps what the tokens say; a dump that is named, and its tokenizer, win over it."""
    import shutil

    from anchorscope.analysis.run import analyze
    from anchorscope.params import AnchorParams

    make_dump(tmp_path / "dump", 300, token_texts={0: " the", 1: b"\xc3", 2: b"\xa9<b>"})
    analyze(tmp_path / "dump", tmp_path / "out", thetas=(4,), params=AnchorParams(16, 2), diagnose=False, figures=False)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert invoke(tmp_path / "copy").exit_code == 0
    assert words_of(tmp_path / "copy")[:3] == [" the", [0xC3], [0xA9, *b"<b>"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"\u0120a": 0, "<b>": 1}}}))
    done = invoke(tmp_path / "copy", "--dump", tmp_path / "dump", "--tokenizer", tmp_path)
    assert done.exit_code == 0, done.exception
    assert words_of(tmp_path / "copy")[:3] == [" a", "<b>", "#2 "]
    file = tmp_path / "copy" / "tokens.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**saved, "dump": "another"}))
    assert invoke(tmp_path / "copy").exit_code == 0
    assert words_of(tmp_path / "copy") is None, "the words of another dump"
    file.write_text(json.dumps({**saved, "token_texts": {"0": 7}}))
    assert "token_texts holds neither" in str(invoke(tmp_path / "copy").exception)


def test_mistakes_are_one_sentence(run, tmp_path):
    make_dump(tmp_path / "dump", tokens=16)
    for arguments, words in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([run, "--tokenizer", tmp_path], "add --dump"),
        ([run, "--html", tmp_path], "is a folder"),
        ([run, "--dump", tmp_path / "nowhere"], "nowhere"),
        ([run, "--dump", tmp_path / "dump"], "is not the dump"),
    ):
        error = invoke(*arguments).exception
        assert isinstance(error, AnchorScopeError), error
        assert error.exit_code == 2
        assert words in str(error)


def test_the_last_line_counts_all_that_the_page_is_made_of(run, tmp_path):
    profiles = make_profiles(layers=1, heads=2)
    methods, kinds = write_methods(tmp_path / "m", profiles), write_diagnostics(tmp_path / "h", profiles)
    other = write_methods(tmp_path / "n", profiles)
    said = invoke(run, methods, other, kinds).stderr
    heads = len(list((run / "profile").glob("*.safetensors")))
    assert f"{heads} heads, 2 comparisons, 1 diagnosis of heads, " in said


def test_help_names_every_kind_of_folder():
    from anchorscope.names import PAGE_COMMANDS
    from anchorscope.report.kinds import KINDS, SECTIONS

    assert sorted(PAGE_COMMANDS) == sorted(["analyze", *(x.command for x in (*KINDS, *SECTIONS))])
