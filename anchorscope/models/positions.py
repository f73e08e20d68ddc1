"""This module finds how many positions a model has, and whether the length of its input changes its rotary embedding.

Some rotary embeddings depend on the length: longrope has one set of frequencies up to the original length and another
beyond it, dynamic NTK scaling has a set for every length beyond it. Keys that a cache holds keep the rotation of the
length at which they were made, so a prompt prefilled in chunks is then not the same prompt prefilled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anchorscope.errors import InputError
from anchorscope.models.config import text_config
from anchorscope.models.watch import module_hooks
from anchorscope.shown import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TRIAL_TOKENS = 5
MOST_PIECES = 512  # so many chunks of a longer series are compared
STRETCHING = ("linear", "dynamic", "yarn")  # their factor multiplies the length that the model was trained at
TABLES = {"pos", "position", "positions", "positional", "wpe"}  # words in the names of tables with a row per position
MASKS = {"bias", "mask"}  # words in the names of square causal masks


@dataclass(frozen=True)
class Positions:
    """The prompt lengths that a model is made for.

    Attributes:
        limit: the most tokens that the model can run at all, or None. Tables of learned or precomputed positions have
            a limit.
        trained: the most tokens that the model is made for, or None. Rotary models run beyond it, but get worse.
    """

    limit: int | None
    trained: int | None

    def check(self, name: str, tokens: int, tell: Callable[[str], None], option: str = "--tokens") -> None:
        """Refuse a prompt that the model cannot run, and warn of one that it is not made for.

        Args:
            name: the prompt's name, for the sentence.
            tokens: the prompt's length.
            tell: receives the warning.
            option: the option that shortens the prompt.

        Raises:
            InputError: it is longer than `limit`.
        """
        if self.limit is not None and tokens > self.limit:
            raise InputError(
                f"prompt {name} has {counted(tokens, 'token')} and the model {counted(self.limit, 'position')}:"
                f" give {option} {self.limit}"
            )
        if self.trained is not None and tokens > self.trained:
            tell(
                f"warning: prompt {name} has {counted(tokens, 'token')} and the model is made for"
                f" {self.trained}: its positions"
                " reach further, but what it does there may be poor"
            )


NO_LIMIT = Positions(None, None)


def model_positions(model: PreTrainedModel) -> Positions:
    """Read the lengths that a model is made for from its configuration and its tables of positions."""
    config = text_config(model)
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or isinstance(stated, bool) or stated <= 0:
        return NO_LIMIT
    if _has_table(model, stated):
        return Positions(stated, stated)
    return Positions(None, _trained(config, stated))


def _trained(config: PretrainedConfig, stated: int) -> int:
    """Return the stated length, or the original length times the scaling factor if that is more."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return stated
    layered = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
    # layers with a window see no distance beyond it: the others decide
    entries = [v for k, v in layered.items() if "sliding" not in k and "local" not in k] or list(layered.values())
    return min((_stretched(entry, stated, bool(layered)) for entry in entries or [parameters]), default=stated)


def _stretched(parameters: Mapping[str, Any], stated: int, layered: bool) -> int:
    kind = parameters.get("rope_type", parameters.get("type"))
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    if kind not in STRETCHING or not isinstance(factor, (int, float)) or not factor > 1:
        return stated
    if isinstance(original, int) and original > 0:
        return max(stated, int(original * factor))
    # gemma3's linear factor, one of several sets by kind of layer, is in its stated length already
    return stated if layered else int(stated * factor)


def _has_table(model: PreTrainedModel, stated: int) -> bool:
    """Return whether some table has a row for each position: learned embeddings, precomputed sines, causal masks."""

    def fits(size: int) -> bool:
        return stated <= size <= stated + 8  # some tables begin with a few rows of padding

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        words = set("_".join(name.lower().split(".")[-2:]).split("_"))
        if tensor.ndim < 2:
            continue
        if words & TABLES and any(map(fits, tensor.shape)):
            return True
        if words & MASKS and tensor.shape[-1] == tensor.shape[-2] and fits(tensor.shape[-1]):
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------
# rotations that depend on the length


@dataclass(frozen=True)
class _Call:
    """One call of a rotary module, kept so that it can be repeated at other positions."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def at(self, positions: Sequence[int]) -> list[torch.Tensor]:
        """Return the module's tables at these positions, each (len(positions), d); complex ones stay complex."""

        def other(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.is_floating_point():
                return value.float()  # it only says in what dtype the tables are wanted
            ids = torch.tensor(list(positions), dtype=value.dtype, device=value.device)
            return ids.expand(*value.shape[:-1], len(positions))

        with torch.inference_mode():
            found = self.module(*map(other, self.args), **{k: other(v) for k, v in self.kwargs.items()})
        tables = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, torch.Tensor)]
        return [x.movedim(_axis(x, len(positions)), 0).flatten(1).cpu() for x in tables]


