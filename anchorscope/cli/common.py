"""What the commands share: consoles, progress, sizes in words. stdout carries results, stderr everything else."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anchorscope.cli.tables import FittingTable
from anchorscope.errors import InputError
from anchorscope.files import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from anchorscope.runs.life import Plan
    from anchorscope.runs.progress import Progress as Event
    from anchorscope.runs.record import SourceRecord
    from anchorscope.runs.sources import Source


def stdout_console() -> Console:
    """Console for results: plain text when piped; see `_console`."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """Console for progress, notes and warnings; see `_console`."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """A console that shows text as it is.

    Names come from files of anybody's: `[/]`, `:smile:` and escape sequences in them mean nothing here.
    """
    from rich.console import Console

    class PlainConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            wide = any(isinstance(x, FittingTable) for x in objects)  # a pipe has room for all of its columns
            super().print(*objects, **{"crop": not wide, **options})

        def render_str(self, text: str, **options: Any) -> Text:
            options.update(emoji=False, markup=False, highlight=False)
            return super().render_str("\n".join(visible(line) for line in text.split("\n")), **options)

    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def note(sentence: str) -> None:
    """A remark on stderr."""
    say(visible(sentence))


def warn(sentence: str) -> None:
    """A warning on stderr."""
    say(f"warning: {visible(sentence)}")


def say(sentence: str) -> None:
    """A line on stderr; on a terminal it takes several, broken between words."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        lines = [
            textwrap.fill(x, columns, break_long_words=False, break_on_hyphens=False) for x in sentence.split("\n")
        ]
        sentence = "\n".join(lines)
    print(sentence, file=sys.stderr)


def drawn(form: str | None, dpi: int | None, no_figures: bool = False) -> dict[str, Any]:
    """What --format, --dpi and --no-figures ask for, as keyword arguments `figures` and `formats` of a run.

    Raises:
        InputError: an unknown format, a resolution out of range, or figures described and refused at once.
    """
    from anchorscope.pictures import DPI, picture_formats

    formats = picture_formats("png" if form is None else form, DPI if dpi is None else dpi, ("--format", "--dpi"))
    for option, value in (("--format", form), ("--dpi", dpi)):
        if no_figures and value is not None:
            raise InputError(f"--no-figures and {option} contradict each other: give one of them")
    return {"figures": not no_figures, "formats": formats}


def announce(plan: Plan[Any], what: str, *, figures: bool = True, formats: Mapping[str, int] | None = None) -> None:
    """Say on stderr what a run is going to do and take, and what there is to warn of; see `drawn`."""
    note(f"{what}; {plan.needs(figures=figures, formats=formats or ('png',))}")
    for sentence in plan.warnings:
        warn(sentence)


def warn_of_model(source: Source | SourceRecord, prompts: Sequence[str] | None = None) -> None:
    """Say on stderr where a dump's own record casts doubt on its model; a model that runs is judged as it does.

    Args:
        source: the dump, or a running model.
        prompts: names of the prompts in use; None means all.
    """
    from anchorscope.proof import dump_warnings

    manifest = getattr(source, "manifest", None)
    for sentence in () if manifest is None else dump_warnings(manifest.get("proof"), source.prompts, prompts):
        warn(visible(sentence))


def chosen(source: Source, layers: str, heads: str, prompts: str) -> dict[str, Any]:
    """What --layers, --heads and --prompts choose of a dump or a model, as keyword arguments; None means all.

    Raises:
        InputError: malformed lists, or indices that it lacks.
    """
    from anchorscope.parse import parse_indices

    every_layer = [*{e.layer for e in source.entries}, *getattr(source, "refused", ())]
    every_head = [h for e in source.entries for h in e.query_heads]
    return {
        "layers": None if layers == "all" else parse_indices(layers, "--layers", every_layer),
        "heads": None if heads == "all" else parse_indices(heads, "--heads", every_head),
        "prompts": None if prompts == "all" else [p.strip() for p in prompts.split(",")],
    }


def refuse_both(overwrite: bool, resume: bool) -> None:
    """Refuse --overwrite together with --resume."""
    if overwrite and resume:
        raise InputError("--overwrite and --resume contradict each other: give one of them")


def check_early(device: str, backend: str = "auto", target_recall: float = 1.0) -> None:
    """Refuse what no dump or model could make right, before one is opened.

    Raises:
        InputError, MissingBackendError: an unknown or missing device or back end, a target outside (0, 1].
    """
    from anchorscope.devices import resolve_backend_name, resolve_device
    from anchorscope.runs.request import check_target

    check_target(target_recall)
    resolve_backend_name(backend, resolve_device(device))


def quiet_loading(model: str) -> None:
    """Keep the bars of a model's loading off stderr, but those of a long download; before transformers is imported."""
    if not sys.stderr.isatty() or model == "smollm2" or model.lower().endswith(".gguf"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported


def live_bar(*columns: Any) -> Progress:
    """A bar on stderr that goes away at its end, with rich's columns by default; silent where that is no terminal."""
    from rich.progress import Progress

    console = stderr_console()
    console.quiet = not console.is_terminal  # rich before 13.9 ends even a bar that is switched off with an empty line
    return Progress(*columns, console=console, transient=True, disable=console.quiet)


@contextmanager
def progress_bar() -> Iterator[Callable[[Event], None]]:
    """A bar with time left on stderr; silent when stderr is no terminal."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = live_bar(
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", table_column=None, markup=False),
    )
    tasks: dict[str, Any] = {}

    def update(event: Event) -> None:
        task = tasks.get(event.stage)
        if task is None:
            task = tasks[event.stage] = bar.add_task(event.stage, total=event.total, detail="")
        bar.update(task, completed=event.work, total=event.total, detail=visible(event.detail[:24]))

    with bar:
        yield update
