"""Mutate dumps at random and read them: no crash, no hang, no traceback, nothing wrong accepted as verified.

`python tests/helpers/fuzz_dumps.py 10000 --seed 0`. Every mutant is opened, verified and, where it opens, loaded; one
in fifty is also put through the command line. An outcome is a failure if

- anything but a `DumpError` or an `InputError` is raised, or a message is not one printable line;
- a mutant takes longer than `LIMIT` seconds;
- a mutant counts as verified although a byte of it differs from the original;
- a mutant that was resealed (all checksums made right, as an attacker would) loads tensors that are not finite, or
  whose shapes, heads, scale or window break docs/dump-format.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import stat
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from anchorscope.dumps import open_dump, verify, write_dump
from anchorscope.dumps.format import canonical_sha256
from anchorscope.errors import DumpError, InputError

LIMIT = 20.0  # seconds for one mutant; they take milliseconds
CLI_SHARE = 50
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**53, 2**63, -(2**63), 10**400),
    *(
        "",
        "a",
        "\0",
        "..",
        "../x.safetensors",
        "/etc/passwd",
        "x" * 5000,
        "\ud800",
        "é\n",
        "NaN",
        "fp16",
        "manifest.json",
    ),
    *([], [[]], [0], [0, 0], [-1], [1, 0], ["0"], {}, {"q": [1]}, {"q": [1, 2, 3], "k": [1, 2, 3]}, [None] * 3),
]


class Hang(Exception):
    """A mutant took too long."""


def original(folder: Path) -> None:
    """A small dump with everything in it: two prompts, windows, a cap, two dtypes, a layer without values."""
    generator = torch.Generator().manual_seed(0)

    def x(heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(heads, tokens, 4, generator=generator).to(dtype)

    entries = []
    for prompt, tokens in (("a", 9), ("b", 5)):
        for layer, dtype in ((0, torch.float32), (2, torch.bfloat16)):
            entry = {"prompt": prompt, "layer": layer, "q": x(4, tokens, dtype), "k": x(2, tokens, dtype), "scale": 0.5}
            if layer == 0:
                entry["v"] = x(2, tokens, dtype)
            else:
                entry.update(window=3, softcap=20.0, query_heads=[2, 3, 8, 9], kv_heads=[1, 4])
            entries.append(entry)
    write_dump(folder, entries, model={"name": "m"}, prompts={"a": {"text": "t", "token_ids": list(range(9))}})


# ---------------------------------------------------------------------------------------------------------------------
# mutations: each takes the folder and a generator of random numbers


def flip_bits(folder: Path, rng: random.Random) -> None:
    """Flip up to eight bits of one file."""
    path = pick_file(folder, rng)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut_or_grow(folder: Path, rng: random.Random) -> None:
    """Truncate a file, drop a piece of it, double a piece, or append noise."""
    path = pick_file(folder, rng)
    raw = path.read_bytes()
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    path.write_bytes(rng.choice([raw[:a], raw[:a] + raw[b:], raw[:b] + raw[a:], raw + rng.randbytes(b - a + 1), b""]))


def edit_header(folder: Path, rng: random.Random) -> None:
    """Put odd values into a tensor file's header, or lie about its length."""
    path = pick_tensors(folder, rng)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.2:
        lie = rng.choice([0, 1, size - 1, size + 1, len(raw), 2**31, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", lie) + raw[8:])
        return
    header = json.loads(raw[8 : 8 + size])
    change_somewhere(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def poison(folder: Path, rng: random.Random) -> None:
    """Write NaN or an infinity over an element."""
    path = pick_tensors(folder, rng)
    raw = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(raw[:8], "little")
    value = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf]))
    wide = b"F32" in raw[:size]
    at = size + rng.randrange((len(raw) - size) // 4) * 4
    raw[at : at + 4] = value if wide else value[2:] * 2
    path.write_bytes(raw)


def edit_manifest(folder: Path, rng: random.Random) -> None:
    """Change, remove, repeat or swap values anywhere in the manifest."""
    manifest = read(folder)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        change_somewhere(manifest, rng)
    write(folder, manifest)


def edit_entry(folder: Path, rng: random.Random) -> None:
    """Give one key of one entry or prompt an odd value."""
    manifest = read(folder)
    item = rng.choice(manifest["entries"] + manifest["prompts"])
    item[rng.choice(sorted(item))] = copy.deepcopy(rng.choice(ODD))
    write(folder, manifest)


def shuffle_files(folder: Path, rng: random.Random) -> None:
    """Swap, remove, link or replace tensor files."""
    a, b = pick_tensors(folder, rng), pick_tensors(folder, rng)
    kind = rng.randrange(6)
    if kind == 0:
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        return
    a.unlink()
    if kind == 1:
        a.symlink_to(b.name)
    elif kind == 2:
        a.symlink_to("/dev/zero")
    elif kind == 3:
        a.mkdir()
    elif kind == 4:
        os.mkfifo(a)


def swap_entries(folder: Path, rng: random.Random) -> None:
    """Repeat an entry, or let two exchange a value."""
    manifest = read(folder)
    entries = manifest["entries"]
    a, b = rng.sample(range(len(entries)), 2)
    key = rng.choice([*sorted(entries[a]), None])
    if key is None:
        entries.append(copy.deepcopy(entries[a]))
    else:
        entries[a][key], entries[b][key] = entries[b].get(key), entries[a].get(key)
    write(folder, manifest)


def unseal(folder: Path, rng: random.Random) -> None:
    """Take checksums away, as the format allows."""
    manifest = read(folder)
    if rng.random() < 0.5:
        del manifest["sha256"]
    else:
        del rng.choice(manifest["entries"])["sha256"]
        manifest["sha256"] = canonical_sha256(manifest)
    write(folder, manifest)


def break_json(folder: Path, rng: random.Random) -> None:
    """Splice odd text into the manifest."""
    path = folder / "manifest.json"
    raw = path.read_bytes()
    at = rng.randrange(len(raw))
    odd = rng.choice(
        [b"[" * 3000, b"NaN", b"1e999", b"\xff", b"\0", b'"', b"}", b",", b"-", b"9" * 6000, b'{"a":1,"a":1}']
    )
    path.write_bytes(raw[:at] + odd + raw[at + rng.randrange(4) :])


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bits,
    cut_or_grow,
    edit_header,
    poison,
    edit_manifest,
    edit_entry,
    shuffle_files,
    swap_entries,
    unseal,
    break_json,
]


