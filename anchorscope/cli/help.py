"""Help texts on the terminal: options in groups, whole at any width; and what a shell completes.

Typer's own pages with rich cut words where the terminal is narrow, and call a flag a "<bool>".
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns: longer lines are hard to read
NARROWEST = 30
NARROW = 60  # below it, what an option means stands below its name
FEW = 8  # so many options need no groups

GROUPS = {
    "Input": (
        *("model", "prompt", "text", "token_ids", "dump", "config", "names", "costs", "against", "tokenizer"),
        *(
            "chat",
            "no_special_tokens",
            "tokens",
            "lengths",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "period",
            "prompts",
        ),
        *("revision", "trust_remote_code"),
    ),
    "Settings": (),
    "Computation": ("backend", "device", "devices", "shard", "ray", "dtype", "model_dtype", "chunk"),
    "Output": (
        *("out", "html", "no_values", "no_diagnose", "no_figures", "heatmap", "format", "dpi"),
        *("figure_theta", "overwrite", "resume", "as_json", "open_page"),
    ),
    "Help": ("help",),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


class _Page:
    """Writes options in groups, and nothing wider than the terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        columns = shutil.get_terminal_size().columns
        formatter.width = max(min(columns, WIDEST), NARROWEST)
        super().format_help(ctx, formatter)  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by group; then the commands, if there are any."""
        arguments: list[tuple[str, str]] = []
        options: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                arguments.append((re.sub(r" <[^ ]*>$", "", record[0]), record[1]))  # the help says what it is
            else:
                options[GROUP_OF.get(param.name, "Settings")].append(record)
        everything = [record for records in options.values() for record in records]
        sections = {"Options": everything} if len(everything) <= FEW else options
        _write({"Arguments": arguments, **sections}, formatter)
        if hasattr(self, "list_commands"):
            commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]  # type: ignore[attr-defined]
            _write({"Commands": [(name, command.get_short_help_str(1000)) for name, command in commands]}, formatter)


def _write(sections: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    """Write the sections that hold something, names at the left and what they mean at the right, or below."""
    room = 8 if formatter.width < NARROW else 30
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows, col_max=room)


class HelpfulCommand(_Page, TyperCommand):
    """A command with such a page."""


class HelpfulGroup(_Page, TyperGroup):
    """The program with such a page."""


def completes(words: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for an option that takes some of these words, separated by commas.

    Args:
        words: makes the words, when they are asked for.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words() if word.startswith(last)]

    return complete
