"""Arguments and options that several commands share: each name, type and help text once.

A command writes `layers: opt.Layers = "all"`; the default is its own. Where the text says what a command writes, a
function makes the option: `overwrite: Annotated[bool, opt.overwrites("an earlier run in OUT")] = False`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from anchorscope.cli.help import completes
from anchorscope.errors import BadOption, InputError
from anchorscope.parse import parse_tokens
from anchorscope.pictures import FORMATS

# Words that a shell completes without loading what knows them; a test keeps them true.
DTYPES = ("bf16", "fp16", "fp32")
PRESETS = ("smollm2",)


def share(option: str, text: str) -> Any:
    """An option that takes a share from 0 to 1.

    Args:
        option: its name: "--target-recall".
        text: its help.
    """
    return typer.Option(option, help=text, metavar="SHARE")


def token_count(option: str, text: str, least: int = 1) -> Any:
    """An option that takes a number of tokens, written as 4096 or 4k (4,096).

    Args:
        option: its name: "--block".
        text: its help.
        least: the smallest number that makes sense.
    """
    return typer.Option(option, help=text, metavar="TOKENS", parser=_tokens_of(option, least))


def _tokens_of(option: str, least: int) -> Callable[[str | int], int]:
    def parse(text: str | int) -> int:
        if isinstance(text, int):  # a default
            return text
        try:
            return parse_tokens(text, option, least)
        except InputError as error:  # a ValueError, which typer would put into words of its own
            raise BadOption(str(error)) from None

    return parse


# What is read
MODEL = "Hugging Face id, like Qwen/Qwen3-8B; local folder; .gguf file; or the preset smollm2."
DumpFolder = Annotated[Path, typer.Argument(help="Dump folder written by `capture` or `write_dump`.", metavar="DIR")]
DumpOrNone = Annotated[
    Path | None,
    typer.Argument(
        help="Dump folder written by `capture` or `write_dump`; or give --model and its prompts.", metavar="DIR"
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help=MODEL,
        metavar="MODEL",
        autocompletion=completes(lambda: PRESETS),
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a Hugging Face id. (default: its main branch)", metavar="REVISION"),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first.")
]
ModelDtype = Annotated[
    str | None,
    typer.Option(
        help="What the model computes in: bf16, fp16 or fp32. (default: its checkpoint's; fp32 for GGUF)",
        metavar="DTYPE",
        autocompletion=completes(lambda: DTYPES),
    ),
]
PromptFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="UTF-8 text file, or - for standard input; repeat it for several. (default: none)",
        metavar="FILE",
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="A prompt given as is; repeat it for several. (default: none)", metavar="TEXT"),
]
TokenIdFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--token-ids",
        help="File of token ids, a JSON list or numbers, or - for standard input; repeat it for several."
        " (default: none)",
        metavar="FILE",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put each text into the model's chat template.")]
NoSpecialTokens = Annotated[
    bool, typer.Option("--no-special-tokens", help="Let the tokenizer add none, like a begin-of-sequence.")
]
PromptTokens = Annotated[
    int | None,
    token_count("--tokens", "Prompt length N, like 4k; longer prompts are cut. (default: whole prompts)", 2),
]
Chunk = Annotated[
    int | None,
    token_count(
        "--chunk", "Prefill in pieces of this many tokens, for prompts that do not fit. (default: whole prompts)"
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="tokenizer.json, its folder, or a GGUF model: shows tokens as text. (default: as ids)", metavar="PATH"
    ),
]

# Which part of it
Layers = Annotated[str, typer.Option(help="Layers, like 0,5,10-15, or all.", metavar="LIST")]
Heads = Annotated[str, typer.Option(help="Query heads, like 0,2-4, or all.", metavar="LIST")]
Prompts = Annotated[str, typer.Option(help="Prompt names, separated by commas, or all.", metavar="NAMES")]

# What is computed, and where
Block = Annotated[int, token_count("--block", "Queries pooled together.")]
Step = Annotated[int, typer.Option(help="Query blocks that share one selection of stripes.", metavar="BLOCKS")]
Init = Annotated[int | None, token_count("--init", "First tokens always kept. (default: block)", 0)]
Lookback = Annotated[int | None, token_count("--lookback", "Tokens before a group always kept. (default: block)", 0)]
Backend = Annotated[
    str,
    typer.Option(
        help="Back end: auto (triton on a CUDA GPU, else torch), torch or triton.",
        metavar="NAME",
        autocompletion=completes(lambda: ("auto", "torch", "triton")),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto (a CUDA GPU if there is one), cpu, cuda, or the second GPU with cuda:1.",
        metavar="DEVICE",
        autocompletion=completes(lambda: ("auto", "cpu", "cuda")),
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="GPUs of this machine that share the work: all, or cuda:0,cuda:1. (default: --device alone)",
        metavar="LIST",
    ),
]
ShardOf = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Measure one share of the work, like 1/4, into its own folder, for `anchorscope merge`. (default: all)",
        metavar="I/N",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Measure on a Ray cluster: host:port of its head, or auto for the one that this machine is part of."
        " (default: none)",
        metavar="ADDRESS",
    ),
]

# What is written
Out = Annotated[
    Path,
    typer.Option("--out", help="Folder for the results; new, or an unfinished run to continue.", metavar="OUT"),
]
NoFigures = Annotated[bool, typer.Option("--no-figures", help="Write tables only.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="What figures are saved as, separated by commas: png, pdf, svg. (default: png)",
        metavar="FORMATS",
        autocompletion=completes(lambda: FORMATS),
    ),
]
Dpi = Annotated[
    int | None,
    typer.Option(
        help="Pixels per inch of PNG figures, and of the maps in PDF and SVG, 30 to 600. (default: 110)", metavar="DPI"
    ),
]
HeatMaps = Annotated[
    str | None,
    typer.Option(
        help="Heat maps to draw: layer:head pairs like 5:0,15:3, or all. (default: worst, median, best)",
        metavar="PAIRS",
    ),
]


def overwrites(what: str) -> Any:
    """The option --overwrite of a command that writes `what`, like "an earlier run in OUT"."""
    return typer.Option("--overwrite", help=f"Replace {what}.")


def prints_json(what: str) -> Any:
    """The option --json of a command that prints `what`, like "compare.json"."""
    return typer.Option("--json", help=f"Print {what}, and nothing else.")
