"""In what pieces `evaluate` runs prompts and answers, and whether that changes what the model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from anchorscope.errors import InputError
from anchorscope.evaluation.lanes import Arm, group_multiple, spans
from anchorscope.evaluation.tasks import Sample
from anchorscope.models import LoadedModel
from anchorscope.models.chunking import SHORT, check_chunks, check_sizes, explained, rope_types, rotations
from anchorscope.models.prefill import Prefill
from anchorscope.parse import describe_indices

CHUNK = 2048


@dataclass(frozen=True)
class Chunking:
    """Tokens prefilled at a time.

    Attributes:
        prompts, tasks: the chunk of each kind of work; None where it runs whole.
        stepwise: answers are decoded one token at a time, since several at once give something else.
    """

    prompts: int | None
    tasks: int | None
    stepwise: bool = False


def choose_chunks(
    loaded: LoadedModel,
    layers: Collection[int],
    sliding: Collection[int],
    arms: Sequence[Arm],
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    chunk: int | None,
    tell: Callable[[str], None],
) -> Chunking:
    """The chunks of prompts and of tasks: as asked for where that changes nothing, else whole.

    Chunks are multiples of every layer's groups, which then stay in place.

    Args:
        loaded: the model.
        layers: its attention layers.
        sliding: those with a sliding window.
        arms: the sparse arms.
        prompts: token ids of the prompts.
        samples: the tasks' questions.
        chunk: tokens asked for, or None for the default.
        tell: told what is not as asked for.

    Raises:
        InputError: the model cannot decode the answers.
    """
    multiple = group_multiple(arms)
    sizes = [None if x is None else math.ceil(x / multiple) * multiple for x in (chunk or CHUNK, chunk)]
    work: dict[str, list[Sequence[int]]] = {"prompts": list(prompts), "tasks": [s.token_ids for s in samples]}
    chosen = [
        _carried(loaded, layers, what, size, ids, tell) for size, (what, ids) in zip(sizes, work.items(), strict=True)
    ]
    cut = any(s is not None and s < len(x) for s, ids in zip(chosen, work.values(), strict=True) for x in ids)
    named = {x.layer for arm in arms if arm.config is not None for x in arm.config.layers}
    if cut and (windowed := sorted(named & set(sliding))):
        tell(
            f"warning: layers {describe_indices(windowed)} have sliding windows, and run dense after the first chunk;"
            " --chunk as long as the prompts runs them sparse"
        )
    if cut and sizes[0] != (chunk or CHUNK):
        tell(f"chunks of {sizes[0]:,} tokens instead of {chunk or CHUNK:,}: multiples of every layer's groups")
    stepwise = bool(samples) and _stepwise(loaded, layers, samples, tell)
    return Chunking(chosen[0], chosen[1], stepwise)


def _carried(
    loaded: LoadedModel,
    layers: Collection[int],
    what: str,
    size: int | None,
    ids: Sequence[Sequence[int]],
    tell: Callable[[str], None],
) -> int | None:
    """The size, or None if the model would compute something else in pieces of it."""
    cut = sorted((x for x in ids if size is not None and size < len(x)), key=len)
    if size is None or not cut:
        return size
    prefills = {Prefill(len(x), size, tuple(b for _, b in spans(len(x), size))) for x in cut}
    try:
        check_chunks(loaded.model, cut[-1], layers, prefills, advice="")
    except InputError as error:
        tell(f"{loaded.name} cannot prefill in chunks: {what} run whole ({error})")
        return None
    return size


def _stepwise(
    loaded: LoadedModel, layers: Collection[int], samples: Sequence[Sample], tell: Callable[[str], None]
) -> bool:
    """Whether answers must be decoded token by token.

    Raises:
        InputError: even then they would not be what one forward over prompt and answer gives.
    """
    ids = max((s.token_ids for s in samples), key=len)
    longest = max(len(s.answer_ids) for s in samples)
    with explained(loaded.model, ""):
        grows = _grows(loaded, samples)
    if grows:
        tell(
            f"warning: {loaded.name} rotates answers by the length so far ({rope_types(loaded.model)}) and their"
            " prompts by the prompt's, as `generate` does; one forward over both would give other scores"
        )
    prompt = min(SHORT, len(ids))
    try:
        with explained(loaded.model, ""):
            check_sizes(loaded.model, ids, layers, (prompt, 1, 1, 1))
    except InputError as error:
        raise InputError(f"{loaded.name} cannot decode answers: {error}; leave out the tasks") from None
    if grows or longest < 3:  # an answer's last token is not fed, and one alone is a step
        return grows
    try:
        with explained(loaded.model, ""):
            check_sizes(loaded.model, ids, layers, (prompt, min(longest - 1, SHORT)))
    except InputError:
        return True
    return False


def _grows(loaded: LoadedModel, samples: Sequence[Sample]) -> bool:
    """Whether rotations change with every token of an answer.

    Raises:
        InputError: they change once, at a length that an answer crosses.
    """
    found = rotations(loaded.model, samples[0].token_ids)
    grows = False
    for first, last in sorted({(len(s.token_ids), s.length) for s in samples}):
        if found.same(last, (first, last)):
            continue
        if found.same(last, (last - 1, last)):
            raise InputError(
                f"answers at length {last:,} cross the length of {found.switch(last, first):,} tokens at which"
                f" {loaded.name} rotates positions otherwise ({rope_types(loaded.model)}): choose other --lengths"
            )
        grows = True
    return grows
