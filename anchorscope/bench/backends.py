"""The sparse back ends: three stages and the whole pipeline, in Triton or in plain torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from anchorscope.devices import resolve_backend_name


@dataclass(frozen=True)
class SparseBackend:
    """The stages of anchor attention with the signatures of `anchorscope.kernels.torch_backend`.

    `in_place` tells whether `sparse` takes `inplace=True`, which is how `whole` calls it: it then continues the anchor
    stage's state instead of a copy.
    """

    name: str
    anchor: Callable[..., Any]
    identify: Callable[..., Any]
    sparse: Callable[..., Any]
    whole: Callable[..., Any]
    in_place: bool = False


def resolve_backend(name: str, device: torch.device) -> SparseBackend:
    """The stages of a back end; `auto` is Triton on a GPU where it is installed, and torch elsewhere.

    Raises:
        InputError: unknown name.
        MissingBackendError: Triton is not installed, or asked for on a CPU without its interpreter.
    """
    if resolve_backend_name(name, device) == "torch":
        from anchorscope.kernels import torch_backend as t

        return SparseBackend("torch", t.anchor, t.identify, t.sparse, t.anchor_attention)
    stages = {
        stage: getattr(importlib.import_module(f"anchorscope.kernels.{file}"), stage)
        for file, stage in (
            ("anchor", "anchor"),
            ("identify", "identify"),
            ("sparse", "sparse"),
            ("pipeline", "anchor_attention"),
        )
    }
    return SparseBackend(
        "triton",
        stages["anchor"],
        stages["identify"],
        stages["sparse"],
        stages["anchor_attention"],
        in_place=True,
    )
