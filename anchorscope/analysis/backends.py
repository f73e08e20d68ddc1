"""Which engine measures the heads, and on which device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.engine import profile_head, workspace_bytes
from anchorscope.devices import resolve_backend_name, resolve_device
from anchorscope.heads.layer import Sought
from anchorscope.params import AnchorParams
from anchorscope.profiles import Measured
from anchorscope.runs.environment import hardware_name

if TYPE_CHECKING:
    from anchorscope.dumps import Entry

HeadEngine = Callable[[Tensor, Tensor, "Tensor | None", HeadShape], Measured]
Also = Callable[[Sought], None]
LayerEngine = Callable[
    [Tensor, Tensor, "Tensor | None", Sequence[int], HeadShape, "torch.device | None", "Also | None"], list[Measured]
]


@dataclass(frozen=True)
class Backend:
    """A resolved back end.

    Attributes:
        name: "torch" or "triton".
        device: where it runs.
        engine: measures one head, with the contract of `engine.profile_head`.
        layer_engine: measures the heads of a layer together, with the contract of `triton_engine.profile_layer`; None
            where a head at a time is as good.
    """

    name: str
    device: torch.device
    engine: HeadEngine
    layer_engine: LayerEngine | None = None

    def workspace(self, entry: Entry, thetas: int, params: AnchorParams, heads: int) -> int:
        """Bytes that measuring takes on the device, about, inputs included: a head, or as many of `heads` of a layer
        as are measured together.
        """
        tokens, head_dim = entry.tokens, entry.head_dim
        if self.layer_engine is None:
            return workspace_bytes(tokens, head_dim, thetas, params, self.device.type)
        from anchorscope.analysis.triton_engine import layer_workspace

        inputs = entry.bytes // len(entry.query_heads)
        return layer_workspace(tokens, head_dim, thetas, params, heads, inputs)

    @property
    def hardware(self) -> str:
        """Product name of the device."""
        return hardware_name(self.device)


def resolve_backend(name: str = "auto", device: str = "auto") -> Backend:
    """Pick the engine and the device; names and errors as in `anchorscope.devices`."""
    where = resolve_device(device)
    if resolve_backend_name(name, where) == "torch":
        return Backend("torch", where, profile_head)
    from anchorscope.analysis.triton_engine import profile_head_triton, profile_layer

    return Backend("triton", where, profile_head_triton, profile_layer)
