"""PowerAttention: a fixed pattern that reaches exponentially far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class Power(Method):
    """Query block I keeps block 0, the last `window` blocks up to itself, and the blocks I - 2^p for p = 0, 1, 2, ...

    Nothing is searched. Simplified: one sink block and blocks of 64; the paper trains models with the pattern.
    """

    name: ClassVar = "power"
    parameter: ClassVar = "window"
    sweep: ClassVar = (1, 2, 4, 8, 16, 32, 64, 128)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "pattern"
    source: ClassVar = "PowerAttention, arXiv 2503.03588"

    window: int = setting(4, "last key blocks kept, the diagonal included", low=1)
    block: int = setting(64, "block side, tokens", low=1)

    def dense_at(self, tokens: int) -> float:
        return math.ceil(tokens / self.block)

    def select(self, head: Head) -> Selection:
        visible = head.visible_blocks(self.block, self.block)
        at = torch.arange(len(visible), device=head.device)
        back = at[:, None] - at
        keep = (at == 0) | (back < self.window) | ((back > 0) & ((back & (back - 1)) == 0))
        return Selection((Blocks(keep & visible, self.block, self.block),))
