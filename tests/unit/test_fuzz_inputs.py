"""Random mutants of every input other than dumps: a result, or one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "fuzz_inputs.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")


def campaign(count: int, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(count), "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_few_dozen_mutants() -> None:
    said = campaign(40, seed=1)
    assert "40 mutants, 0 failures" in said
    assert ": refused" in said
    assert ": accepted" in said


@pytest.mark.slow
def test_three_thousand_mutants() -> None:
    assert "3000 mutants, 0 failures" in campaign(3000, seed=2)
