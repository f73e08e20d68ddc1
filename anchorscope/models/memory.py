"""`forecast` estimates how much memory a prefill will take, before it is run.

Small runs are watched operation by operation: the bytes of live tensors after each one. Every operation allocates a
polynomial of the prompt's length (quadratic at most: masks, eager scores), and runs of different lengths make the same
operations in the same order; so each operation's line is extended to the real length on its own, and the largest is the
answer. Extending the peak alone would miss that another operation may be the largest there.
"""

from __future__ import annotations

import bisect
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anchorscope.devices import is_out_of_memory
from anchorscope.errors import AnchorScopeError
from anchorscope.files import human_bytes
from anchorscope.models.placement import model_device
from anchorscope.models.prefill import keeps_few_rows, prefill, prefill_module
from anchorscope.models.watch import filled, module_hooks
from anchorscope.proof import SCORED
from anchorscope.shown import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (64, 128, 256)  # tokens of a chunk in the small runs
ROWS = 16  # tokens of the runs that tell what a row of logits takes


class LiveBytes(TorchDispatchMode):
    """This mode counts the bytes of the tensors that are made inside the context and are still alive.

    Attributes:
        events: the bytes alive after each operation that made a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # a composite operation is watched at the operations that it consists of
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        # the arguments existed before, so they do not count: weights and inputs
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = False
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if id(storage) not in before and storage not in self._known:
                    self._known.add(storage)
                    size = storage.nbytes()
                    self._now += size
                    weakref.finalize(storage, self._free, size)
                    made = True
        if made:
            self.events.append(self._now)
        return result

    def _free(self, size: int) -> None:
        self._now -= size


@dataclass(frozen=True)
class MemoryCurve:
    """The peak bytes of a prefill against its length.

    Attributes:
        lengths: (r,) lengths that were run, in the unit the operations are polynomials of.
        points: (r, e) bytes alive after each operation of those runs.
        unit: the length in that unit that one token of the prompt adds.
        tokens: the prompt length N that the curve was made for.
        tail: bytes that the last operation needs beside those, whatever the length.
    """

    lengths: np.ndarray
    points: np.ndarray
    unit: float
    tokens: int
    tail: int = 0

    def bytes(self, tokens: int) -> int:
        """Return the peak bytes beyond the weights, KV cache included, for up to the curve's `tokens`."""
        x = tokens * self.unit
        value = np.zeros(self.points.shape[1])
        for i in range(len(self.lengths)):  # the polynomial through each operation's points, in Lagrange's form
            others = np.delete(self.lengths, i)
            value += self.points[i] * float(np.prod((x - others) / (self.lengths[i] - others)))
        value[-1] += self.tail
        return max(0, int(value.max()))

    def fitting(self, budget: float) -> int:
        """Return the most tokens, up to the length the curve was made for, that take at most `budget` bytes."""
        return bisect.bisect_right(range(1, self.tokens + 1), budget, key=self.bytes)


def prefill_curve(model: PreTrainedModel, token_ids: Sequence[int], tokens: int, chunk: int | None) -> MemoryCurve:
    """Learn how much memory a prefill of up to `tokens` tokens allocates, from runs of a few hundred.

    Args:
        model: the model.
        token_ids: some ids to run; repeated where more are needed.
        tokens: the prompt length N.
        chunk: tokens prefilled at a time, or None. Of more than three chunks, three of the real size are run.
    """

    def watch(count: int, piece: int | None) -> list[list[int]]:
        ids = filled(token_ids, count)
        return _watch_pieces(model, lambda: prefill(model, ids, chunk=piece))

    if chunk is not None and 3 * chunk < tokens:
        # only the cache grows from chunk to chunk, and everything else grows linearly with it
        return _curve([2 * chunk, 3 * chunk], watch(3 * chunk, chunk)[1:], 1.0, tokens)
    size = tokens if chunk is None else min(chunk, tokens)
    if size <= LENGTHS[-1]:
        return _curve([size], [list(chain(*watch(tokens, chunk)))], size / tokens, tokens)
    # the small runs have as many chunks, all smaller by the same factor
    runs = [list(chain(*watch(max(small, round(small * tokens / size)), small))) for small in LENGTHS]
    return _curve(LENGTHS, runs, size / tokens, tokens)


def logits_bytes(model: PreTrainedModel, token_ids: Sequence[int], rows: int) -> int:
    """Return the most bytes that the logits of `rows` positions take beyond those of a single position.

    Runs of a few tokens tell what each operation makes for one more position, so a cap on the logits counts too.

    Args:
        model: a model whose forward takes `logits_to_keep`.
        token_ids: some ids to run; repeated where more are needed.
        rows: the number of positions.
    """
    ids = filled(token_ids, ROWS)
    inputs = torch.tensor([ids], dtype=torch.long, device=model_device(model))

    def watch(keep: int) -> np.ndarray:
        with torch.inference_mode():
            events = _watch_pieces(model, lambda: model(input_ids=inputs, use_cache=False, logits_to_keep=keep))
        return np.array(list(chain(*events)))

    one, many = watch(1), watch(ROWS)
    # where experts make the number of operations differ, the peaks are compared
    more = (many - one).max() if len(one) == len(many) else many.max() - one.max()
    return int(max(0, more) / (ROWS - 1) * (rows - 1))


