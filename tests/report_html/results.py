"""Finished runs of the commands that make a section of the page, as those commands write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anchorscope

from .runs import make_profiles, write_run


def calibrated(folder: Path, *, model: str = "toy", prompts: tuple[str, ...] = ("prose", "code"), **how: Any) -> Path:
    """A calibration of an analysis of synthetic heads, the last prompt held out."""
    profiles = make_profiles(prompts=prompts, layers=3, heads=4, thetas=(2.0, 4.0, 8.0, 12.0), tokens=2048)
    run = write_run(folder / "analysis-of-it", profiles, model=model)
    options = {"holdout": list(prompts[-1:]) if len(prompts) > 1 else 0, "figures": False, **how}
    return anchorscope.calibrate([run], folder / "cal", **options).path
