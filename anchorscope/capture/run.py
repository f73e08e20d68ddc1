"""`capture_model` runs a model on prompts and writes what its attention consumed as a dump."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.capture.passes import model_failures, pass_over
from anchorscope.capture.request import CapturePlan, CaptureRequest
from anchorscope.dumps.folder import check_disk, check_output
from anchorscope.dumps.format import read_manifest
from anchorscope.dumps.reader import Dump
from anchorscope.dumps.writer import DumpWriter
from anchorscope.errors import InputError, Interrupted, RunFailure
from anchorscope.files import human_bytes
from anchorscope.models.load import require_transformers
from anchorscope.models.memory import Forecast, forecast
from anchorscope.models.prompts import PromptInput, TokenizedPrompt
from anchorscope.runs.request import takes
from anchorscope.shown import counted

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureProgress:
    """The progress of a capture: `done` of `total` layers (over all prompts) are on disk; `prompt` is being run."""

    prompt: str
    done: int
    total: int


@takes(CaptureRequest, options=None)
def capture_model(
    model: str | PreTrainedModel,
    prompts: Sequence[PromptInput | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[CaptureProgress], None] | None = None,
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> Dump:
    """Prefill each prompt and write Q, K and V of the wanted layers, as attention consumed them.

    Every layer is checked as it passes (mask, options, a few output rows recomputed), streamed to the disk head by
    head and released, so the memory above a plain forward is about one head. Logits are computed for the last position
    at most. A trial run of two tokens learns the layers' shapes first: what cannot be captured, or does not fit on the
    disk, is refused before the real work.

    Args:
        model: a preset, a `.gguf` file, a folder or a Hugging Face id, or a loaded transformers model.
        prompts: file paths or `PromptInput`s.
        out: the dump's folder.
        overwrite: replace a dump that is there.
        resume: continue an unfinished dump made with the same settings.
        progress: called after each layer.
        notify: receives warnings and facts worth a line; the default logs them.
        options: the other fields of `CaptureRequest`: which tokens, layers and heads, stored how, and how the model is
            loaded.

    Returns:
        The finished dump, opened.

    Raises:
        InputError: something that the caller can fix is wrong, before or during the run.
        MissingBackendError: transformers or the device is missing.
        RunFailure: the disk is full, or memory ran out.
    """
    request = CaptureRequest(model, prompts, **options)
    request.check()
    folder = Path(out)
    check_output(folder, overwrite=overwrite, resume=resume)
    inputs = request.read_prompts()
    require_transformers()
    run = _Capture(folder, notify or logger.warning, progress)
    with run.explained():
        plan = request.plan(inputs, run.tell)
        run.check_room(plan)
        with DumpWriter(folder, plan.header(), overwrite=overwrite, resume=resume, continues=True) as writer:
            for prompt in plan.prompts:
                run.capture(plan, prompt, writer)
            return writer.finish()


class _Capture:
    """A capture that is running.

    Args:
        folder: the dump's folder.
        tell: receives warnings and facts worth a line.
        progress: called after each layer, or None.
    """

    def __init__(
        self, folder: Path, tell: Callable[[str], None], progress: Callable[[CaptureProgress], None] | None
    ) -> None:
        self.tell = tell
        self._folder = folder
        self._progress = progress
        self._forecast: Forecast | None = None
        self._total = 0

    def check_room(self, plan: CapturePlan) -> None:
        """Say what the capture takes of disk and memory, before it begins.

        Raises:
            RunFailure: the disk has not that much left.
        """
        needed, self._total = human_bytes(plan.bytes), plan.total
        self.tell(
            f"{counted(len(plan.prompts), 'prompt')} x {counted(len(plan.shapes), 'layer')} need {needed} in"
            f" {self._folder}"
        )
        check_disk(self._folder, plan.bytes)
        self._forecast = forecast(plan.loaded.model, plan.longest, plan.request.chunk, self.tell)

    def capture(self, plan: CapturePlan, prompt: TokenizedPrompt, writer: DumpWriter) -> None:
        """Run one prompt and write those of its layers that the dump has not yet.

        Raises:
            InputError: a wanted layer makes no attention call, or Q, K and V do not determine it.
            RunFailure: the disk is full.
        """
        left = [layer for layer in plan.shapes if (prompt.name, layer) not in writer.done]
        if not left and prompt.name in writer.proven:
            return

        def report(_: int = 0) -> None:
            if self._progress is not None:
                self._progress(CaptureProgress(prompt.name, len(writer.done), plan.total))

        report()
        request = plan.request
        found = pass_over(plan, prompt, writer, left, storage=request.storage, asked=request.layers, on_layer=report)
        assert found is not None, "it was to be proven"
        writer.prove(prompt.name, found.to_json())
        if (doubt := found.warning(prompt.name)) is not None:
            self.tell(f"warning: {doubt}")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn whatever ends the capture into one sentence that says what the folder keeps.

        Raises:
            Interrupted, InputError, RunFailure: as `capture_model`.
        """
        try:
            with model_failures(lambda: self._forecast):
                yield
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self._kept() or 'nothing was written'}") from None
        except RunFailure as error:
            kept = self._kept()
            raise RunFailure(f"{error}; {kept}" if kept else str(error)) from error.__cause__

    def _kept(self) -> str | None:
        """Say what an unfinished capture leaves behind, or return None if that is nothing."""
        try:
            manifest = read_manifest(self._folder)
        except InputError:
            return None
        count = len(manifest["entries"])
        if manifest.get("complete", True) or not count:
            return None
        of = f"{count:,} of {counted(max(count, self._total), 'layer')}" if self._total else counted(count, "layer")
        verb = "is" if count == 1 else "are"
        return f"{of} {verb} kept in {self._folder}: give the same command again with --resume to continue"
