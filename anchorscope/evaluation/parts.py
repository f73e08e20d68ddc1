"""What an interrupted evaluation has done already: one file per prompt or sample, and arm."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from anchorscope.evaluation.lanes import PrefillWork
from anchorscope.evaluation.metrics import TokenScores
from anchorscope.files import check_regular, parse_json, seal, sealed, write_atomic
from anchorscope.shapes import fits

ARRAYS = ("nll", "kl", "agree", "right")
MAX_BYTES = 1 << 32  # four numbers a token
_LAYER = {
    **dict.fromkeys(("layer", "queries", "visible_pairs", "kept_pairs"), int),
    "kind": str,
    "recall": (float, None),
    "seconds": float,
}
_SHAPE = {
    "work": {"tokens": int, "seconds": float, "layers": [_LAYER]},
    "text": (str, None),
    "score": (float, None),
}


@dataclass(frozen=True)
class Part:
    """One arm's result on one prompt or sample.

    Attributes:
        scores: the prompt's tokens, or the correct answer's, scored against dense.
        work: what the prefill cost.
        text: the generated answer; None for prompts.
        score: share of the expected strings in it.
    """

    scores: TokenScores
    work: PrefillWork
    text: str | None = None
    score: float | None = None

    def save(self, path: Path, run: str) -> None:
        """Write it, all or nothing; `run` identifies the request it belongs to.

        Raises:
            RunFailure: it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(getattr(self.scores, name)) for name in ARRAYS}
        record = seal(
            {
                "run": run,
                "work": self.work.to_json(),
                "text": self.text,
                "score": self.score,
                "arrays": {name: _fingerprint(x) for name, x in arrays.items()},
            }
        )
        write_atomic(path, safetensors.numpy.save(arrays, metadata={"part": json.dumps(record)}))

    @classmethod
    def load(cls, path: Path, run: str) -> Part | None:
        """Read it; None where it is missing, damaged or of another request, and has to be made (again)."""
        try:
            check_regular(path, MAX_BYTES, "part")
            with safetensors.safe_open(path, framework="numpy") as file:
                record = parse_json((file.metadata() or {})["part"].encode(), "part")
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
        shapes = {x.shape for x in arrays.values()}
        if len(shapes) > 1 or any(x.ndim != 1 or x.dtype != np.float64 for x in arrays.values()):
            return None
        prints = {name: _fingerprint(x) for name, x in arrays.items()}
        if not sealed(record) or not fits(record, {**_SHAPE, "run": run, "arrays": prints}):
            return None
        return cls(TokenScores(**arrays), PrefillWork.from_json(record["work"]), record["text"], record["score"])


def _fingerprint(x: np.ndarray) -> str:
    return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
