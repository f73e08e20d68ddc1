"""Which engine measures the heads, and on which device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head, workspace_bytes
from anchorscope.devices import resolve_backend_name, resolve_device
from anchorscope.params import AnchorParams
from anchorscope.profiles import Measured
from anchorscope.runs.environment import hardware_name

HeadEngine = Callable[[Tensor, Tensor, "Tensor | None", HeadShape], Measured]


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
        """Product name of the device."""
        return hardware_name(self.device)


def resolve_backend(name: str = "auto", device: str = "auto") -> Backend:
    """Pick the engine and the device; names and errors as in `anchorscope.devices`."""
    where = resolve_device(device)
    if resolve_backend_name(name, where) == "torch":
        return Backend("torch", where, profile_head)
    from anchorscope.analysis.triton_engine import profile_head_triton

    return Backend("triton", where, profile_head_triton)
