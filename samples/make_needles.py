"""Write prompts/needles.txt: a long chronicle with facts hidden in it and questions about them at the end.

Many-needle retrieval: each needle is one sentence that gives a number to a place, spread evenly over the text with the
same amount of filler between them; the questions ask for all of them in another order, so that the last queries of the
prompt must look all over it. A short review after every few needles asks for some of the earlier ones, so that a prompt
cut to fewer tokens still retrieves. Standard library only. The same arguments give the same bytes on every platform and Python
version, because the generator below is our own and not `random`.

    python samples/make_needles.py                      # rewrites samples/prompts/needles.txt
    python samples/make_needles.py --needles 8 --bytes 20000 --seed 3 --out mine.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

NEEDLES, BYTES, SEED = 32, 48_000, 20_251
REVIEW_EVERY, REVIEW_QUESTIONS = 6, 3

COLOURS = "amber azure brass coral ebony green grey indigo ivory jade ochre pearl red silver violet white".split()
PLACES = "archive bakery boathouse chapel foundry granary lighthouse mill observatory orchard quarry signal-tower".split()
NAMES = "Ada Bertil Cosima Dragan Elke Farid Greta Hamid Ines Jonas Katya Luis Mira Noor Olav Pilar Rosa Sven".split()
TRADES = "baker carpenter cooper ferrywoman gardener glazier joiner mason miller potter printer surveyor weaver".split()
GOODS = "barley candles chalk copper cordage flour glass honey ink lamp-oil linen paper salt slate timber wool".split()
WEATHER = "a cold drizzle|a dry east wind|bright sun|fog until noon|heavy rain|high cloud|light snow|still air".split("|")
TIMES = "before dawn|at sunrise|towards noon|in the afternoon|at dusk|after dark|late at night".split("|")
ROADS = "the coast road|the lower bridge|the market steps|the north quay|the old canal|the ridge path".split("|")
MOODS = "curious glad impatient patient puzzled quiet relieved tired uneasy willing".split()
VERBS = "bargained for|carried|counted|delivered|lost|mended a cart for|packed|sent for|stored|weighed".split("|")


class Stream:
    """Deterministic choices: a 64-bit linear congruential generator (Knuth's MMIX constants), high bits used."""

    def __init__(self, seed: int) -> None:
        self.state = seed
        self.below(2)

    def below(self, n: int) -> int:
        """Whole number in [0, n)."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) * n >> 31

    def pick(self, items: list[str]) -> str:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: list) -> list:
        """The items in another order (Fisher-Yates)."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


def sentence(s: Stream) -> str:
    """One sentence of filler. It holds no place of a needle and no code, so it can never answer a question."""
    who, other = s.shuffled(NAMES)[:2]
    many = s.below(80) + 12
    forms = [
        f"{who} the {s.pick(TRADES)} {s.pick(VERBS)} {many} crates of {s.pick(GOODS)} {s.pick(TIMES)}.",
        f"There was {s.pick(WEATHER)} over {s.pick(ROADS)}, and {who} went home {s.pick(TIMES)}.",
        f"{who} asked {other} whether the {s.pick(GOODS)} had come by {s.pick(ROADS)} or by boat.",
        f"{other} was {s.pick(MOODS)} about it, but {who}, the {s.pick(TRADES)}, was only {s.pick(MOODS)}.",
        f"Nobody remembered who had promised {other} the {s.pick(GOODS)}, so {who} paid for {many} sacks.",
        f"On {s.pick(ROADS)} a {s.pick(TRADES)} was selling {s.pick(GOODS)} and asking for news of {other}.",
        f"{who} wrote in the margin that {s.pick(GOODS)} and {s.pick(GOODS)} should never share a cellar.",
        f"The {s.pick(TRADES)} said that {s.pick(WEATHER)} was a bad sign; {who} did not agree.",
        f"It took {many} minutes to walk from {s.pick(ROADS)} to the square, and {other} was {s.pick(MOODS)}.",
        f"{who} and {other} spoke of {s.pick(GOODS)} {s.pick(TIMES)}, and the {s.pick(TRADES)} listened.",
    ]
    return forms[s.below(len(forms))]


def paragraph(s: Stream, day: int) -> str:
    """Four to seven sentences of filler under a day number."""
    return f"Day {day}. " + " ".join(sentence(s) for _ in range(4 + s.below(4)))


def question(number: int, place: str, code: str | None) -> str:
    """A numbered question and its answer; the answer is left open when `code` is None."""
    return f"Question {number}: What is the door code of the {place}?\nAnswer:" + (f" {code}" if code else "")


def make(needles: int = NEEDLES, size: int = BYTES, seed: int = SEED) -> str:
    """The whole prompt, ASCII.

    Args:
        needles: hidden facts, at most one per colour and place.
        size: bytes to reach with filler; the result is longer by up to one paragraph.
        seed: any whole number.

    Raises:
        ValueError: more needles than colours times places, fewer than 2, or no room for filler between them.
    """
    places = [f"{colour} {place}" for colour in COLOURS for place in PLACES]
    if not 2 <= needles <= len(places):
        raise ValueError(f"needles must be from 2 to {len(places)}, not {needles}")
    s = Stream(seed)
    facts = [(place, f"{s.below(900) + 100}-{s.below(900) + 100}") for place in s.shuffled(places)[:needles]]
    asked = s.shuffled(facts)
    head = (
        "This is the chronicle of a small harbour town. Some of its days name the door code of a place.\n"
        "Read all of it and answer the questions.\n"
    )
    # The last question is left open: what the model would write next is its answer.
    tail = "Questions\n\n" + "\n".join(
        question(i, place, code if i < needles else None) for i, (place, code) in enumerate(asked, 1)
    )
    room = size - len(head) - len(tail)
    if room < 600 * needles:
        raise ValueError(f"{size} bytes leave no filler between {needles} needles: ask for fewer or for more bytes")
    days: list[str] = []
    length = hidden = 0
    while length < room or hidden < needles:
        day = paragraph(s, len(days) + 1)
        if hidden < needles and length >= (hidden + 0.5) * room / needles:
            place, code = facts[hidden]
            day += f" Let it be remembered that the door code of the {place} is {code}."
            hidden += 1
            if hidden % REVIEW_EVERY == 0:
                recalled = s.shuffled(facts[:hidden])[:REVIEW_QUESTIONS]
                day += "\n\nReview\n\n" + "\n".join(question(i, *fact) for i, fact in enumerate(recalled, 1))
        days.append(day)
        length += len(day) + 2
    return head + "\n" + "\n\n".join(days) + "\n\n" + tail + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a many-needle retrieval prompt.")
    parser.add_argument("--needles", type=int, default=NEEDLES, help=f"hidden facts ({NEEDLES})")
    parser.add_argument("--bytes", type=int, default=BYTES, help=f"size of the prompt ({BYTES})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"({SEED})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prompts" / "needles.txt")
    args = parser.parse_args()
    try:
        text = make(args.needles, args.bytes, args.seed)
    except ValueError as error:
        parser.error(str(error))
    args.out.write_bytes(text.encode("ascii"))


if __name__ == "__main__":
    main()
