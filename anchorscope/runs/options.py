"""How a plan is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anchorscope.pictures import DPI, Formats, asked_pictures, picture_formats
from anchorscope.runs.executors import Executor
from anchorscope.runs.progress import Progress, ProgressCallback
from anchorscope.runs.shards import Shard


@dataclass(frozen=True)
class RunOptions:
    """How a plan is carried out; nothing of this changes what is measured.

    Attributes:
        figures: draw the figures.
        formats: what figures are saved as, some of "png", "pdf" and "svg"; also "png,pdf", or dpi by format.
        dpi: pixels per inch, of a PNG and of the maps inside a PDF or SVG.
        overwrite: replace what an earlier run left in the folder.
        resume: accept a finished run of the same request too, and measure nothing again.
        progress: called as work proceeds.
        notify: told sentences for the user: parts that cannot be used again, warnings.
        shard: measure this share of the units and no more, into a folder that `anchorscope.merge` makes use of.
        executor: who measures; by default this process, or one for each of the plan's devices.
    """

    figures: bool = True
    formats: Formats = ("png",)
    dpi: int = DPI
    overwrite: bool = False
    resume: bool = False
    progress: ProgressCallback | None = None
    notify: Callable[[str], None] | None = None
    shard: Shard | None = None
    executor: Executor | None = None

    @property
    def replacing(self) -> dict[str, bool]:
        """What may be done to an earlier run in the folder."""
        return {"overwrite": self.overwrite, "resume": self.resume}

    def __post_init__(self) -> None:
        picture_formats(self.formats, self.dpi)

    @property
    def pictures(self) -> dict[str, int]:
        """Dpi of every format that figures are saved in; empty where none are drawn."""
        return picture_formats(self.formats, self.dpi) if self.figures else {}

    @property
    def asked(self) -> dict[str, Any]:
        """What is to be made of the measurements, as the state of a folder says it."""
        return asked_pictures(self.figures, self.formats, self.dpi)

    def report(self, event: Progress) -> None:
        """Pass progress on."""
        if self.progress is not None:
            self.progress(event)

    def tell(self, sentence: str) -> None:
        """Pass a sentence on."""
        if self.notify is not None:
            self.notify(sentence)
