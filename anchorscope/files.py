"""Files: written all or nothing, read only where they are regular and of bounded size; JSON, CSV, text for terminals.

Whatever is read was written by somebody else: a pipe that nobody writes to, a device without an end, JSON nested a
million deep, a number of thousand digits. Each is one sentence here, so that no command needs to think of it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import select
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorscope.errors import InputError, RunFailure
from anchorscope.shown import counted

MAX_JSON_BYTES = 1 << 28  # reports and tables of the largest models fit; a hostile file does not fill the memory
MAX_PROMPT_BYTES = 1 << 26  # text of about 16 million tokens
PIPE_SECONDS = 10.0  # how long a named pipe may be without a writer
MAX_DIGITS = 300  # of a whole number in JSON: more would not even fit a float64
SEAL = "sha256"
_SURROGATE = re.compile("[\ud800-\udfff]")
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # what makes a spreadsheet compute a field
_QUOTED = re.compile('[,"\r\n]')
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|inf)")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_atomic(path: Path | str, data: bytes) -> None:
    """Write `data` under a temporary name in the same folder, flush, rename: all or nothing.

    Raises:
        RunFailure: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunFailure(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def json_bytes(value: object) -> bytes:
    """JSON as our files hold it: indented, in the order given, no NaN."""
    return (json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n").encode()


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a header and Unix line ends.

    A text that a spreadsheet would take for a formula (it begins with =, +, -, @, a tab or a line end) gets an
    apostrophe in front, as OWASP advises; numbers stay as they are. `read_csv` takes it away again.
    """
    return "".join(",".join(map(_field, row)) + "\n" for row in (columns, *rows))


def _field(value: object) -> str:
    """A CSV field. The library's writer leaves a carriage return unquoted where lines end in a line feed."""
    text = str(value)
    if not text[:1].isalnum() and _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None:
        text = f"'{text}"
    if _QUOTED.search(text) is not None:
        text = '"' + text.replace('"', '""') + '"'
    return text


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the SHA-256 of its canonical JSON as its last key, so that an edited number is noticed."""
    return {**value, SEAL: _digest(value)}


def sealed(value: object) -> bool:
    """Whether a JSON value is an object that `seal` made and nobody changed."""
    if not isinstance(value, dict) or not isinstance(value.get(SEAL), str):
        return False
    return bool(value[SEAL] == _digest({k: x for k, x in value.items() if k != SEAL}))


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_part(path: Path, value: Mapping[str, Any]) -> None:
    """Write one part of a run as sealed JSON, all or nothing.

    Raises:
        RunFailure: it cannot be written.
    """
    write_atomic(path, (json.dumps(seal(value), allow_nan=False) + "\n").encode())


def read_part(path: Path) -> dict[str, Any] | None:
    """What `write_part` wrote, without its seal.

    None where the part has to be made (again): it is missing, damaged, edited, or written by a version without seals.
    """
    try:
        value = read_json(path, MAX_JSON_BYTES, "part")
    except InputError:
        return None
    return {k: x for k, x in value.items() if k != SEAL} if sealed(value) else None


def again_remark(parts: Iterable[Path]) -> str | None:
    """The remark on parts that have to be made again although there is a file, or None."""
    found = [path for path in parts if path.exists()]
    if not found:
        return None
    count = counted(len(found), "part is", "parts are")
    return (
        f"{count} measured again, like {found[0]}: damaged, changed after it was written, or without a checksum as"
        " earlier versions left it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_regular(path: Path | str, limit: int, what: str, *, error: type[InputError] = InputError) -> bytes:
    """The bytes of a regular file, or of what a link to one leads to.

    Args:
        path: the file.
        limit: most bytes it may hold.
        what: what it should be, for messages: "anchors.json".
        error: class of the errors.

    Raises:
        InputError: missing, a folder, a pipe, a device, unreadable, or longer than the limit.
    """
    path = check_regular(path, limit, what, error=error)
    try:
        # A file that becomes a pipe between the two looks must not make us wait either.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{what} {path} changed while it was opened")
            raw = file.read(limit + 1)
    except OSError as failure:
        raise error(f"{what} {path} cannot be read: {failure.strerror or failure}") from None
    if len(raw) > limit:
        raise error(f"{what} {path} is longer than {human_bytes(limit)}, which is too large for it")
    return raw


def check_regular(path: Path | str, limit: int, what: str, *, error: type[InputError] = InputError) -> Path:
    """Make sure that a path leads to a regular file of at most `limit` bytes, without opening it.

    Raises:
        InputError: it does not (see `read_regular`).
    """
    try:
        path = Path(path)
        info = path.stat()
    except FileNotFoundError:
        raise error(f"{what} {path} cannot be read: it does not exist") from None
    except OSError as failure:
        raise error(f"{what} {path} cannot be read: {failure.strerror or failure}") from None
    except ValueError:  # a zero byte in the name
        raise error(f"{what} {str(path)!r} is no file name") from None
    if stat.S_ISDIR(info.st_mode):
        raise error(f"{what} {path} is a folder, not a file")
    if not stat.S_ISREG(info.st_mode):
        raise error(f"{what} {path} is a pipe or a device, not a regular file")
    if info.st_size > limit:
        raise error(
            f"{what} {path} is {human_bytes(info.st_size)} long, which is too large for it: at most"
            f" {human_bytes(limit)} are read"
        )
    return path


def read_stream(path: Path | str, limit: int, what: str) -> bytes:
    """The bytes of a file that may also be a pipe (`<(command)`) or a device, up to a limit.

    Raises:
        InputError: missing, a folder, unreadable, longer than the limit, or a pipe that nobody writes to.
    """
    try:
        path = Path(path)
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return read_regular(path, limit, what)
        if stat.S_ISDIR(mode):
            raise InputError(f"{what} {path} is a folder, not a file")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb", buffering=0) as file:
            if stat.S_ISFIFO(mode):
                first = _await_writer(handle, f"{what} {path}")
            else:
                first = b""
                os.set_blocking(handle, True)
            return _read_bounded(file, limit, f"{what} {path}", first)
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except OSError as failure:
        raise InputError(f"{what} {path} cannot be read: {failure.strerror or failure}") from None
    except ValueError as failure:
        if isinstance(failure, InputError):
            raise
        raise InputError(f"{what} {str(path)!r} is no file name") from None


def _await_writer(handle: int, where: str) -> bytes:
    """The first bytes of a pipe; then reading waits as usual. A pipe without a writer is given up after a while."""
    end = time.monotonic() + PIPE_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            if first := os.read(handle, 1 << 16):
                break
            # No bytes and no writer: it has come and gone, or not come yet.
            ready = select.poll()
            ready.register(handle, select.POLLIN)
            if any(event & select.POLLHUP for _, event in ready.poll(0)):
                break
            if time.monotonic() > end:
                raise InputError(f"{where} is a pipe that nobody wrote to in {PIPE_SECONDS:.0f} seconds")
            time.sleep(0.02)
            continue
        first = b""
        break  # somebody holds it open and will write
    os.set_blocking(handle, True)
    return first


def read_stdin(limit: int) -> bytes:
    """The bytes of standard input, up to a limit.

    Raises:
        InputError: it is closed, cannot be read, or is longer than the limit.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed: give a file, or pipe the text into the command")
    try:
        return _read_bounded(sys.stdin.buffer, limit, "standard input")
    except (OSError, ValueError) as failure:
        if isinstance(failure, InputError):
            raise
        reason = getattr(failure, "strerror", None) or failure
        raise InputError(f"standard input cannot be read ({reason}): give a file") from None


def _read_bounded(file: Any, limit: int, where: str, first: bytes = b"") -> bytes:
    pieces, count = [first], len(first)
    while count <= limit and (piece := file.read(min(1 << 20, limit + 1 - count))):
        pieces.append(piece)
        count += len(piece)
    if count > limit:
        raise InputError(f"{where} gives more than {human_bytes(limit)}, which is too long")
    return b"".join(pieces)


def read_json(path: Path | str, limit: int, what: str, *, error: type[InputError] = InputError) -> Any:
    """The value in a JSON file; see `read_regular` for the arguments and `parse_json` for what is refused.

    Raises:
        InputError: as `read_regular`, or not JSON.
    """
    raw = read_regular(path, limit, what, error=error)
    return parse_json(raw, f"{what} {path}", error=error)


def parse_json(raw: bytes, where: str, *, error: type[InputError] = InputError) -> Any:
    """The value of UTF-8 JSON; a byte-order mark is dropped.

    Raises:
        InputError: not UTF-8, not JSON, nested too deeply, a key twice in an object, half a surrogate pair in a text,
            a number that is no number (NaN), infinite (1e999) or hundreds of digits long.
    """
    if not raw.strip():
        raise error(f"{where} is empty")
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique_keys,
        )
    except UnicodeDecodeError as failure:
        raise error(f"{where} is not UTF-8 text (byte {failure.start})") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply") from None
    except json.JSONDecodeError as failure:
        raise error(
            f"{where} is truncated or not JSON ({failure.msg}, line {failure.lineno}, column {failure.colno})"
        ) from None
    except ValueError as failure:
        raise error(f"{where} holds what JSON does not allow: {failure}") from None
    # An escape of half a pair is legal JSON, but no text: it could not even be printed.
    if re.search(r"\\u[dD][89a-fA-F]", text) and _SURROGATE.search(_all_text(value)):
        raise error(f"{where} holds half of a surrogate pair, which is no text")
    return value


def read_csv(path: Path | str, limit: int, what: str, *, error: type[InputError] = InputError) -> list[list[str]]:
    """The lines of a CSV file that are not empty, fields as `csv_text` was given them.

    Raises:
        InputError: as `read_regular`, or not CSV in UTF-8.
    """
    raw = read_regular(path, limit, what, error=error)
    try:
        lines = [line for line in csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")) if line]
    except UnicodeDecodeError as failure:
        raise error(f"{what} {path} is not UTF-8 text (byte {failure.start})") from None
    except csv.Error as failure:
        raise error(f"{what} {path} is not CSV: {failure}") from None
    return [[x[1:] if x.startswith("'") and _FORMULA.match(x) is not None else x for x in line] for line in lines]


def member(folder: Path, name: object, suffix: str) -> Path | None:
    """The path of a file that a list in its folder names, or None if the name could lead outside.

    Refused: separators of any system, drive letters, `..`, hidden names, and a link that leaves the folder.
    """
    if not isinstance(name, str) or not name.endswith(suffix) or not name.isprintable() or len(name) > 200:
        return None
    if name.startswith(".") or any(c in name for c in '/\\:*?"<>|'):
        return None
    path = folder / name
    # `Path.resolve` raises where links lead in a circle.
    if path.is_symlink() and os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        return None
    return path


def _all_text(value: Any) -> str:
    """All keys and texts of a JSON value, one after another."""
    return json.dumps(value, ensure_ascii=False)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# words


def human_bytes(count: float) -> str:
    """Bytes in a readable unit, decimal as disks are sold: 1536 is "1.5 kB"."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if round(count, digits) < 1000:  # as shown: 999,999 is "1.0 MB", not "1000.0 kB"
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def visible(text: object, limit: int | None = None) -> str:
    """Text of anybody's, fit for one line of a terminal.

    What would act on the terminal or hide in it (control characters, line ends, direction marks) is spelled out as an
    escape (`\\x1b`), and the middle of texts longer than `limit` is left out.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit * 2 // 3]} ... {shown[-limit // 4 :]}"
