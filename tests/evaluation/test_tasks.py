"""Task generators: exact lengths, the same puzzle everywhere, needles at their depth, answers that the text gives."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from anchorscope.errors import InputError
from anchorscope.evaluation.tasks import TASKS, check_tasks, make_samples
from anchorscope.evaluation.text import Pieces, Prose, insert, own_text
from anchorscope.models import LoadedModel

LENGTH = 1600


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return Pieces(LoadedModel(None, tokenizer, "tiny", None))


def one(pieces, task, length=LENGTH, depth=0.5, samples=1, seed=0):
    return make_samples(pieces, [task], [length], [depth], samples, seed)[-1]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_exact_length(tokenizer, task, chat):
    pieces = Pieces(LoadedModel(None, tokenizer, "tiny", None), chat=chat)
    for length in (1200, 1201, 1999, 120_000):
        sample = one(pieces, task, length)
        assert len(sample.token_ids) + sample.budget == length
        assert sample.budget == len(sample.answer_ids) + 8
        text = pieces.decode(sample.token_ids)
        assert text.startswith("<|user|>") == chat
        assert ("<|end|><|assistant|>Answer:" in text) == chat
        assert (sample.token_ids[0] == 0) != chat  # the tokenizer's own beginning, or the template's


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_samples(pieces, task):
    assert make_samples(pieces, [task], [LENGTH], [0, 1], 2, 3) == make_samples(pieces, [task], [LENGTH], [0, 1], 2, 3)
    expected = {one(pieces, task, samples=n, seed=seed).expected for n in (1, 2) for seed in (0, 1)}
    assert len(expected) == 4


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_a_needle_lies_at_its_depth(pieces, depth):
    sample = one(pieces, "needle", depth=depth)
    text = pieces.decode(sample.token_ids)
    body = text[text.index("\n\n") + 2 : text.rindex("\n\nQuestion:")]
    found = re.search(r" The secret number of the \w+ \w+ is \d{6}\.", body)
    around = len(body) - len(found[0])
    assert found.start() / around == pytest.approx(depth, abs=0.13)  # a sentence of the text is up to 200 bytes long
    if depth in (0.0, 1.0):
        assert found.start() == depth * around
    before = body[: found.start()].rstrip("'\")")
    assert not before or before[-1] in ".!?" or depth == 1.0


def test_the_puzzle_does_not_depend_on_depth_or_length(pieces):
    assert one(pieces, "needle", length=2000).expected == one(pieces, "needle").expected
    shallow, deep = (one(pieces, "needle", depth=d) for d in (0, 1))
    assert shallow.expected == deep.expected
    texts = [
        re.sub(r" The secret number of the \w+ \w+ is \d{6}\.", "", pieces.decode(s.token_ids)) for s in (shallow, deep)
    ]
    assert texts[0] == texts[1]


def test_needles_tell_the_answers(pieces):
    for task, count in (("needle", 1), ("multi-needle", 2)):
        sample = one(pieces, task)
        text = pieces.decode(sample.token_ids)
        hidden = dict(re.findall(r"The secret number of the (\w+ \w+) is (\d{6})\.", text))
        question = re.search(r"Question: .*\n", text)[0]
        asked = re.findall(r"the (\w+ \w+)(?: and|\?)", question)
        assert tuple(hidden[key] for key in asked) == sample.expected
        assert len(asked) == count
        assert len(hidden) == (1 if count == 1 else 4)


def test_chains_tell_the_answers(pieces):
    sample = one(pieces, "variable-tracking")
    text = pieces.decode(sample.token_ids)
    values: dict[str, str] = {}
    for name, _, source in re.findall(r"variable (\w+) is set to (the value of variable )?(\w+)\.", text):
        values[name] = values.get(source, source)
    wanted = re.search(r"have the value (\d+)\?", text)[1]
    assert {name for name, value in values.items() if value == wanted} == set(sample.expected)
    assert len(values) == 8
    assert len(sample.expected) == 4


def test_counting_words_tells_the_answers(pieces):
    sample = one(pieces, "common-words", length=4000)
    text = pieces.decode(sample.token_ids)
    words = Counter(text[text.index("\n\n") : text.rindex("\n\nQuestion")].split()).most_common(4)
    assert {word for word, _ in words[:3]} == set(sample.expected)
    assert words[2][1] > 2 * words[3][1]


def test_the_answer_is_what_is_expected(pieces):
    for task in TASKS:
        sample = one(pieces, task)
        answer = pieces.decode(sample.answer_ids)
        assert sample.score(answer) == 1
        assert sample.score(answer.upper()) == 1
        assert sample.score("nothing of it") == 0
        assert sample.score(sample.expected[0]) == 1 / len(sample.expected)


def test_too_short(pieces):
    for task in TASKS:
        with pytest.raises(InputError, match=f"task {task} needs at least [0-9,]+ tokens") as error:
            one(pieces, task, length=200)
        least = int(re.search(r"least ([0-9,]+)", str(error.value))[1].replace(",", ""))
        assert len(one(pieces, task, length=least).token_ids) < least


def test_unknown_task():
    with pytest.raises(InputError, match=r"task 'haystack' is unknown; use needle, .* or perplexity"):
        check_tasks(["needle", "haystack"])


def test_prose_goes_on_from_its_start(pieces):
    prose = Prose(pieces)
    whole = [i for sentence in prose.sentences for i in sentence]
    assert pieces.decode(whole) == own_text()
    ids, starts = prose.cut(len(whole) + 500, 0)
    assert ids[: len(whole)] == whole
    assert ids[len(whole) :] == whole[:500]
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    last = prose.sentences[-1]
    assert prose.cut(len(last) + 9, len(prose.sentences) - 1)[0] == last + whole[:9]


def test_insert_keeps_the_order_of_the_text():
    assert insert([1, 2, 3, 4], [0, 2, 4], [(1.0, [9]), (0.0, [7]), (0.45, [8])]) == [7, 1, 2, 8, 3, 4, 9]


def test_no_tokenizer_and_no_template(tokenizer):
    with pytest.raises(InputError, match="brings no tokenizer"):
        Pieces(LoadedModel(None, None, "tiny", None))
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        Pieces(LoadedModel(None, plain, "tiny", None), chat=True)
    plain.chat_template = "always the same"
    with pytest.raises(InputError, match="does not show"):
        Pieces(LoadedModel(None, plain, "tiny", None), chat=True)
