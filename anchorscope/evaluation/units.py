"""What `evaluate` runs: prompts cut to a length, and questions of tasks, each in all arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from anchorscope.errors import InputError
from anchorscope.evaluation.tasks import Sample
from anchorscope.models import LoadedModel, PromptInput
from anchorscope.models.positions import Positions
from anchorscope.models.prompts import tokenize
from anchorscope.shown import counted

PROMPTS, TASKS = "prompts", "tasks"  # the kinds of work


@dataclass(frozen=True)
class LongPrompt:
    """The first `length` tokens of a prompt."""

    prompt: str
    length: int
    token_ids: tuple[int, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """What progress shows."""
        return f"{self.prompt}, {self.length:,}"


@dataclass(frozen=True)
class EvaluationUnit:
    """A prompt at a length, or a sample of a task, in all arms; see `anchorscope.runs.units.Unit`.

    Attributes:
        index: its place in the run.
        content: the prompt or the sample.
        arms: how many arms run it, the dense one included.
    """

    index: int
    content: LongPrompt | Sample
    arms: int

    @property
    def kind(self) -> str:
        """Which chunks and measurements the settings choose for it: "prompts" or "tasks"."""
        return TASKS if isinstance(self.content, Sample) else PROMPTS

    @property
    def stem(self) -> str:
        return f"{self.index:05d}"

    @property
    def work(self) -> int:
        """Tokens to prefill."""
        return len(self.content.token_ids) * self.arms

    @property
    def label(self) -> str:
        return self.content.name


def check_length(name: str, length: int, positions: Positions, tell: Callable[[str], None]) -> None:
    """Refuse a length that the model cannot run, and warn of one that it is not made for.

    Raises:
        InputError: it is beyond the model's positions.
    """
    if positions.limit is not None and length > positions.limit:
        raise InputError(f"length {length:,} is beyond {name}'s positions: at most {positions.limit:,} tokens")
    if positions.trained is not None and length > positions.trained:
        tell(
            f"warning: length {length:,} is beyond the {positions.trained:,} tokens that {name} is made for: its"
            " positions reach further, but what it does there may be poor"
        )


def cut_prompt(
    loaded: LoadedModel,
    prompt: PromptInput,
    lengths: Sequence[int] | None,
    positions: Positions,
    tell: Callable[[str], None],
) -> list[LongPrompt]:
    """A prompt at each length, or whole.

    Raises:
        InputError: it is shorter than a length, or cannot be tokenized.
    """
    ready = tokenize(
        prompt,
        loaded.tokenizer,
        tokens=None,
        positions=None if lengths else positions,
        vocabulary=getattr(loaded.model.get_input_embeddings(), "num_embeddings", None),
        notify=tell,
    )
    found = len(ready.token_ids)
    for length in lengths or ():
        if length > found:
            raise InputError(
                f"prompt {prompt.name} has {counted(found, 'token')}, fewer than the length {length:,}: lower --lengths"
            )
    return [LongPrompt(prompt.name, n, ready.token_ids[:n]) for n in lengths or (found,)]
