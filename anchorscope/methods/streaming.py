"""Attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Selection, Sinks, Window


@dataclass(frozen=True)
class Streaming(Method):
    """Keep j < sinks or i - j < window. Nothing is searched, so identification is free."""

    name: ClassVar = "streaming"
    parameter: ClassVar = "window"
    sweep: ClassVar = (128, 256, 512, 1024, 2048, 3968, 8192, 16384)
    sweep_doubles: ClassVar = True
    granularity: ClassVar = "pattern"
    source: ClassVar = "Xiao et al., StreamingLLM, ICLR 2024, arXiv 2309.17453; sizes of MInference's a_shape"

    window: int = setting(3968, "last tokens kept, the query included", low=1)
    sinks: int = setting(128, "first tokens kept", low=0)

    def dense_at(self, tokens: int) -> float:
        return tokens

    def select(self, head: Head) -> Selection:
        return Selection((Sinks(self.sinks, head.device), Window(self.window)))
