"""Synthetic tasks in the manner of RULER (Hsieh et al., COLM 2024): written here, seeded, of an exact length.

Every task hides something in running text, or in a list of words, and asks for it at the end. What is hidden depends on
the seed and the sample's number alone: every length, depth and arm sees the same puzzles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anchorscope import names
from anchorscope.errors import InputError
from anchorscope.evaluation.text import Pieces, Prose, insert, word_lists, words_cut
from anchorscope.names import PERPLEXITY
from anchorscope.parse import check_word

LEAST_PROSE = 64  # tokens of text around the needles
SPARE = 8  # tokens a model may spend beyond the answer's own
QUERIED, HIDDEN = 2, 4  # needles asked for, and hidden
HOPS = 3  # assignments behind the first of a chain
COMMON, OFTEN = 3, 6  # words to find, and how often they come where the others come once
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

ADJECTIVES, NOUNS = word_lists()


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: the task's name.
        length: tokens of the prompt plus the room for the answer.
        depth: where the needle is, as a share of the text before it; None where that has no meaning.
        index: the sample's number.
        token_ids: the prompt, up to where the answer begins.
        answer_ids: the correct answer.
        expected: what a generated answer must contain, each string for an equal share of the score.
        budget: tokens that may be generated; len(token_ids) + budget = length.
    """

    task: str
    length: int
    depth: float | None
    index: int
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    expected: tuple[str, ...]
    budget: int

    @property
    def name(self) -> str:
        """Part of file names, and what progress shows."""
        where = "" if self.depth is None else f"-depth{self.depth:.4g}"
        return f"{self.task}-{self.length}{where}-sample{self.index:02d}"

    def score(self, answer: str) -> float:
        """Share of the expected strings found in a generated answer, letters of either case alike."""
        return sum(x.lower() in answer.lower() for x in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Puzzle:
    """What a task asks, as text: `needles` go into prose; with `words` a list of words stands in its place."""

    intro: str
    question: str
    lead: str
    answer: str
    expected: tuple[str, ...]
    needles: tuple[tuple[float, str], ...] = ()
    words: tuple[tuple[str, int], ...] = ()


def needle(rng: random.Random, depth: float | None) -> Puzzle:
    """One key and its value in a haystack."""
    (key,), (value,) = _keys(rng, 1), _numbers(rng, 1)
    return Puzzle(
        "The text below gives the secret number of a thing somewhere. Read the text and remember the number.\n\n",
        f"\n\nQuestion: What is the secret number of the {key}?\n",
        f"Answer: The secret number of the {key} is",
        f" {value}",
        (value,),
        ((0.5 if depth is None else depth, f" The secret number of the {key} is {value}."),),
    )


def multi_needle(rng: random.Random, _: float | None) -> Puzzle:
    """Several keys and values, one in each equal part of the haystack; some are asked for."""
    keys, values = _keys(rng, HIDDEN), _numbers(rng, HIDDEN)
    asked = sorted(rng.sample(range(HIDDEN), QUERIED))
    wanted = " and ".join(f"the {keys[i]}" for i in asked)
    return Puzzle(
        "The text below gives the secret numbers of some things. Read the text and remember the numbers.\n\n",
        f"\n\nQuestion: What are the secret numbers of {wanted}?\n",
        f"Answer: The secret numbers of {wanted} are, in this order:",
        " " + ", ".join(values[i] for i in asked),
        tuple(values[i] for i in asked),
        tuple(
            ((i + rng.random()) / HIDDEN, f" The secret number of the {keys[i]} is {values[i]}.") for i in range(HIDDEN)
        ),
    )


def variable_tracking(rng: random.Random, _: float | None) -> Puzzle:
    """A chain of assignments, mixed with another chain: which variables hold the value?"""
    names = ["".join(x) for x in zip(*(rng.sample(LETTERS, len(LETTERS)) for _ in range(3)), strict=True)]
    values = _numbers(rng, 2)
    chains = []
    for which, value in enumerate(values):
        chain = names[which * (HOPS + 1) : (which + 1) * (HOPS + 1)]
        sources = [value, *(f"the value of variable {x}" for x in chain)]
        notes = [f" Note: variable {x} is set to {source}." for x, source in zip(chain, sources, strict=False)]
        chains.append(list(zip(sorted(rng.random() for _ in chain), notes, strict=True)))
    wanted = names[: HOPS + 1]
    return Puzzle(
        "The text below contains notes that set variables. Read the text and keep track of their values.\n\n",
        f"\n\nQuestion: Which variables have the value {values[0]}?\n",
        f"Answer: The variables with the value {values[0]} are:",
        " " + ", ".join(wanted),
        tuple(wanted),
        tuple(chains[0] + chains[1]),
    )


def common_words(rng: random.Random, _: float | None) -> Puzzle:
    """A long list of words, a few of them several times as frequent as the others: which?"""
    pool = rng.sample(NOUNS, 60)
    common = pool[:COMMON]
    return Puzzle(
        "Below is a list of words. A few of them appear much more often than the others.\n\n",
        f"\n\nQuestion: Which {COMMON} words appear most often in the list?\n",
        f"Answer: The {COMMON} words that appear most often are:",
        " " + ", ".join(common),
        tuple(common),
        words=tuple((word, OFTEN if word in common else 1) for word in pool),
    )


TASKS: dict[str, Callable[[random.Random, float | None], Puzzle]] = dict(
    zip(names.TASKS, (needle, multi_needle, variable_tracking, common_words), strict=True)
)
BY_DEPTH = ("needle",)


def check_tasks(wanted: Sequence[str]) -> None:
    """Refuse a task that does not exist.

    Raises:
        InputError: and which ones do.
    """
    for name in wanted:
        check_word("--task", name, [*TASKS, PERPLEXITY])


def make_samples(
    pieces: Pieces,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> list[Sample]:
    """Every sample of the tasks (perplexity is none), by task, length, depth and number.

    Raises:
        InputError: a length too short for a task.
    """
    prose = Prose(pieces)
    return [
        make_sample(pieces, prose, task, length, depth, index, seed)
        for task in tasks
        if task != PERPLEXITY
        for length in lengths
        for depth in (depths if task in BY_DEPTH else (None,))
        for index in range(samples)
    ]


def make_sample(
    pieces: Pieces, prose: Prose, task: str, length: int, depth: float | None, index: int, seed: int
) -> Sample:
    """One sample of exactly `length` tokens, the answer's budget included.

    Raises:
        InputError: the length is too short for the task.
    """
    rng = random.Random(f"{seed}/{task}/{index}")
    first = rng.randrange(len(prose.sentences))
    puzzle = TASKS[task](rng, depth)
    head = [*pieces.opening, *pieces.encode(puzzle.intro)]
    tail = [*pieces.encode(puzzle.question), *pieces.closing, *pieces.encode(puzzle.lead)]
    answer = pieces.encode(puzzle.answer)
    budget = len(answer) + SPARE
    needles = [(where, pieces.encode(text)) for where, text in puzzle.needles]
    words = [
        ids for (_, count), ids in zip(puzzle.words, _encode_words(pieces, puzzle), strict=True) for _ in [0] * count
    ]
    fixed = len(head) + len(tail) + budget + sum(len(ids) for _, ids in needles)
    least = fixed + (sum(map(len, words)) or LEAST_PROSE)  # every word once at least
    if length < least:
        raise InputError(f"task {task} needs at least {least:,} tokens with this tokenizer, not {length:,}")
    if words:
        body = words_cut(lambda: rng.sample(words, len(words)), length - fixed)
    else:
        body = insert(*prose.cut(length - fixed, first), needles)
    ids = (*head, *body, *tail)
    return Sample(task, length, depth, index, ids, tuple(answer), puzzle.expected, budget)


def _encode_words(pieces: Pieces, puzzle: Puzzle) -> list[list[int]]:
    return pieces.encode_all([f" {word}" for word, _ in puzzle.words]) if puzzle.words else []


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)
    return [f"{adjective} {noun}" for adjective, noun in pairs]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(x) for x in rng.sample(range(100_000, 1_000_000), count)]