def _curve(lengths: Sequence[int], runs: Sequence[Sequence[int]], unit: float, tokens: int) -> MemoryCurve:
    """Line the runs' operations up. Where experts make their numbers differ, only the peaks are compared."""
    same = len({len(run) for run in runs}) == 1
    points = [list(run) if same else [max(run)] for run in runs]
    return MemoryCurve(np.array(lengths, dtype=float), np.array(points, dtype=float), unit, tokens)


def _watch_pieces(model: PreTrainedModel, run: Callable[[], Any]) -> list[list[int]]:
    """Return the events of each chunk of a prefill."""
    starts: list[int] = []
    with LiveBytes() as live:
        hook = prefill_module(model).register_forward_pre_hook(lambda *_: starts.append(len(live.events)))
        with module_hooks([hook]):
            run()
    bounds = [0, *starts[1:], len(live.events)]
    return [live.events[a:b] for a, b in pairwise(bounds)]


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers; shared ones count once."""
    storages = {id(s): s.nbytes() for s in (x.untyped_storage() for x in [*model.parameters(), *model.buffers()])}
    return sum(storages.values())


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device now, or None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class Forecast:
    """The memory that a prefill will take on its device, known before it starts.

    Attributes:
        curve: the prefill's peak against its length, made for the longest prompt.
        weights: bytes of the model's weights.
        free: bytes that are free on the device, or None where the system does not say.
        chunk: tokens prefilled at a time, or None for the whole prompt.
    """

    curve: MemoryCurve
    weights: int
    free: int | None
    chunk: int | None

    @property
    def needed(self) -> int:
        """Return the bytes that the longest prompt's prefill takes beyond the weights."""
        return self.curve.bytes(self.curve.tokens)

    def sentences(self) -> Iterator[str]:
        """Yield what the user should know before the run."""
        yield (
            f"memory: {human_bytes(self.weights)} of weights and about {human_bytes(self.needed)} for the prefill of"
            f" {self.curve.tokens} tokens"
        )
        if self.free is not None and self.needed > self.free:
            yield f"warning: only {human_bytes(self.free)} of memory are free: {self.advice()}"

    def advice(self) -> str:
        """Say what would fit, by the same estimate."""
        fits = 0 if self.free is None else self.curve.fitting(0.9 * self.free)
        how = f"in chunks of {self.chunk}" if self.chunk else "in one piece"
        smaller = f"a --chunk below {self.chunk}" if self.chunk else "--chunk 2048 (the prompt in pieces)"
        if fits >= self.curve.tokens or fits < 2:
            return f"try {smaller}, fewer --tokens, or --model-dtype bf16"
        return f"about {counted(fits, 'token')} fit {how}; try {smaller}, --tokens {fits}, or --model-dtype bf16"


def forecast(
    model: PreTrainedModel, token_ids: Sequence[int], chunk: int | None, tell: Callable[[str], None]
) -> Forecast | None:
    """Estimate what the prefill of a prompt will take, and say so. Return None where it cannot be known.

    Args:
        model: the model, loaded.
        token_ids: the longest prompt.
        chunk: tokens prefilled at a time, or None for the whole prompt.
        tell: receives the estimate, and a warning where less is free.
    """
    free = free_bytes(model_device(model))
    try:
        curve = prefill_curve(model, token_ids, len(token_ids), chunk)
        if keeps_few_rows(model):
            rows = min(SCORED + 1, len(token_ids), chunk or len(token_ids))
            curve = replace(curve, tail=logits_bytes(model, token_ids, rows))
    except Exception as error:  # tensors of any kind pass by; an estimate must not stop a capture, and that is said
        if isinstance(error, AnchorScopeError) or is_out_of_memory(error):
            raise
        tell(f"memory: unknown, the model's operations could not be watched ({type(error).__name__})")
        return None
    found = Forecast(curve, weight_bytes(model), free, chunk)
    for sentence in found.sentences():
        tell(sentence)
    return found


def out_of_memory(error: BaseException, known: Forecast | None) -> str:
    """Return the sentence for a prefill that ran out of memory, with what would fit."""
    what = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else "out of memory"
    if known is None:
        return f"{what} before the prefill began: use --model-dtype bf16, a smaller --chunk or a smaller model"
    return f"{what}: the prefill needs about {human_bytes(known.needed)} beyond the weights; {known.advice()}"
