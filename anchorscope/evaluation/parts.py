"""What an interrupted evaluation has done already: one file per prompt or sample, and arm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from anchorscope.evaluation.lanes import Work
from anchorscope.evaluation.metrics import TokenScores
from anchorscope.files import write_atomic

ARRAYS = ("nll", "kl", "agree", "right")


@dataclass(frozen=True)
class Part:
    """One arm's result on one prompt or sample.

    Attributes:
        scores: of the prompt's tokens, or of the correct answer's.
        work: what the prefill cost.
        text: the generated answer; None for prompts.
        score: share of the expected strings in it.
    """

    scores: TokenScores
    work: Work
    text: str | None = None
    score: float | None = None

    def save(self, path: Path, run: str) -> None:
        """Write it, all or nothing; `run` identifies the request it belongs to.

        Raises:
            RunFailure: it cannot be written.
        """
        record = {"run": run, "work": self.work.to_json(), "text": self.text, "score": self.score}
        arrays = {name: np.ascontiguousarray(getattr(self.scores, name)) for name in ARRAYS}
        write_atomic(path, safetensors.numpy.save(arrays, metadata={"part": json.dumps(record)}))

    @classmethod
    def load(cls, path: Path, run: str) -> Part | None:
        """Read it; None where it is missing, damaged or of another request, and has to be made (again)."""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                record: dict[str, Any] = json.loads((file.metadata() or {})["part"])
                arrays = [file.get_tensor(name) for name in ARRAYS]
            if record["run"] != run:
                return None
            return cls(TokenScores(*arrays), Work.from_json(record["work"]), record["text"], record["score"])
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
