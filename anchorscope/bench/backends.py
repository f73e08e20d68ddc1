"""The sparse back ends: three stages and the whole pipeline, in Triton or in plain torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from anchorscope.errors import InputError, MissingBackendError

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class SparseBackend:
    """The stages of anchor attention with the signatures of `anchorscope.kernels.torch_backend`.

    `in_place` tells whether `sparse` takes `inplace=True`, which is how `whole` calls it: it then continues
    the anchor stage's state instead of a copy.
    """

    name: str
    anchor: Callable[..., Any]
    identify: Callable[..., Any]
    sparse: Callable[..., Any]
    whole: Callable[..., Any]
    in_place: bool = False


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` to a device that exists.

    Raises:
        InputError: not a device name.
        MissingBackendError: CUDA, or that GPU, is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda (cuda:1 for a second GPU), not {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise MissingBackendError(f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu")
        if (device.index or 0) >= count:
            raise MissingBackendError(f"--device {name}: PyTorch sees {count} GPUs, numbered from 0")
    return device


def resolve_backend(name: str, device: torch.device) -> SparseBackend:
    """The stages of a back end; `auto` is Triton on a GPU where it is installed, and torch elsewhere.

    Raises:
        InputError: unknown name.
        MissingBackendError: Triton is not installed, or asked for on a CPU without its interpreter.
    """
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    installed = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if device.type == "cuda" and installed else "torch"
    if name == "torch":
        from anchorscope.kernels import torch_backend as t

        return SparseBackend("torch", t.anchor, t.identify, t.sparse, t.anchor_attention)
    if not installed:
        raise MissingBackendError(
            "--backend triton: Triton is not installed; install it or use --backend torch"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingBackendError(
            "--backend triton needs a GPU (or TRITON_INTERPRET=1, slow, for checking); use --backend torch"
        )
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
