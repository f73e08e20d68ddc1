"""The recorder checks each attention call of a running model and hands it on, piece by piece, to whoever stores it.

A `DumpWriter` stores layers on the disk, `anchorscope.capture.held` in memory until they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anchorscope.dtypes import dtype_name
from anchorscope.dumps.layer import layer_bytes
from anchorscope.errors import InputError
from anchorscope.models.calls import AttentionCall
from anchorscope.models.check import check_call, check_output, visible_window


@dataclass(frozen=True)
class Storage:
    """The part of each layer that a dump holds.

    Attributes:
        kv_heads: the kv heads, ascending, with the query heads that read them; None means all.
        dtype: the stored dtype "bf16", "fp16" or "fp32"; None means the run's own.
        values: whether V is stored.
    """

    kv_heads: tuple[int, ...] | None = None
    dtype: str | None = None
    values: bool = True

    def heads(self, heads: int, kv_heads: int) -> tuple[list[int], list[int]]:
        """Return the stored query heads and kv heads of a layer that has H = `heads` and Hkv = `kv_heads`.

        Query head h reads kv head h // (H // Hkv).
        """
        kept = list(range(kv_heads)) if self.kv_heads is None else list(self.kv_heads)
        group = heads // kv_heads
        return [h for kv in kept for h in range(kv * group, (kv + 1) * group)], kept


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's attention, learned from a short trial run.

    Attributes:
        heads: query heads H.
        kv_heads: kv heads Hkv.
        head_dim: d.
        dtype: the dtype "bf16", "fp16" or "fp32" in which its tensors are stored by default.
        scale: softmax scale.
        window: the sliding window that its call's options or mask name, or None.
        softcap: logit soft-cap, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    scale: float = 1.0
    window: int | None = None
    softcap: float | None = None

    def bytes(self, tokens: int, storage: Storage) -> int:
        """Return the size of this layer's tensor file for a prompt of `tokens` tokens."""
        heads, kv_heads = storage.heads(self.heads, self.kv_heads)
        dtype = storage.dtype or self.dtype
        return layer_bytes(len(heads), len(kv_heads), tokens, self.head_dim, dtype, storage.values)


class LayerSink(Protocol):
    """Takes the tensors of one layer; see `anchorscope.dumps.LayerWriter`."""

    def put(self, name: str, start: int, x: Tensor, rows: Sequence[int] | None = None) -> None: ...
    def close(self, *, window: int | None = None) -> None: ...
    def abort(self) -> None: ...


class LayerStore(Protocol):
    """Makes the sinks of layers; see `anchorscope.dumps.DumpWriter.layer`."""

    def layer(self, prompt: str, layer: int, **fields: Any) -> LayerSink: ...


class LayersDone(Exception):
    """All wanted layers are complete, so the rest of the forward is not needed."""


class ShapeProbe:
    """This sink learns every layer's shape from a run of a few tokens, and notes what a dump cannot represent.

    Attributes:
        shapes: by layer index, in call order.
        refused: why, by layer index.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.refused: dict[int, str] = {}

    def __call__(self, call: AttentionCall) -> None:
        layer = require_layer(call)
        if layer in self.shapes or layer in self.refused:
            raise _repeated(call)
        try:
            check_call(call)
            window = visible_window(call, 0)
            check_output(call, 0, window)
        except InputError as error:
            self.refused[layer] = str(error)
            return
        _, heads, _, head_dim = call.q.shape
        kind = stored_dtype(call.q.dtype)
        self.shapes[layer] = LayerShape(
            heads, call.k.shape[1], head_dim, kind, scale=call.scale, window=window, softcap=call.softcap
        )


@dataclass
class _Open:
    """A layer being stored, with its sink, the next position, and the window its masks have shown so far."""

    writer: LayerSink
    position: int = 0
    window: int | None = None


class Recorder:
    """This sink stores the wanted layers of one prompt while the model runs, in one call or chunk by chunk.

    Args:
        store: where they go: a `DumpWriter`, or `anchorscope.capture.held.HeldLayers`.
        prompt: the prompt's name.
        tokens: the prompt's length N.
        layers: layer indices to store; others are ignored.
        storage: what is stored of each layer.
        stop_early: raise `LayersDone` once every wanted layer is complete.
        on_layer: called after each completed layer with its index.
    """

    def __init__(
        self,
        store: LayerStore,
        prompt: str,
        tokens: int,
        layers: Sequence[int],
        storage: Storage = Storage(),
        *,
        stop_early: bool = False,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self._store = store
        self._prompt = prompt
        self._tokens = tokens
        self._wanted = set(layers)
        self._storage = storage
        self._stop_early = stop_early
        self._on_layer = on_layer
        self._open: dict[int, _Open] = {}
        self._left = set(layers)

    @property
    def missing(self) -> frozenset[int]:
        """Return the wanted layers that are not complete."""
        return frozenset(self._left)

    def __call__(self, call: AttentionCall) -> None:
        layer = require_layer(call)
        if layer not in self._wanted:
            return
        if layer not in self._left:
            raise _repeated(call)
        check_call(call)
        state = self._open.get(layer) or self._begin(layer, call)
        start, n = state.position, call.q.shape[2]
        if start + n > self._tokens:
            raise _repeated(call)
        window = visible_window(call, start)
        if state.window is not None and window != state.window:
            raise InputError(f"{call.name} changes its sliding window from {state.window} to {window} along the prompt")
        check_output(call, start, window)
        state.window = window

        query_heads, kv_heads = self._storage.heads(call.q.shape[1], call.k.shape[1])
        state.writer.put("q", start, call.q[0], rows=query_heads)
        state.writer.put("k", start, call.k[0, :, -n:], rows=kv_heads)  # the last n keys are this call's own
        if self._storage.values:
            state.writer.put("v", start, call.v[0, :, -n:], rows=kv_heads)
        state.position = start + n
        if state.position == self._tokens:
            state.writer.close(window=window)
            del self._open[layer]
            self._left.discard(layer)
            if self._on_layer is not None:
                self._on_layer(layer)
            if self._stop_early and not self._left:
                raise LayersDone

    def abort(self) -> None:
        """Drop the layers that are not complete."""
        for state in self._open.values():
            state.writer.abort()
        self._open.clear()

    def _begin(self, layer: int, call: AttentionCall) -> _Open:
        query_heads, kv_heads = self._storage.heads(call.q.shape[1], call.k.shape[1])
        writer = self._store.layer(
            self._prompt,
            layer,
            query_heads=query_heads,
            kv_heads=kv_heads,
            tokens=self._tokens,
            head_dim=call.q.shape[3],
            dtype=self._storage.dtype or stored_dtype(call.q.dtype),
            scale=call.scale,
            softcap=call.softcap,
            values=self._storage.values,
        )
        self._open[layer] = _Open(writer)
        return self._open[layer]


def stored_dtype(dtype: torch.dtype) -> str:
    """Return the dtype in which a run's tensors are stored by default: their own, but fp32 for float64."""
    return "fp32" if dtype == torch.float64 else dtype_name(dtype)


def require_layer(call: AttentionCall) -> int:
    """Return the call's layer index.

    Raises:
        InputError: the module has none, or a negative one, which modules shared by several layers have.
    """
    if not isinstance(call.layer, int) or call.layer < 0:
        raise InputError(f"{type(call.module).__name__} has no layer_idx of its own: its layers cannot be told apart")
    return call.layer


def _repeated(call: AttentionCall) -> InputError:
    return InputError(f"{call.name} runs more than once in a forward: which call is meant is not defined")
