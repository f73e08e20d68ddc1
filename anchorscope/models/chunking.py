"""These checks decide whether a prompt prefilled in chunks is the same as the prompt prefilled whole.

Three things can differ. Rotary embeddings may depend on the length (see `positions`). Recurrent layers and short
convolutions may drop their state between chunks. And a cache may return other keys and values than the layers put into
it. The first is tried at the prompt's real length, on the rotary modules alone. The second is tried on the prompt's
first tokens, cut as the real run cuts them: each module that receives the cache gets the inputs that it had in the
whole run, so that errors do not add up over the layers and no other expert is chosen, and its output may differ by the
dtype's rounding only; the queries, keys and values of the whole model are compared too. The third is watched during the
real run (`CacheWatch`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anchorscope.devices import is_out_of_memory
from anchorscope.errors import InputError, type_and_line
from anchorscope.models.calls import AttentionCall
from anchorscope.models.config import text_config
from anchorscope.models.hook import intercept
from anchorscope.models.language import language_only
from anchorscope.models.positions import TRIAL_TOKENS, Rotations
from anchorscope.models.prefill import Prefill, forwards, last_forward
from anchorscope.models.watch import filled, module_hooks
from anchorscope.shown import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = 11  # tokens of a chunk in the trial: more than a short convolution's kernel covers
PIECES = 4
LONG = 300  # tokens of a chunk in the longer trial of recurrent layers, whose scans take up to 256 tokens at a time
MOST_TOKENS, MOST_FORWARDS = 700, 64  # limits of one trial
# Largest relative difference per token of a module with the same inputs (in units of the dtype's epsilon), ...
ROUNDINGS = {torch.float64: 1 << 12, torch.float32: 1 << 8}
ROUNDINGS_16 = 4
# ... and of the whole model's queries, keys and values, where differences add up over the layers: relative. An expert
# may be chosen otherwise by rounding in 16-bit types, so the median over the tokens is compared there.
MODEL_TOLERANCE, MODEL_MEDIAN_16 = 1e-3, 0.1


def rotations(model: PreTrainedModel, token_ids: Sequence[int]) -> Rotations:
    """Find the rotary modules in a trial run of a few tokens."""
    ids = filled(token_ids, TRIAL_TOKENS)
    return Rotations(model, lambda: last_forward(model, ids), TRIAL_TOKENS)


def check_chunks(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    layers: Collection[int],
    prefills: Iterable[Prefill],
    advice: str = "; capture without --chunk",
) -> None:
    """Make sure that prompts prefilled in chunks are the same as prefilled whole.

    Args:
        model: the model.
        token_ids: some ids to try it with, best the longest prompt's.
        layers: the attention layers whose queries, keys and values are compared.
        prefills: the prefills that are to run.
        advice: the end of the sentence that refuses them.

    Raises:
        InputError: chunks give another result, or the model keeps no cache.
    """
    prefills = sorted({p for p in prefills if p.chunk < p.tokens}, key=lambda p: (p.tokens, p.chunk))
    if not prefills:
        return
    with explained(model, advice):
        check_rotations(model, token_ids, prefills)
        for sizes in _trials(prefills, *_kinds(model, token_ids)):
            check_sizes(model, token_ids, layers, sizes)


@contextmanager
def explained(model: PreTrainedModel, advice: str) -> Iterator[None]:
    """Turn whatever goes wrong in a trial, even inside the model's own code, into one sentence that ends with `advice`.

    Raises:
        InputError: a check failed, or the model did.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}{advice}") from None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        what = type_and_line(error, 200)
        raise InputError(f"{type(model).__name__} cannot run in chunks, its own code fails: {what}{advice}") from error


