"""Layers in memory: what a `DumpWriter` is on the disk, for layers that are measured as they pass and dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anchorscope.dumps import Entry, LayerSpec, LayerTensors
from anchorscope.dumps.layer import LayerPieces
from anchorscope.dumps.reader import overflow
from anchorscope.errors import InputError

Done = Callable[[Entry, LayerTensors], None]


class HeldLayers:
    """The layers of one prompt that are in memory; each leaves it as soon as it has been measured.

    Args:
        entries: what was planned, by layer.
        device: where the tensors are held.
        done: measures a complete layer; nothing of it is kept here behind that.
    """

    def __init__(self, entries: Mapping[int, Entry], device: torch.device, done: Done) -> None:
        self._entries, self._device, self._done = entries, device, done

    def layer(self, prompt: str, layer: int, **fields: Any) -> HeldLayer:
        """Begin a layer; see `anchorscope.dumps.DumpWriter.layer`."""
        spec = LayerSpec(**fields)
        spec.check(f"layer {layer} of prompt {prompt!r}")
        return HeldLayer(self._entries[layer], spec, self._device, self._done)


class HeldLayer:
    """One layer being collected; see `anchorscope.dumps.LayerWriter`."""

    def __init__(self, entry: Entry, spec: LayerSpec, device: torch.device, done: Done) -> None:
        self._entry, self._spec, self._device, self._done = entry, spec, device, done
        self._where = f"layer {entry.layer} of prompt {entry.prompt}"
        self._pieces = LayerPieces(self._where, spec)
        with _ordinary():
            self._tensors = {
                name: torch.empty(shape, dtype=self._pieces.dtype, device=device)
                for name, shape in self._pieces.shapes.items()
            }

    def put(self, name: str, start: int, x: Tensor, rows: Any = None) -> None:
        """Take positions start ... start + n of tensor `name`.

        Raises:
            InputError: they do not fit, or hold NaN or infinity.
        """
        with _ordinary():
            for index, part in self._pieces.take(name, start, x, rows, self._device):
                self._tensors[name][index, start : start + part.shape[0]].copy_(part)

    def close(self, *, window: int | None = None) -> None:
        """Have the layer measured, and drop it.

        Raises:
            InputError: the layer is not what the trial run showed, or float32 cannot hold its scores; and whatever
                measuring raises.
        """
        self._pieces.check_whole(self._where)
        self._check_plan(window)
        spec, held = self._spec, self._tensors
        self._tensors = {}
        group = len(spec.query_heads) // len(spec.kv_heads)
        rows = tuple(i // group for i in range(len(spec.query_heads)))
        tensors = LayerTensors(
            held.pop("q"), held.pop("k"), held.pop("v", None), tuple(spec.query_heads), tuple(spec.kv_heads), rows
        )
        with _ordinary():
            if (sentence := overflow(self._entry, tensors)) is not None:
                raise InputError(sentence)
            self._done(self._entry, tensors)

    def abort(self) -> None:
        """Drop what is there of an unfinished layer."""
        self._tensors = {}

    def _check_plan(self, window: int | None) -> None:
        entry, spec = self._entry, self._spec
        found = replace(entry, scale=float(spec.scale), softcap=spec.softcap, window=window, dtype=spec.dtype)
        for name in ("window", "scale", "softcap", "dtype"):
            planned, now = getattr(entry, name), getattr(found, name)
            if planned != now:
                raise InputError(
                    f"{self._where} runs with {name} {now}, but with {planned} in a trial run of a few tokens:"
                    " capture the prompt first, and give the dump"
                )


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Make ordinary tensors in the middle of a model's pass, as if they had been read from a file."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
