"""Files of anybody's: refused in one sentence, or read as they are; written all or nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from anchorscope import files
from anchorscope.errors import DumpError, InputError
from anchorscope.files import (
    check_regular,
    csv_text,
    human_bytes,
    member,
    parse_json,
    read_csv,
    read_json,
    read_part,
    read_regular,
    read_stream,
    visible,
    write_part,
)

needs_posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_posix
def test_only_regular_files_of_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 11)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, word in (
        (tmp_path / "pipe", "pipe or a device"),
        (Path("/dev/zero"), "pipe or a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "long", "too large"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "loop", "cannot be read"),
        (str(tmp_path / "a\0b"), "no file name"),
        (tmp_path / ("n" * 300), "cannot be read"),
    ):
        refused(lambda path=path: read_regular(path, 10, "table"), "table", word)
        refused(lambda path=path: check_regular(path, 10, "table"), "table", word)
    with pytest.raises(DumpError):
        read_regular(tmp_path / "pipe", 10, "profile", error=DumpError)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "real").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("real")
    assert read_regular(tmp_path / "link", 10, "table") == b"0123456789"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 400 + b"}", "400 digits"),
        (b'{"a": ' + b"9" * 9000 + b"}", "9000 digits"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "x\0y"}', "JSON"),
        (b'{"a": 1', "truncated"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_json_that_is_refused(text, word):
    refused(lambda: parse_json(text, "file x"), "file x", word)


def test_json_that_is_accepted(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, true, null], "b": "\\ud83d\\ude00", "c": 12345678901234567890}')
    assert read_json(path, 1000, "file") == {"a": [1, 2.5, True, None], "b": "😀", "c": 12345678901234567890}


@needs_posix
def test_a_pipe_is_read_and_bounded(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for said, limit in ((b"abc" * 100_000, 1 << 20), (b"x" * 50, 10)):
        writer = threading.Thread(target=_write, args=(pipe, said))
        writer.start()
        if len(said) <= limit:
            assert read_stream(pipe, limit, "prompt") == said
        else:
            refused(lambda: read_stream(pipe, 10, "prompt"), "too long")
        writer.join()
    refused(lambda: read_stream("/dev/zero", 1 << 21, "prompt"), "too long")
    assert read_stream("/dev/null", 10, "prompt") == b""
    refused(lambda: read_stream(tmp_path, 10, "prompt"), "folder")
    refused(lambda: read_stream(tmp_path / "absent", 10, "prompt"), "does not exist")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


@needs_posix
def test_a_pipe_without_a_writer_is_given_up(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.1)
    refused(lambda: read_stream(tmp_path / "pipe", 10, "prompt"), "nobody wrote")


@needs_posix
def test_process_substitution_and_closed_input():
    code = (
        "import sys; from anchorscope.files import read_stream, read_stdin\n"
        "from anchorscope.errors import InputError\n"
        "print(read_stream(sys.argv[1], 100, 'prompt'))\n"
        "try:\n    read_stdin(100)\nexcept InputError as e:\n    print(e)\n"
    )
    said = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" <(sleep 0.3; echo hello) <&-', code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "b'hello\\n'" in said
    assert "standard input is closed" in said


def test_parts_are_sealed(tmp_path):
    path = tmp_path / "part.json"
    write_part(path, {"dump": "d", "points": [0.1, 1 / 3, None, "é"]})
    assert read_part(path) == {"dump": "d", "points": [0.1, 1 / 3, None, "é"]}
    whole = json.loads(path.read_text())
    for change in (
        {"points": [0.2, 1 / 3, None, "é"]},
        {"dump": "e"},
        {"more": 1},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"sha256": 5},
    ):
        path.write_text(json.dumps({**whole, **change}))
        assert read_part(path) is None, change
    del whole["sha256"]
    path.write_text(json.dumps(whole))
    assert read_part(path) is None
    assert read_part(tmp_path / "absent") is None


def test_csv_is_no_spreadsheet_program_and_comes_back(tmp_path):
    texts = ["=1+1", "+a", "-b", "@c", "\td", "\re", "＝x", "'=f", "''g", "plain", "it's", "", '"', "a,b", "x=1"]
    numbers = ["-1", "+1e-05", "-inf", "inf", "1.5", "-0.25", "-3."]
    text = csv_text(["name", "value"], [[x, n] for x in texts for n in numbers])
    raw = list(csv.reader(io.StringIO(text, newline="")))[1:]
    for name, value in raw:
        assert name[:1] not in ("=", "+", "-", "@", "\t", "\r", "＝")
        assert value in numbers
    path = tmp_path / "t.csv"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + text.encode())
        assert read_csv(path, 1 << 20, "table") == [["name", "value"], *([x, n] for x in texts for n in numbers)]
    for bad, word in ((b"a\xff", "UTF-8"), (b'"' + b"x" * 200_000, "CSV")):
        path.write_bytes(bad)
        refused(lambda: read_csv(path, 1 << 20, "table"), word)


def test_names_stay_inside(tmp_path):
    (tmp_path / "in").mkdir()
    folder = tmp_path / "in"
    (tmp_path / "x.json").write_text("{}")
    (folder / "out.json").symlink_to(tmp_path / "x.json")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "real.json").write_text("{}")
    (folder / "near.json").symlink_to("real.json")
    assert member(folder, "real.json", ".json") == folder / "real.json"
    assert member(folder, "near.json", ".json") == folder / "near.json"
    for name in (
        *("../x.json", "/x.json", "a/b.json", "a\\b.json", "c:x.json", ".x.json", "x", "", "a\0.json", "a\n.json"),
        *("out.json", "x" * 300 + ".json", None, 5, ["a.json"]),
    ):
        assert member(folder, name, ".json") is None, name


def test_words():
    assert [human_bytes(x) for x in (999, 1536, 2e9, 5e13)] == ["999 B", "1.5 kB", "2.0 GB", "50.0 TB"]
    assert [human_bytes(x) for x in (999.4, 999.6, 999_949, 999_999)] == ["999 B", "1.0 kB", "999.9 kB", "1.0 MB"]
    assert visible("a\x1b[31m\n\u202e\x9b\x07é 中") == "a\\x1b[31m\\n\\u202e\\x9b\\x07é 中"
    assert visible("\ud800") == "\\ud800"
    assert len(visible("x" * 1000, 100)) < 110
