"""The kernels compile ahead of time for every target, in a process of its own: the interpreter compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_ahead.py"


def compile_ahead(*cases: str) -> str:
    """Run compile_ahead.py; its output, after checking that it succeeded."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SCRIPT), *cases], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return run.stdout


def test_one_kernel_per_target() -> None:
    """Tiles fit shared memory and spills stay within spills.json."""
    pytest.importorskip("triton")
    cases = ("anchor-sm80-64", "sparse-sm89-64", "identify-sm90-128", "anchor_hopper-sm90-128", "dense_lse-gfx942-64")
    assert f"compiled {len(cases)}, failed 0" in compile_ahead(*cases)


def test_unknown_case_is_refused() -> None:
    """A typing error must not compile everything, or nothing."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SCRIPT), "anchor-sm80-63"], env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert "anchor-sm80-63" in run.stderr


@pytest.mark.slow
def test_every_kernel_and_target() -> None:
    """The same for all of them."""
    pytest.importorskip("triton")
    assert "failed 0" in compile_ahead()
