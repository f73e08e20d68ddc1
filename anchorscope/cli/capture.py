"""`anchorscope capture`: run a model on prompts and keep what its attention consumed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import live_bar, note, quiet_loading, refuse_both
from anchorscope.cli.help import completes
from anchorscope.cli.source import check_dtypes, prompt_inputs
from anchorscope.files import human_bytes, visible
from anchorscope.shown import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from anchorscope.capture import CaptureProgress
    from anchorscope.dumps import Dump


def capture(
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", help="Folder for the dump; must be new.", metavar="DIR")],
    prompt: opt.PromptFiles = None,
    text: opt.Texts = None,
    token_ids: opt.TokenIdFiles = None,
    chat: opt.Chat = False,
    no_special_tokens: opt.NoSpecialTokens = False,
    tokens: opt.PromptTokens = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, like 0,5,10-15, or all.", metavar="LIST")] = "all",
    kv_heads: Annotated[
        str, typer.Option(help="Kv heads to keep, with their query heads, like 0,2, or all.", metavar="LIST")
    ] = "all",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What is stored: bf16, fp16 or fp32. (default: the run's)",
            metavar="DTYPE",
            autocompletion=completes(lambda: opt.DTYPES),
        ),
    ] = None,
    model_dtype: opt.ModelDtype = None,
    device: opt.Device = "auto",
    chunk: opt.Chunk = None,
    no_values: Annotated[
        bool, typer.Option("--no-values", help="Leave V out: a smaller dump, but no output errors.")
    ] = False,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    overwrite: Annotated[bool, opt.overwrites("the dump in DIR")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted capture of the same settings.")
    ] = False,
    as_json: Annotated[bool, opt.prints_json("the result as JSON")] = False,
) -> None:
    """Run a model on prompts and write Q, K and V of its attention layers, exactly as attention consumes them.

    Example: anchorscope capture --model smollm2 --prompt book.txt --tokens 8192 --out dump
    """
    refuse_both(overwrite, resume)
    wanted_layers, wanted_heads = _indices(layers, "--layers"), _indices(kv_heads, "--kv-heads")
    check_dtypes(dtype, model_dtype)
    quiet_loading(model)
    from anchorscope.models.load import quiet_transformers, require_transformers

    inputs = prompt_inputs(prompt or [], text or [], token_ids or [])
    require_transformers()
    from anchorscope.capture import capture_model
    from anchorscope.capture.request import CaptureRequest
    from anchorscope.dumps.folder import check_output

    quiet_transformers()
    asked: dict[str, Any] = {
        "tokens": tokens,
        "layers": wanted_layers,
        "kv_heads": wanted_heads,
        "dtype": dtype,
        "model_dtype": model_dtype,
        "device": device,
        "values": not no_values,
        "chunk": chunk,
        "chat": chat,
        "special_tokens": not no_special_tokens,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    CaptureRequest(model, inputs, **asked).check()
    check_output(out, overwrite=overwrite, resume=resume)
    note(f"loading {model}")
    started = time.monotonic()
    with _progress() as update:
        dump = capture_model(
            model,
            inputs,
            out,
            **asked,
            overwrite=overwrite,
            resume=resume,
            progress=update,
            notify=note,
        )
    _print_result(dump, time.monotonic() - started, as_json)


def _print_result(dump: Dump, seconds: float, as_json: bool) -> None:
    """Say what was written."""
    size = sum(entry.bytes for entry in dump.entries)
    if as_json:
        result = {
            "path": str(dump.path),
            "identity": dump.identity,
            "prompts": [{"name": p.name, "tokens": p.tokens} for p in dump.prompts],
            "layers": sorted({e.layer for e in dump.entries}),
            "bytes": size,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result))
        return
    note(
        f"{counted(len(dump.prompts), 'prompt')}, {counted(len(dump.entries), 'file')}, {human_bytes(size)}"
        f" in {seconds:.0f} s"
    )
    print(dump.path)


def _indices(text: str, option: str) -> tuple[int, ...] | None:
    """Indices as the user wrote them, None for all; the model is not loaded yet, so only the form is checked."""
    if text.strip() == "all":
        return None
    from anchorscope.parse import parse_indices

    largest = max((int(digits) for digits in re.findall(r"\d{1,6}", text)), default=0)
    return parse_indices(text, option, range(largest + 1))


@contextmanager
def _progress() -> Iterator[Callable[[CaptureProgress], None]]:
    """Layers done on stderr, with the time left; silent when stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    bar = live_bar(
        TextColumn("capture "),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with bar:
        task = bar.add_task("", total=None, visible=False)

        def update(event: CaptureProgress) -> None:
            bar.update(
                task, total=event.total, completed=event.done, description=visible(event.prompt[:24]), visible=True
            )

        yield update
