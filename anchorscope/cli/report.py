"""`anchorscope report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import live_bar, note, warn, warn_of_model
from anchorscope.errors import InputError
from anchorscope.files import human_bytes
from anchorscope.names import ADD_TO_ANALYSES, PAGE_COMMANDS, listed
from anchorscope.shown import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anchorscope.report.html import Sources


def report(
    outs: Annotated[
        list[Path],
        typer.Argument(
            help=f"Folders written by {listed(PAGE_COMMANDS)}; those of {listed(ADD_TO_ANALYSES, 'and')} need the"
            " analysis of the same dump beside them.",
            metavar="OUT",
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            "--out",
            help="The file to write. (default: report.html in the first analysis, or first folder)",
            metavar="FILE",
        ),
    ] = None,
    dump: Annotated[
        list[Path] | None,
        typer.Option(
            help="Dump the analyses came from, for its tokens; may be repeated. (default: none)", metavar="DIR"
        ),
    ] = None,
    tokenizer: opt.Tokenizer = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Make one self-contained HTML page of finished runs: every head, every theta, and what they cost, side by side.

    The page works without a network and holds no link to the folders it came from.
    """
    from anchorscope.report.html import open_sources, write_report

    sources = open_sources(outs)
    for sentence in sources.remarks:
        warn(sentence)
    if tokenizer is not None and not dump:
        raise InputError("--tokenizer needs the token ids: add --dump, the dump that was analyzed")
    tokens = _tokens(sources, dump or [], tokenizer)
    target = sources.home / "report.html" if html is None else html
    if target.is_dir():
        raise InputError(f"--html {target} is a folder; name a file")

    with live_bar() as bar:
        task = bar.add_task("heads", total=None)
        write_report(
            sources, target, tokens=tokens, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    note(f"{_extent(sources)}, {human_bytes(target.stat().st_size)}")
    print(target)
    if open_page:
        import webbrowser

        if not webbrowser.open(target.resolve().as_uri()):
            note(f"no browser could be started; open {target} yourself")


def _extent(sources: Sources) -> str:
    """What the page holds, in words."""
    heads = sum(len(r.profiles) for r in sources.runs)
    found = [counted(heads, "head")] if sources.runs else []
    counts = {what: len(tables) for what, tables in sources.added.items()}
    counts.update({name: len(results) for name, results in sources.results.items()})
    plurals = {"bench": "benches", "diagnosis of heads": "diagnoses of heads"}
    return ", ".join([*found, *(counted(n, what, plurals.get(what)) for what, n in counts.items() if n)])


def _tokens(sources: Sources, dumps: Sequence[Path], tokenizer: Path | None) -> dict[tuple[str, str], list[bytes]]:
    """Token texts by (dump identity, prompt) of the dumps given."""
    if not dumps:
        return {}
    from anchorscope.dumps import open_dump
    from anchorscope.tokens import Vocabulary, load_vocabulary

    named = None if tokenizer is None else load_vocabulary(tokenizer)
    found: dict[tuple[str, str], list[bytes]] = {}
    for path in dumps:
        source = open_dump(path)
        if source.identity not in {r.identity for r in sources.runs}:
            raise InputError(f"--dump {path} is not the dump of any analysis given; name the one that was analyzed")
        warn_of_model(source)
        for prompt in source.prompts:
            if prompt.token_ids is not None:
                known = named or source.vocabulary or Vocabulary({})
                found[source.identity, prompt.name] = [known.piece(i) for i in prompt.token_ids]
        if not any(identity == source.identity for identity, _ in found):
            note(f"{path} records no token ids: the page shows positions only")
    return found
