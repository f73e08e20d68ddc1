"""Kill -9 at random moments, then repeat the command: is the result byte for byte that of an uninterrupted run?

`python tests/helpers/crash_resume.py capture 100` (or `analyze`). Each trial starts a process, kills it after a random
share of the time a whole run takes, and repeats that, up to three times, on the same folder; then a last process
finishes. Processes are forked from one that has loaded everything, so a trial takes a fraction of a second. Only the
start time may differ from the uninterrupted run's, and it must be the first process's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from families import prompt, tiny

from anchorscope.analysis.run import STATE, analyze
from anchorscope.capture import capture_model
from anchorscope.dumps import verify
from anchorscope.locks import LOCK
from anchorscope.params import AnchorParams

KILLS = 3  # at most, before the last process of a trial is left alone


def quiet(_: str) -> None:
    """Say nothing."""


def capture_once(folder: Path, model: object) -> None:
    """Capture two prompts, whole or in chunks; continues what is there."""
    prompts = [prompt(70, "a"), prompt(50, "b", seed=1)]
    chunk = 30 if folder.name.endswith("chunked") else None
    capture_model(model, prompts, folder, resume=True, chunk=chunk, notify=quiet)  # type: ignore[arg-type]


def analyze_once(folder: Path, dump: Path) -> None:
    """Analyze a small dump, with or without figures; continues what is there."""
    figures = folder.name.endswith("figures")
    analyze(
        dump, folder, thetas=(4.0, 8.0), params=AnchorParams(8, 2), device="cpu", heatmaps=[(0, 0)], figures=figures
    )


def start(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit code is 0 if it returned."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which outlives a process killed between its last file and its end."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def started(folder: Path, kind: str) -> str | None:
    """The start time a folder records, None before it records one."""
    path, key = (folder / "manifest.json", "created") if kind == "capture" else (folder / STATE, "started")
    return json.loads(path.read_bytes())[key] if path.exists() else None


def neutral(files: dict[str, bytes], time_text: str) -> dict[str, bytes]:
    """Files with the start time, and the manifest's checksum that covers it, replaced."""
    files = {name: raw.replace(time_text.encode(), b"<started>") for name, raw in files.items()}
    if "manifest.json" in files:
        sealed = json.loads(files["manifest.json"])["sha256"]
        files["manifest.json"] = files["manifest.json"].replace(sealed.encode(), b"<sealed>")
    return files


def campaign(kind: str, trials: int, seed: int) -> Counter[str]:
    """Run the trials; what the kills struck, by name.

    Raises:
        AssertionError: a result differs, or a folder cannot be continued.
    """
    rng = random.Random(seed)
    struck: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        model = tiny("gemma3_text")
        dump = base / "dump"
        capture_model(model, [prompt(40, "a")], dump, layers=[0, 2], notify=quiet)
        variants = ["whole", "chunked"] if kind == "capture" else ["numbers", "numbers", "figures"]

        def work(folder: Path) -> Callable[[], None]:
            return lambda: capture_once(folder, model) if kind == "capture" else analyze_once(folder, dump)

        expected, seconds = {}, {}
        for variant in set(variants):
            for turn in range(2):  # the first warms caches up; the second tells the time
                folder = base / f"straight-{turn}-{variant}"
                begun = time.perf_counter()
                assert os.waitpid(start(work(folder)), 0)[1] == 0, "the uninterrupted run failed"
                seconds[variant] = time.perf_counter() - begun
            text = started(folder, kind)
            assert text is not None
            expected[variant] = neutral(contents(folder), text)
        for trial in range(trials):
            variant = variants[trial % len(variants)]
            folder = base / f"trial-{trial}-{variant}"
            first: str | None = None
            for _ in range(rng.randint(1, KILLS)):
                if finished(folder, kind):
                    break  # the last kill came after the last file
                pid = start(work(folder))
                time.sleep(rng.random() * seconds[variant])
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                files = contents(folder) if folder.exists() else {}
                whole = os.WIFEXITED(status)
                struck["nothing: it had finished" if whole else state_of(files, kind)] += 1
                if folder.exists():
                    first = first or started(folder, kind)
                if whole:
                    assert os.WEXITSTATUS(status) == 0, f"trial {trial}: a repeated command failed"
                    break
            if not finished(folder, kind):
                assert os.waitpid(start(work(folder)), 0)[1] == 0, f"trial {trial}: it could not be continued"
            text = started(folder, kind)
            assert text is not None
            assert first in (None, text), f"trial {trial}: the start time changed from {first} to {text}"
            got = neutral(contents(folder), text)
            different = sorted(
                n for n in got.keys() | expected[variant].keys() if got.get(n) != expected[variant].get(n)
            )
            assert not different, f"trial {trial} differs in {different}"
            if kind == "capture":
                assert verify(folder).state == "verified"
    return struck


def finished(folder: Path, kind: str) -> bool:
    """Whether the folder holds a finished result, which a repeated command would refuse to redo."""
    if kind == "capture":
        path = folder / "manifest.json"
        return path.exists() and json.loads(path.read_bytes())["complete"]
    return (folder / "report.json").exists()


def state_of(files: dict[str, bytes], kind: str) -> str:
    """What a kill interrupted, in words."""
    if kind == "capture":
        if "manifest.json" not in files:
            return "before there was a manifest"
        if any(n.endswith(".partial") for n in files):
            return "while a file was being written"
        listed = len(json.loads(files["manifest.json"])["entries"])
        there = sum(n.endswith(".safetensors") for n in files)
        return "between a file and the manifest" if there > listed else f"after {listed} layers"
    if STATE not in files:
        return "before there was a state file"
    if any(n.startswith("figures") for n in files):
        return "while drawing"
    return "while measuring" if "heads.csv" not in files else "after measuring"


def main() -> None:
    """Run a campaign and print what was struck."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["capture", "analyze"])
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    struck = campaign(options.kind, options.trials, options.seed)
    for what, count in struck.most_common():
        print(f"{count:5} kills struck {what}")
    seconds = time.perf_counter() - begun
    kills = sum(count for what, count in struck.items() if not what.startswith("nothing"))
    print(f"{options.trials} trials of {options.kind}, {kills} kills in time, all byte-identical, {seconds:.0f} s")


if __name__ == "__main__":
    main()
