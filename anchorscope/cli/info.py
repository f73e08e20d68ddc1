"""`anchorscope info`: what a folder of AnchorScope is and holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import live_bar, stdout_console, warn_of_model
from anchorscope.cli.tables import new_table, print_facts
from anchorscope.errors import DumpError
from anchorscope.files import human_bytes, visible
from anchorscope.shown import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

    from anchorscope.dumps import Dump, Prompt, Verification
    from anchorscope.runs.record import SourceRecord

SHOWN_DAMAGE = 10
SHOWN_PROOFS = 10


def info(
    dump: Annotated[
        Path, typer.Argument(help="A dump, a folder that any command wrote, or an anchors.json.", metavar="DIR")
    ],
    as_json: Annotated[bool, opt.prints_json("everything as JSON")] = False,
) -> None:
    """Show what a folder of AnchorScope is, what it holds, and whether it is whole; of a dump, verify every file.

    Exit code 0 if it is whole, 2 if it is damaged or unfinished. Files of a dump are verified, unverified (no
    checksums) or damaged.
    """
    from anchorscope.dumps import MANIFEST, verify

    if not (dump / MANIFEST).exists():
        _show_other(dump, as_json)
        return
    with live_bar() as bar:
        task = bar.add_task("verifying", total=None)
        result = verify(dump, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(describe(result), indent=2))
    else:
        _show(result)
    warn_of_model(result.dump)
    if result.damaged:
        raise DumpError(
            f"{len(result.damaged)} of {counted(len(result.checks), 'file')} of {dump}"
            f" {'is' if len(result.damaged) == 1 else 'are'} damaged: {result.damaged[0].detail}"
        )
    if not result.complete:
        raise DumpError(f"{dump} is an unfinished capture: run the same command with --resume")


def _show_other(path: Path, as_json: bool) -> None:
    """What is no dump, and the model and prompts of results that came from none.

    Raises:
        DumpError: it is damaged, unfinished, or nothing of AnchorScope.
    """
    from anchorscope.cli.folders import recognize
    from anchorscope.runs.record import read_record

    found = recognize(path)
    record = read_record(path)
    if as_json:
        about = {} if record is None else {"source": _record_json(record)}
        print(json.dumps({**found.to_json(), **about}, indent=2))
    else:
        print_facts(stdout_console(), found.lines)
        if record is not None:
            _show_record(record)
    if record is not None:
        warn_of_model(record)
    found.check()


def _record_json(record: SourceRecord) -> dict[str, Any]:
    """The model and the prompts of results, as JSON values."""
    about = {key: record.manifest.get(key) for key in ("identity", "model", "tokenizer", "capture", "proof")}
    return {**about, "prompts": _prompts(record.prompts)}


def _show_record(record: SourceRecord) -> None:
    console = stdout_console()
    console.print(f"{'ran':<8} {visible(_model_words(record.model), 600)}", soft_wrap=True, markup=False)
    table = new_table(("prompt", "tokens"), fold=("prompt",), padding=(0, 1), pad_edge=False)
    for p in record.prompts:
        table.add_row(p.name, str(p.tokens))
    console.print(table)
    _show_proof(console, record)


def _model_words(model: Mapping[str, Any]) -> str:
    kind = ", ".join(str(model[key]) for key in ("class", "dtype") if model.get(key))
    name = str(model.get("name") or "unknown")
    return f"{name} ({kind})" if kind else name


def _prompts(prompts: Iterable[Prompt]) -> list[dict[str, Any]]:
    """Prompts as JSON values, without texts and token ids."""
    return [
        {
            "name": p.name,
            "tokens": p.tokens,
            "sha256": p.sha256,
            "text": p.text is not None,
            "proof": None if p.proof is None else {**p.proof.to_json(), "near_chance": p.proof.near_chance},
        }
        for p in prompts
    ]


def describe(result: Verification) -> dict[str, Any]:
    """A verification as JSON values; `prompts` without texts and token ids."""
    dump = result.dump
    return {
        "path": str(dump.path),
        "kind": "dump",
        "state": result.state,
        "complete": result.complete,
        "identity": dump.identity,
        "version": dump.manifest["version"],
        "created": dump.manifest.get("created"),
        "created_by": dump.manifest.get("created_by"),
        "model": dump.model,
        "tokenizer": dump.manifest.get("tokenizer"),
        "proof": dump.manifest.get("proof"),
        "prompts": _prompts(dump.prompts),
        "entries": [
            {
                "prompt": e.prompt,
                "layer": e.layer,
                "file": e.file,
                "scale": e.scale,
                "window": e.window,
                "softcap": e.softcap,
                "query_heads": list(e.query_heads),
                "kv_heads": list(e.kv_heads),
                "tokens": e.tokens,
                "head_dim": e.head_dim,
                "dtype": e.dtype,
                "values": e.has_values,
                "bytes": e.bytes,
            }
            for e in dump.entries
        ],
        "checks": [
            {"prompt": c.prompt, "layer": c.layer, "file": c.file, "state": c.state, "detail": c.detail}
            for c in result.checks
        ],
    }


def _show(result: Verification) -> None:
    from anchorscope.parse import describe_indices

    dump, console = result.dump, stdout_console()
    size = human_bytes(sum(entry.bytes for entry in dump.entries))
    lines = {
        "dump": str(dump.path),
        "model": _model_words(dump.model or {}),
        "created": " by ".join(str(dump.manifest.get(key) or "unknown") for key in ("created", "created_by")),
        "size": f"{size} in {counted(len(dump.entries), 'file')}",
        "state": result.state + ("" if result.complete else ", unfinished"),
    }
    print_facts(console, lines)

    # one row for each kind of layer of a prompt: hybrids and windows show at a glance
    groups: dict[tuple[str, ...], list[int]] = {}
    for e in dump.entries:
        kind_of = (
            e.prompt,
            str(e.tokens),
            f"{len(e.query_heads)}/{len(e.kv_heads)}",
            str(e.head_dim),
            e.dtype,
            "yes" if e.has_values else "no",
            "-" if e.window is None else str(e.window),
            "-" if e.softcap is None else f"{e.softcap:g}",
        )
        groups.setdefault(kind_of, []).append(e.layer)
    titles = ("prompt", "tokens", "heads/kv", "d", "dtype", "V", "window", "cap", "layers")
    table = new_table(
        titles,
        fold=("prompt", "layers"),
        drop=("cap", "window", "V", "d", "dtype"),
        padding=(0, 1),
        pad_edge=False,
    )
    for cells, layers in groups.items():
        table.add_row(*cells, describe_indices(layers))
    if groups:
        console.print(table)
    _show_proof(console, dump)
    # heads are worth a line only where some were left out
    for picked in dict.fromkeys(e.query_heads for e in dump.entries):
        if picked != tuple(range(len(picked))):
            console.print(f"query heads {describe_indices(picked)}", soft_wrap=True, markup=False)
    for check in result.damaged[:SHOWN_DAMAGE]:
        console.print(f"damaged: {check.detail}", soft_wrap=True, markup=False)
    if len(result.damaged) > SHOWN_DAMAGE:
        console.print(f"... and {len(result.damaged) - SHOWN_DAMAGE} more damaged files")


def _show_proof(console: Console, dump: Dump | SourceRecord) -> None:
    """What shows that the model is what it claims to be: what its loader reported, and what it predicts."""
    known = dump.manifest.get("proof")
    if known is not None:
        print_facts(console, {"loader": _loader_words(known.get("loader"))})
    proofs = [(p.name, p.proof) for p in dump.prompts if p.proof is not None]
    if not proofs:
        return
    titles = ("prompt", "predicted", "run of", "perplexity", "top 1", "")
    table = new_table(titles, fold=("prompt", ""), drop=("run of", "predicted"), padding=(0, 1), pad_edge=False)
    for name, proof in proofs[:SHOWN_PROOFS]:
        cells = ("-", "-", f"not scored: {visible(proof.reason or '')}")
        if proof.perplexity is not None:
            cells = f"{proof.perplexity:.5g}", f"{proof.accuracy:.1%}", "near chance" if proof.near_chance else ""
        table.add_row(name, str(proof.tokens), str(proof.context), *cells)
    console.print(table)
    if len(proofs) > SHOWN_PROOFS:
        console.print(f"... and {len(proofs) - SHOWN_PROOFS} more prompts, with --json")


def _loader_words(loader: object) -> str:
    """What the loader reported, in a few words; all of it is in --json."""
    if not isinstance(loader, dict):
        return "not asked: the model was handed over loaded"
    unused, metadata = loader.get("unexpected"), loader.get("metadata")
    words = "no weight missing"
    if isinstance(unused, list) and unused:
        words += f", {len(unused)} of the checkpoint's tensors unused"
    if isinstance(metadata, dict) and isinstance(metadata.get("keys"), dict):
        words += f"; the config agrees with {counted(len(metadata['keys']), 'key')} of the file's metadata"
        if isinstance(metadata.get("set"), dict) and metadata["set"]:
            words += f", after {', '.join(metadata['set'])} were set to it"
    return words
