"""Kill -9 at random moments, then repeat the command: is the result byte for byte that of an uninterrupted run?

`python tests/helpers/crash_resume.py analyze 40` (or another command, or all), figures on. Each
trial starts a process, kills it after a random share of the time a whole run takes, and repeats that, up to three
times, on the same folder; then a last process finishes. Processes are forked from one that has loaded everything and
stopped its clock, so that no byte may differ. `--signal INT` sends Ctrl-C instead, and checks how the process ends.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from resumable import COMMANDS, Command, Inputs, contents, still_clock

from anchorscope.cli.app import _signals

KILLS = 3  # at most, before the last process of a trial is left alone
INTERRUPTED = 130


def start(command: Command, inputs: Inputs, folder: Path) -> int:
    """Run the command in a forked process; its exit code is 0 if it returned, 130 if it was interrupted."""
    pid = os.fork()
    if pid:
        return pid
    code, received = 1, []
    try:
        with _signals() as received:  # as the program does, since libraries drop interruptions or choke on them
            command.run(inputs, folder)
        code = 0
    except BaseException as error:
        if received:
            code = INTERRUPTED
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def campaign(command: Command, trials: int, seed: int, number: int, tokens: int) -> Counter[str]:
    """Run the trials; what the kills struck, by name.

    Raises:
        AssertionError: a result differs, a folder cannot be continued, or an unfinished one looks finished.
    """
    rng = random.Random(seed)
    struck: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, still_clock():
        base = Path(name)
        inputs = Inputs.make(base, tokens)
        seconds = 0.0
        for turn in range(2):  # the first warms caches up; the second tells the time
            begun = time.perf_counter()
            status = os.waitpid(start(command, inputs, base / f"straight-{turn}"), 0)[1]
            assert status == 0, "the uninterrupted run failed"
            seconds = time.perf_counter() - begun
        expected = contents(base / "straight-1")
        assert expected == contents(base / "straight-0"), "two uninterrupted runs differ"
        for trial in range(trials):
            folder = base / f"trial-{trial}"
            for _ in range(rng.randint(1, KILLS)):
                if command.finished(folder):
                    break  # the last kill came after the last file
                pid = start(command, inputs, folder)
                time.sleep(rng.random() * seconds)
                os.kill(pid, number)
                status = os.waitpid(pid, 0)[1]
                whole = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
                if os.WIFEXITED(status) and not whole:
                    assert number == signal.SIGINT, f"trial {trial}: exit code {os.WEXITSTATUS(status)}"
                    assert os.WEXITSTATUS(status) == INTERRUPTED, f"trial {trial}: {os.WEXITSTATUS(status)}"
                done = command.finished(folder)
                assert done or not whole, f"trial {trial}: it returned and is not finished"
                struck["nothing: it had finished" if whole else place(contents(folder), command)] += 1
                if done:
                    assert contents(folder) == expected, f"trial {trial} looks finished and is not"
            if not command.finished(folder):
                status = os.waitpid(start(command, inputs, folder), 0)[1]
                assert status == 0, f"trial {trial}: it could not be continued"
            got = contents(folder)
            different = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
            assert not different, f"trial {trial} differs in {different}"
    return struck


def place(files: dict[str, bytes], command: Command) -> str:
    """What an interruption struck, in words."""
    names = [Path(n).name for n in files]
    if any(n.endswith((".tmp", ".partial")) for n in names):
        return "while a file was being written"
    if not any(n.endswith(".json") for n in names):
        return "before anything was written"
    if command.report in files and command.name != "capture":
        return "after the last file"
    if any(n.endswith(".png") for n in names):
        return "while drawing or after"
    if any(n.endswith(".csv") for n in names):
        return "after measuring"
    return "while measuring"


def main() -> None:
    """Run campaigns and print what was struck."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=[*(c.name for c in COMMANDS), "all"])
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    options = parser.parse_args()
    torch.set_num_threads(1)
    number = signal.SIGINT if options.signal == "INT" else signal.SIGKILL
    for command in COMMANDS:
        if options.command not in ("all", command.name):
            continue
        begun = time.perf_counter()
        struck = campaign(command, options.trials, options.seed, number, options.tokens)
        for what, count in struck.most_common():
            print(f"{count:5} {options.signal} struck {what}")
        kills = sum(count for what, count in struck.items() if not what.startswith("nothing"))
        what = "kills" if options.signal == "KILL" else "interruptions"
        print(
            f"{options.trials} trials of {command.name}, {kills} {what} in time, all byte-identical,"
            f" {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