def reseal(folder: Path) -> bool:
    """Make every size and checksum right again, so that only the content itself can give a mutant away."""
    try:
        manifest = read(folder)
        for entry in manifest["entries"]:
            path = folder / entry["file"]
            if stat.S_ISREG(path.lstat().st_mode):
                raw = path.read_bytes()
                entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        manifest["sha256"] = canonical_sha256(manifest)
        write(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# one mutant


def examine(folder: Path, genuine: dict[str, bytes], resealed: bool, *, command: bool) -> str:
    """What the readers make of a mutant.

    Raises:
        AssertionError, or whatever the reader should not have raised.
    """
    outcome = "refused"
    with refusals():
        result = verify(folder)
        outcome = result.state
        for check in result.checks:
            one_line(check.detail, empty=True)
        if result.state == "verified" and not resealed:
            for name, raw in genuine.items():
                got = (folder / name).read_bytes()
                if name == "manifest.json":  # other spaces between the same values are no change
                    raw, got = (json.dumps(json.loads(text), sort_keys=True).encode() for text in (raw, got))
                assert got == raw, f"{name} was changed and counts as verified"
    with refusals():
        dump = open_dump(folder)
        for entry in dump.entries:
            with refusals():
                t = dump.load(entry)
                check_tensors(entry, t)
    if command:
        through_the_command_line(folder)
    return outcome


def check_tensors(entry: Any, t: Any) -> None:
    """What docs/dump-format.md promises about whatever loads."""
    heads, tokens, d = t.q.shape
    kv = t.k.shape[0]
    assert tokens == entry.tokens >= 1
    assert d == entry.head_dim >= 1
    assert heads == len(entry.query_heads) >= 1
    assert kv == len(entry.kv_heads) >= 1
    assert heads % kv == 0
    assert t.k.shape == (kv, tokens, d)
    assert t.v is None or t.v.shape == t.k.shape
    assert math.isfinite(entry.scale)
    assert entry.scale > 0
    assert entry.window is None or entry.window >= 1
    assert entry.softcap is None or (math.isfinite(entry.softcap) and entry.softcap > 0)
    for x in (t.q, t.k, t.v):
        assert x is None or bool(torch.isfinite(x).all())


def through_the_command_line(folder: Path) -> None:
    """`anchorscope info DIR`, plain and as JSON, exits with 0 or 2 and shows no traceback."""
    from anchorscope.cli import main as program

    for options in ([], ["--json"]):
        # encoded as a terminal's stream would be: what cannot be printed must not get there
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program(["info", str(folder), *options])
        err.seek(0)
        said = err.read()
        assert code in (0, 2), f"exit code {code}: {said}"
        assert "Traceback" not in said


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Let refusals pass that are one sentence."""
    try:
        yield
    except (DumpError, InputError) as error:
        one_line(str(error))


def one_line(message: str, *, empty: bool = False) -> None:
    """A message fits one line of any terminal and holds nothing that would act on it."""
    assert message or empty, "no message"
    assert not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in message), f"unprintable: {message!r}"
    assert len(message) < 2000, f"a message of {len(message)} characters"


def campaign(count: int, seed: int) -> Counter[str]:
    """Examine `count` mutants; outcomes by mutation.

    Raises:
        AssertionError: with the number of the mutant, whose seed is `seed:number`.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "original"
        original(base)
        genuine = {p.name: p.read_bytes() for p in base.iterdir()}
        folder = Path(name) / "mutant"

        def late(*_: object) -> None:
            raise Hang

        signal.signal(signal.SIGALRM, late)
        for number in range(count):
            rng = random.Random(f"{seed}:{number}")
            shutil.copytree(base, folder)
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            mutations = rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2, 3]))
            with contextlib.suppress(Exception):
                for mutate in mutations:  # a later one may not fit what an earlier one left
                    mutate(folder, rng)
            resealed = rng.random() < 0.5 and reseal(folder)
            try:
                outcome = examine(folder, genuine, resealed, command=number % CLI_SHARE == 0)
            except BaseException as error:
                names = ", ".join(m.__name__ for m in mutations)
                raise AssertionError(f"mutant {seed}:{number} ({names}): {type(error).__name__}: {error}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                shutil.rmtree(folder)
            outcomes[f"{mutations[0].__name__}: {outcome}{', resealed' if resealed else ''}"] += 1
    return outcomes


# ---------------------------------------------------------------------------------------------------------------------
# tools


def pick_file(folder: Path, rng: random.Random) -> Path:
    """A file of the dump; the manifest one time in three."""
    return folder / "manifest.json" if rng.random() < 1 / 3 else pick_tensors(folder, rng)


def pick_tensors(folder: Path, rng: random.Random) -> Path:
    """A tensor file that is still a regular one (a pipe would wait for ever, /dev/zero never ends)."""
    return rng.choice([p for p in sorted(folder.glob("*.safetensors")) if stat.S_ISREG(p.lstat().st_mode)])


def read(folder: Path) -> dict[str, Any]:
    """The manifest."""
    return json.loads((folder / "manifest.json").read_bytes())


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest; lone surrogates go out as a careless program would write them."""
    text = json.dumps(manifest, ensure_ascii=len(str(manifest)) % 2 == 0)
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))


def change_somewhere(node: Any, rng: random.Random) -> None:
    """Change, remove, repeat or add one thing at a random place of nested JSON values."""
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.75:
            node = node[key]
            continue
        kind = rng.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(["x", "sha256", "window", "file", "v", ""])] = node[key]
        elif kind == 3 and isinstance(node[key], (int, float)) and abs(node[key]) < 1e300:
            node[key] = node[key] + rng.choice([-1, 1, 0.5, 1e9])
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
        return


def main() -> None:
    """Run a campaign and print its outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    outcomes = campaign(options.count, options.seed)
    for what, number in sorted(outcomes.items()):
        print(f"{number:6} {what}")
    print(f"{sum(outcomes.values())} mutants, none accepted wrongly, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
