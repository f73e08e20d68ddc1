"""Kill -9 at any moment, repeat the command: byte-identical. A small share of the campaign; the slow tier has all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "helpers" / "crash_resume.py"


def campaign(kind: str, trials: int, seed: int) -> int:
    """Kills that came in time; the script fails if anything differs."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(trials), "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) (?:kills|KILL) in time, all byte-identical", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("kind", "trials"), [("capture", 8), ("calibrate", 2)])
def test_killed_and_repeated(kind: str, trials: int) -> None:
    assert campaign(kind, trials, seed=1) >= 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["capture", "analyze", "compare", "heads", "calibrate", "bench", "evaluate"])
def test_killed_and_repeated_forty_times(kind: str) -> None:
    assert campaign(kind, 40, seed=2) >= 20
