"""Finished runs of the commands that make a section of the page, as those commands write them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import anchorscope
from anchorscope.cli import main
from anchorscope.params import AnchorParams

from .runs import make_profiles, write_run


def calibrated(folder: Path, *, model: str = "toy", prompts: tuple[str, ...] = ("prose", "code"), **how: Any) -> Path:
    """A calibration of an analysis of synthetic heads, the last prompt held out."""
    profiles = make_profiles(prompts=prompts, layers=3, heads=4, thetas=(2.0, 4.0, 8.0, 12.0), tokens=2048)
    run = write_run(folder / "analysis-of-it", profiles, model=model)
    options = {"holdout": list(prompts[-1:]) if len(prompts) > 1 else 0, "figures": False, **how}
    return anchorscope.calibrate([run], folder / "cal", **options).path


def evaluated(folder: Path, **changes: Any) -> Path:
    """An evaluation of a tiny random model: two arms that keep all and little, a prompt, needles at two depths."""
    pytest.importorskip("transformers")
    from byte_model import byte_model, byte_tokenizer

    from anchorscope.evaluation import tasks
    from anchorscope.models import PromptInput

    request = {
        "arms": {"all": math.inf, "none": -math.inf},
        "params": AnchorParams(16, 2),
        "prompts": [PromptInput("p", token_ids=tuple(1 + i * i % 250 for i in range(650)))],
        "tasks": ["needle"],
        "lengths": [400, 600],
        "depths": [0.0, 1.0],
        "samples": 1,
        "figures": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "LEAST_PROSE", 20)
        return anchorscope.evaluate(
            byte_model(), folder / "eval", tokenizer=byte_tokenizer(), **{**request, **changes}
        ).path


def timed(folder: Path, *options: str) -> Path:
    """A bench on the CPU."""
    how = ["--lengths", "256,512", "--theta", "2,inf", "--block", "32", "--step", "2", "--repeats", "3"]
    assert main(["bench", *how, *options, "--out", str(folder / "bench")]) == 0
    return folder / "bench"