def _trials(prefills: Sequence[Prefill], recurrent: bool, window: int | None) -> list[tuple[int, ...]]:
    """Return the chunk sizes to try: short ones, long ones for recurrent layers, ones that cross the widest window."""
    trials = {p.small(SHORT, PIECES * SHORT) for p in prefills}
    if recurrent:
        trials |= {p.small(LONG, 2 * LONG) for p in prefills if p.chunk > SHORT}
    if window is not None and window + 2 * SHORT <= MOST_TOKENS:
        third = -(-(window + SHORT) // 3)
        trials |= {p.small(third, window + 2 * SHORT + third) for p in prefills}
    return sorted(t for t in trials if 1 < len(t) <= MOST_FORWARDS)


def check_rotations(model: PreTrainedModel, token_ids: Sequence[int], prefills: Sequence[Prefill]) -> None:
    """Make sure that chunks are rotated as in the whole prompt.

    Raises:
        InputError: a chunk is rotated otherwise.
    """
    found = rotations(model, token_ids)
    for p in prefills:
        if not found.same(p.tokens, p.stops):
            most = found.switch(p.tokens, p.chunk)
            raise InputError(
                f"{type(model).__name__} rotates the same positions otherwise once a prompt has more than"
                f" {counted(most, 'token')}"
                f" ({rope_types(model)}): the first of {counted(p.tokens, 'token')}, in chunks of {p.chunk},"
                f" would not be what"
                " they are in the whole prompt"
            )


def rope_types(model: PreTrainedModel) -> str:
    """Return the kinds of rope scaling that the configuration names, for messages."""
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    sets = [v for v in parameters.values() if isinstance(v, dict)] or [parameters]
    kinds = {str(x.get("rope_type", x.get("type", "default"))) for x in sets}
    return "rope type " + ", ".join(sorted(kinds - {"default"}) or ["default"])


# ----------------------------------------------------------------------------------------------------------------
# state


def _kinds(model: PreTrainedModel, token_ids: Sequence[int]) -> tuple[bool, int | None]:
    """Return whether some layers keep another state than keys and values, and the widest sliding window."""
    windows: list[int] = []
    attending: set[nn.Module] = set()

    def look(call: AttentionCall) -> None:
        attending.add(call.module)
        if call.window is not None:
            windows.append(call.window)

    ids = filled(token_ids, TRIAL_TOKENS)
    with intercept(model, language_only(model, look)):
        found = _keepers(model, ids, (TRIAL_TOKENS - 2, 2))
    return any(not attending & set(m.modules()) for m in found), max(windows, default=None)


def _keepers(model: PreTrainedModel, ids: Sequence[int], sizes: Sequence[int]) -> list[nn.Module]:
    """Return the innermost modules that receive a cache: attention, recurrences and convolutions."""
    holders: dict[nn.Module, None] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(_is_cache(x) for x in [*args, *kwargs.values()]):
            holders[module] = None

    with module_hooks(m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules()):
        last_forward(model, ids, sizes)
    return [m for m in holders if not any(part in holders for part in m.modules() if part is not m)]


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") or type(value).__name__.endswith("Cache")


@dataclass
class _Whole:
    """The inputs and outputs of a module in the whole run, call by call: tensors (B, N, *), inputs by argument."""

    inputs: list[dict[int | str, torch.Tensor]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


class _Compare:
    """These hooks record the whole run, and then run the chunks with the recorded inputs."""

    def __init__(self, modules: Sequence[nn.Module], tokens: int) -> None:
        self._names = {m: _Whole() for m in modules}
        self._tokens = tokens
        self._calls: dict[nn.Module, int] = {}
        self._span: tuple[int, int] | None = None  # the chunk's positions; None during the whole run
        self.errors: dict[nn.Module, torch.Tensor] = {m: torch.zeros(tokens) for m in modules}

    def begin(self, span: tuple[int, int]) -> None:
        """Say which positions the next chunk covers."""
        self._span = span
        self._calls.clear()

    def hooked(self) -> AbstractContextManager[None]:
        """Return a context in which the hooks are installed."""
        return module_hooks(
            hook
            for m in self._names
            for hook in (
                m.register_forward_pre_hook(self._before, with_kwargs=True),
                m.register_forward_hook(self._after),
            )
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = self._names[module]
        index = self._calls.get(module, 0)
        places: dict[int | str, Any] = dict(chain(enumerate(args), kwargs.items()))
        if self._span is None:
            seen.inputs.append({k: v.to("cpu", copy=True) for k, v in places.items() if _is_hidden(v, self._tokens)})
            return None
        start, stop = self._span
        if index < len(seen.inputs):
            for k, v in seen.inputs[index].items():
                if _is_hidden(places.get(k), stop - start):
                    places[k] = v[:, start:stop].to(places[k].device)
        return tuple(places[i] for i in range(len(args))), {k: places[k] for k in kwargs}

    def _after(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, (tuple, list)) else output
        seen = self._names[module]
        index = self._calls.get(module, 0)
        self._calls[module] = index + 1
        if self._span is None:
            seen.outputs.append(result.to("cpu", copy=True) if _is_hidden(result, self._tokens) else torch.empty(0))
            return
        start, stop = self._span
        if index < len(seen.outputs) and seen.outputs[index].numel() and _is_hidden(result, stop - start):
            whole = seen.outputs[index].float()
            # a token's output may be small by chance, while its rounding error is that of the terms it sums
            size = whole.norm(dim=-1)[0]
            size = size.clamp_min(float(size.median()))[start:stop].clamp_min(torch.finfo(torch.float32).tiny)
            error = (result.float().cpu() - whole[:, start:stop]).norm(dim=-1)[0] / size
            kept = self.errors[module]
            kept[start:stop] = torch.maximum(kept[start:stop], error.nan_to_num(nan=torch.inf))


def _is_hidden(value: Any, tokens: int) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[1] == tokens
    )


def check_sizes(
    model: PreTrainedModel, token_ids: Sequence[int], layers: Collection[int], sizes: Sequence[int]
) -> None:
    """Compare a prefill in chunks of these sizes with the whole prefill, on as many first tokens of the prompt.

    Raises:
        InputError: a module, or the whole model, gives another result, or keeps no cache.
    """
    total = sum(sizes)
    ids = filled(token_ids, total)
    compare = _Compare(_keepers(model, ids, sizes), total)
    with compare.hooked():
        whole = _projections(model, ids, layers, None)
    _check_model(model, whole, _projections(model, ids, layers, sizes), sizes)
    pieces = forwards(model, ids, sizes)
    with compare.hooked():
        for span in pairwise((0, *accumulate(sizes))):
            compare.begin(span)
            next(pieces)
    names = {m: name for name, m in model.named_modules()}
    for module, errors in compare.errors.items():
        if _is_layer(model, names[module]) and model.dtype.itemsize < 4:
            continue  # rounding may choose other experts in a whole layer
        worst = float(errors[sizes[0] :].max())
        if not worst <= ROUNDINGS.get(model.dtype, ROUNDINGS_16) * torch.finfo(model.dtype).eps:
            raise InputError(_refusal(model, f"the output of {type(module).__name__} {names[module]}", worst))


def _is_layer(model: PreTrainedModel, name: str) -> bool:
    """Return whether a module is a whole layer of the model."""
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.ModuleList)


def _projections(
    model: PreTrainedModel, ids: Sequence[int], layers: Collection[int], sizes: Sequence[int] | None
) -> dict[tuple[int, str], torch.Tensor]:
    """Return the queries, keys and values of the layers, each as (tokens, heads x d)."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        if call.layer is not None and call.layer in layers:
            n = call.q.shape[2]
            for name, x in (("queries", call.q), ("keys", call.k[:, :, -n:]), ("values", call.v[:, :, -n:])):
                seen.setdefault((call.layer, name), []).append(x[0].transpose(0, 1).flatten(1).float().cpu())

    with intercept(model, language_only(model, keep)):
        last_forward(model, ids, sizes)
    return {key: torch.cat(found) for key, found in seen.items()}


def _check_model(
    model: PreTrainedModel,
    whole: dict[tuple[int, str], torch.Tensor],
    parts: dict[tuple[int, str], torch.Tensor],
    sizes: Sequence[int],
) -> None:
    exact = model.dtype.itemsize >= 4
    for (layer, name), one in whole.items():
        two = parts.get((layer, name), torch.full_like(one, torch.nan))
        size = one.norm(dim=1)
        error = (two - one).norm(dim=1) / size.clamp_min(float(size.median()))
        error = error[sizes[0] :]
        found = float(error.max() if exact else error.median())
        if not found <= (MODEL_TOLERANCE if exact else MODEL_MEDIAN_16):
            raise InputError(_refusal(model, f"the {name} of layer {layer}", found))


def _refusal(model: PreTrainedModel, what: str, error: float) -> str:
    return (
        f"{type(model).__name__} computes something else in chunks, because its cache does not carry all of its state:"
        f" behind a boundary, {what} is off by {error:.2g} (relative)"
    )


# ----------------------------------------------------------------------------------------------------------------
# the real run


WATCHED = 4  # so many keys and values of each chunk must come back in later chunks


class CacheWatch:
    """This sink makes sure, during a prefill in chunks, that the cache returns what earlier chunks put into it.

    It keeps a few keys and values of every chunk. As long as the cache holds their positions, they must come back bit
    for bit: caches that quantize, shift or overwrite would change what attention sees.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        """Watch the given layers."""
        self._seen: dict[int, int] = dict.fromkeys(layers, 0)
        self._kept: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {layer: {} for layer in layers}

    def __call__(self, call: AttentionCall) -> None:
        """Compare one call's keys and values with those kept, and keep some of its own.

        Raises:
            InputError: an earlier key or value has changed, or is gone though the cache is long enough.
        """
        if call.layer not in self._seen:
            return
        n, held = call.q.shape[2], call.k.shape[2]
        end = self._seen[call.layer] + n
        first = end - held  # position of the first key
        kept = self._kept[call.layer]
        wrong = first < 0
        for position, tensors in list(kept.items()):
            if position < first:
                del kept[position]
                continue
            now = (call.k[0, :, position - first], call.v[0, :, position - first])
            wrong = wrong or not all(torch.equal(a.cpu(), b) for a, b in zip(now, tensors, strict=True))
        if wrong:
            raise InputError(
                f"the cache of {call.name} does not give back the keys and values of earlier chunks:"
                " capture without --chunk"
            )
        for position in {end - 1, end - n, *range(end - n, end, max(1, n // WATCHED))}:
            at = position - first
            kept[position] = (call.k[0, :, at].cpu().clone(), call.v[0, :, at].cpu().clone())
        self._seen[call.layer] = end