def _axis(table: torch.Tensor, positions: int) -> int:
    """Return the axis of the positions: the last but one, or the first of that size."""
    if table.ndim > 1 and table.shape[-2] == positions:
        return table.ndim - 2
    return table.shape.index(positions)


class Rotations:
    """The rotary modules of a model, as its forward calls them.

    They are found by what they receive, not by name: modules without children or parameters that get the positions of
    the tokens in a trial run.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[[], Any], tokens: int) -> None:
        """Find the modules.

        Args:
            model: the model.
            run: a forward of `tokens` tokens.
            tokens: the length of the trial; best a number that no other size has.
        """
        self._model = model
        self._calls: list[_Call] = []
        seen: set[tuple[int, str]] = set()

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            if any(isinstance(v, torch.Tensor) and _is_positions(v, tokens) for v in values):
                key = (id(module), repr([v for v in values if isinstance(v, str)]))
                if key not in seen:
                    seen.add(key)
                    self._calls.append(_Call(module, args, dict(kwargs)))

        leaves = [m for m in model.modules() if not [*m.children(), *m.parameters()]]
        with module_hooks(m.register_forward_pre_hook(look, with_kwargs=True) for m in leaves):
            run()

    def same(self, tokens: int, stops: Sequence[int]) -> bool:
        """Return whether every position is rotated alike in one forward and in chunks.

        Args:
            tokens: the length of the whole prompt.
            stops: the ends of the chunks, ascending; the last is `tokens`.
        """
        pieces = [(start, stop) for start, stop in pairwise([0, *stops]) if stop > start]
        if len(pieces) > MOST_PIECES:
            step = -(-len(pieces) // MOST_PIECES)
            pieces = [*pieces[::step], pieces[-1]]
        parts = [sorted({start, (start + stop) // 2, stop - 1}) for start, stop in pieces]
        put_back = rotation_state(self._model)
        try:
            return all(self._same(call, tokens, parts) for call in self._calls)
        finally:
            put_back()

    def _same(self, call: _Call, tokens: int, parts: Sequence[Sequence[int]]) -> bool:
        reset_rotations(self._model)
        whole = call.at([p for part in parts for p in part] + [tokens - 1])
        reset_rotations(self._model)
        split = [call.at(part) for part in parts]
        return all(
            torch.allclose(table[:-1], torch.cat([tables[i] for tables in split]), rtol=1e-5, atol=1e-5)
            for i, table in enumerate(whole)
        )

    def switch(self, tokens: int, first: int) -> int:
        """Return the most tokens, from `first` up to `tokens`, whose first `first` are rotated as they are alone."""
        low, high = first, tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.same(middle, (first, middle)) else (low, middle)
        return low


def _is_positions(value: torch.Tensor, tokens: int) -> bool:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.ndim == 0:
        return False
    if value.shape[-1] != tokens or value.ndim > 3:
        return False
    return bool((value.cpu() == torch.arange(tokens)).all())


def reset_rotations(model: PreTrainedModel) -> None:
    """Make the rotary modules forget the longest prompt they have seen.

    Dynamic scaling keeps the frequencies of the longest prompt so far, and would use them for a shorter one.
    """
    for module, prefix in _dynamic(model):
        original = getattr(module, f"{prefix}original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", original.to(current.device).clone())
        name = f"{prefix}max_seq_len_cached"
        setattr(module, name if hasattr(module, name) else "max_seq_len_cached", module.original_max_seq_len)


def rotation_state(model: PreTrainedModel) -> Callable[[], None]:
    """Record what the rotary modules remember. The function returned restores it."""
    noted = [
        (module, name, _copy(getattr(module, name, None)))  # the module makes it when it sees a longer prompt
        for module, prefix in _dynamic(model)
        for name in dict.fromkeys((f"{prefix}inv_freq", f"{prefix}max_seq_len_cached", "max_seq_len_cached"))
    ]

    def put_back() -> None:
        for module, name, value in noted:
            if value is not None:
                setattr(module, name, _copy(value))
            elif hasattr(module, name):
                delattr(module, name)

    return put_back


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _dynamic(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Yield the rotary modules that remember a length, each with the prefix of its names for a kind of layer."""
    for module in model.modules():
        if hasattr(module, "original_max_seq_len") and hasattr(module, "max_seq_len_cached"):
            for name, _ in list(module.named_buffers(recurse=False)):
                if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                    prefix = name.removesuffix("inv_freq")
                    if hasattr(module, f"{prefix}original_inv_freq"):
                        yield module, prefix
