"""Which engine measures the heads, and on which device: chosen once, named, never changed silently."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorscope.analysis.engine import HeadResult, HeadShape, profile_head, workspace_bytes
from anchorscope.errors import InputError, MissingBackendError
from anchorscope.params import AnchorParams

BACKENDS = ("auto", "torch", "triton")

HeadEngine = Callable[[Tensor, Tensor, "Tensor | None", HeadShape], HeadResult]


@dataclass(frozen=True)
class Backend:
    """A resolved back end.

    Attributes:
        name: "torch" or "triton".
        device: where it runs.
        engine: measures one head, with the contract of `engine.profile_head`.
    """

    name: str
    device: torch.device
    engine: HeadEngine

    def workspace(self, tokens: int, head_dim: int, thetas: int, params: AnchorParams) -> int:
        """Bytes that measuring one head takes on the device, about; inputs included."""
        if self.name == "torch":
            return workspace_bytes(tokens, head_dim, thetas, params, self.device.type)
        # Two maps and the sort of the columns per (group, key); outputs in float32; rows of every theta.
        return 40 * params.groups(tokens) * tokens + 16 * tokens * head_dim + 8 * thetas * tokens

    @property
    def hardware(self) -> str:
        """The device as people call it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"


def resolve_device(text: str) -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:i`.

    Raises:
        InputError: not one of these.
        MissingBackendError: CUDA was asked for and is absent, or has no device i.
    """
    if text == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise InputError(f"--device {text!r} is unknown; use auto, cpu, cuda or cuda:0")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingBackendError("--device cuda: this torch sees no CUDA GPU; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise MissingBackendError(f"--device {text}: there are only {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def resolve_backend(name: str = "auto", device: str = "auto") -> Backend:
    """Pick the engine and the device.

    `auto` takes the Triton kernels on a CUDA GPU where Triton is installed, plain torch otherwise.

    Raises:
        InputError: unknown back end or device.
        MissingBackendError: CUDA or Triton was asked for and is absent, or Triton was asked for on a CPU.
    """
    if name not in BACKENDS:
        raise InputError(f"--backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    where = resolve_device(device)
    if name == "torch" or (name == "auto" and where.type == "cpu"):
        return Backend("torch", where, profile_head)
    try:
        import triton  # noqa: F401
    except ImportError:
        if name == "auto":
            return Backend("torch", where, profile_head)
        raise MissingBackendError("--backend triton: Triton is not installed; use --backend torch") from None
    if where.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingBackendError(
            "--backend triton needs a CUDA GPU; use --backend torch (or set TRITON_INTERPRET=1 to run the kernels,"
            " very slowly, in Triton's interpreter)"
        )
    from anchorscope.analysis.triton_engine import profile_head_triton

    return Backend("triton", where, profile_head_triton)
