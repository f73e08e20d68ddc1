"""Random mutants of a dump: refused in one sentence, or exactly as good as they claim. The slow tier runs 10,000."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "fuzz_dumps.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")


def campaign(count: int, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(count), "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_thousand_mutants() -> None:
    said = campaign(1000, seed=1)
    assert "1000 mutants, none accepted wrongly" in said
    for outcome in (": refused", ": damaged", ": unverified", ": verified, resealed"):
        assert outcome in said  # the mutants reach every state


@pytest.mark.slow
def test_ten_thousand_mutants() -> None:
    assert "10000 mutants, none accepted wrongly" in campaign(10_000, seed=2)
