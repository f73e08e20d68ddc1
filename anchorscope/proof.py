"""What shows that a model is the one it claims to be: how well it predicts the text that it has just read.

Rows of attention are recomputed while a model runs, so a dump is what attention consumed. A model that is wrong as a
whole (weights that are missing, a tokenizer of another model) passes that check; it cannot predict text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from anchorscope.shown import counted

SCORED = 256  # the last tokens of a prompt that are predicted
CONTEXT = 512  # tokens of the short run, where a capture does not run the model to its end
# A share of log(vocabulary). Random weights are at 1 or above. A trained model of 50,000 tokens is at 0.2 to 0.4 on
# text; one that knows little but how frequent each token is, since its attention is broken, is near 0.7.
NEAR_CHANCE = 2 / 3
JUDGED = 8  # fewer predicted tokens say too little


@dataclass(frozen=True)
class PromptProof:
    """How well a model predicts the last tokens of a prompt.

    Attributes:
        tokens: how many tokens were predicted, each from those before it; 0 if none could be.
        context: the length of the run that predicted them: the whole prompt, or its last `CONTEXT` tokens.
        vocabulary: how many tokens the model chooses from.
        nats: mean negative log-likelihood, nats per token; None where it is not known, or not finite.
        accuracy: share of tokens that were the model's first choice.
        reason: why `nats` is None.
    """

    tokens: int
    context: int
    vocabulary: int = 0
    nats: float | None = None
    accuracy: float = 0.0
    reason: str | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(nats); None as that is."""
        # beyond 700 nats the exponential leaves the range of numbers
        return None if self.nats is None else math.exp(min(self.nats, 700.0))

    @property
    def chance(self) -> float | None:
        """Nats of a blind guess: the logarithm of the vocabulary."""
        return math.log(self.vocabulary) if self.vocabulary else None

    @property
    def near_chance(self) -> bool:
        """Whether a blind guess would do about as well (at least `NEAR_CHANCE` of its nats)."""
        if self.tokens < JUDGED or self.chance is None:
            return False
        return self.nats is None or self.nats >= NEAR_CHANCE * self.chance

    def warning(self, prompt: str) -> str | None:
        """One sentence where something is wrong, else None."""
        if not self.near_chance:
            return None
        causes = "its weights may be missing or damaged, the tokenizer may be another model's, or the text is noise"
        if self.perplexity is None:
            return (
                f"the model's logits for prompt {prompt} hold NaN or infinity: its weights are damaged, or it overflows"
                " its dtype"
            )
        better = "no better" if self.nats is not None and self.nats >= (self.chance or 0.0) else "hardly better"
        return (
            f"the model predicts the last {counted(self.tokens, 'token')} of prompt {prompt} {better} than chance"
            f" (perplexity {self.perplexity:,.6g}, vocabulary {self.vocabulary:,}): {causes}"
        )

    def to_json(self) -> dict[str, Any]:
        """As manifests hold it: `nats` and `perplexity` to a millionth, so that a repeated run gives the same text."""
        if self.nats is None:
            return {**self._shape(), "reason": self.reason}
        assert self.perplexity is not None
        return {
            **self._shape(),
            "nats": round(self.nats, 6),
            "perplexity": float(f"{self.perplexity:.7g}"),
            "accuracy": round(self.accuracy, 6),
        }

    def _shape(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "context": self.context, "vocabulary": self.vocabulary}

    @classmethod
    def from_json(cls, value: Any) -> PromptProof:
        """Back again, from an untrusted file; keys that are not known are ignored.

        Raises:
            ValueError: a value has the wrong type or is out of range.
        """
        if not isinstance(value, Mapping):
            raise ValueError("proof must be an object")
        tokens, context, vocabulary = (value.get(key) for key in ("tokens", "context", "vocabulary"))
        if not (_is_count(tokens) and _is_count(context) and _is_count(vocabulary)):
            raise ValueError("the tokens, context and vocabulary of a proof must be whole numbers")
        nats, accuracy, reason = value.get("nats"), value.get("accuracy", 0), value.get("reason")
        if nats is not None and not _between(nats, 0, 1e300):
            raise ValueError("the nats of a proof must be null or a number of at least 0")
        if not _between(accuracy, 0, 1) or not isinstance(reason, (str, type(None))):
            raise ValueError("a proof's accuracy must be between 0 and 1, and its reason text")
        return cls(tokens, context, vocabulary, None if nats is None else float(nats), float(accuracy), reason)


@dataclass(frozen=True)
class ModelProof:
    """What is known about where a model's weights came from.

    Attributes:
        loader: what loading it reported (tensors that the file has too many, how the file's metadata and the
            configuration agree); None where the model was handed over loaded.
        warnings: sentences about weights that did not come from a checkpoint.
    """

    loader: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The `proof` object of manifests and evaluation.json."""
        return {"loader": None if self.loader is None else dict(self.loader), "warnings": list(self.warnings)}


def dump_warnings(
    known: Mapping[str, Any] | None, prompts: Iterable[_Proven], chosen: Collection[str] | None = None
) -> Iterator[str]:
    """Sentences about what a dump's own record casts doubt on.

    Args:
        known: the manifest's `proof`, from an untrusted file.
        prompts: the dump's prompts.
        chosen: names of those in use; None means all.
    """
    said = (known or {}).get("warnings")
    yield from (x for x in said if isinstance(x, str)) if isinstance(said, list) else ()
    for prompt in prompts:
        if prompt.proof is not None and (chosen is None or prompt.name in chosen):
            sentence = prompt.proof.warning(prompt.name)
            if sentence is not None:
                yield sentence


class _Proven(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def proof(self) -> PromptProof | None: ...


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
