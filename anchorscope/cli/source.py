"""Where a command's layers come from: a dump, or a model that runs. The options of the model stand here once.

    @runs_models
    def analyze(out: opt.Out, dump: opt.DumpOrNone = None, ..., *, run: ModelChoice) -> None:

gives the command `--model`, `--prompt` and all the others, and hands them over as one object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import note, quiet_loading
from anchorscope.cli.help import completes
from anchorscope.errors import InputError
from anchorscope.files import MAX_PROMPT_BYTES, read_stdin
from anchorscope.parse import check_word

if TYPE_CHECKING:
    from anchorscope.models import PromptInput
    from anchorscope.runs.sources import Source

STDIN = "-"


@dataclass(frozen=True)
class ModelChoice:
    """What the user says of a model to run; every field is an option, its default means that it was not given."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help=f"{opt.MODEL} (default: none, give DIR)",
            metavar="MODEL",
            autocompletion=completes(lambda: opt.PRESETS),
        ),
    ] = None
    prompt: opt.PromptFiles = None
    text: opt.Texts = None
    token_ids: opt.TokenIdFiles = None
    chat: opt.Chat = False
    no_special_tokens: opt.NoSpecialTokens = False
    tokens: opt.PromptTokens = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What layers are rounded to before they are measured: bf16, fp16 or fp32. (default: the run's)",
            metavar="DTYPE",
            autocompletion=completes(lambda: opt.DTYPES),
        ),
    ] = None
    model_dtype: opt.ModelDtype = None
    chunk: opt.Chunk = None
    revision: opt.Revision = None
    trust_remote_code: opt.TrustRemoteCode = False

    def source(self, command: str, dump: Path | None, device: str) -> Source:
        """The dump in a folder, or the model, which is loaded when something of it is asked for.

        Args:
            command: the subcommand.
            dump: its argument, or None.
            device: where the model runs.

        Raises:
            InputError: neither, both, options that contradict each other, or prompts that cannot be read.
            DumpError: the dump is missing or damaged.
        """
        self.check(command, dump is not None)
        if dump is not None:
            from anchorscope.dumps import open_dump

            return open_dump(dump)
        return self.running(device)

    def check(self, command: str, dump: bool) -> None:
        """Refuse both or none of dump and model, and options of a model without one.

        Raises:
            InputError: with what to give.
        """
        if self.model is None:
            for item in fields(self):
                if getattr(self, item.name) != item.default:
                    name = "--" + item.name.replace("_", "-")
                    more = "; the prompts of a dump are chosen with --prompts" if item.name == "prompt" else ""
                    raise InputError(f"{name} is about the model that --model names: give --model too{more}")
        if dump and self.model is not None:
            raise InputError(f"{command} reads a dump or runs a model: give DIR or --model, not both")
        if not dump and self.model is None:
            raise InputError(
                f"{command} needs a dump, or a model and its prompts: anchorscope {command} DIR --out OUT, or"
                f" anchorscope {command} --model MODEL --prompt FILE --out OUT"
            )

    def running(self, device: str) -> Source:
        """The model as a source of layers.

        Raises:
            InputError: an unknown dtype, or prompts that cannot be read.
            MissingBackendError: transformers is missing.
        """
        assert self.model is not None
        check_dtypes(self.dtype, self.model_dtype)
        from anchorscope.models.load import quiet_transformers, require_transformers

        inputs = prompt_inputs(self.prompt or [], self.text or [], self.token_ids or [])
        require_transformers()
        from anchorscope.capture import ModelSource

        quiet_transformers()
        source = ModelSource(
            self.model,
            inputs,
            notify=note,
            tokens=self.tokens,
            dtype=self.dtype,
            model_dtype=self.model_dtype,
            device=device,
            chunk=self.chunk,
            chat=self.chat,
            special_tokens=not self.no_special_tokens,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        source.request.check()
        note(f"loading {self.model}")
        return source


def runs_models(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `ModelChoice`, in place of its parameter `run`."""
    signature = inspect.signature(command, eval_str=True)
    mine = list(inspect.signature(ModelChoice, eval_str=True).parameters.values())
    others = [p for p in signature.parameters.values() if p.name != "run"]
    first = sum(p.name in ("dump", "sources", "out") for p in others)
    shown = [p.replace(kind=p.KEYWORD_ONLY) for p in (*others[:first], *mine, *others[first:])]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        own = {p.name: given.pop(p.name) for p in mine}
        for option in ("ray", "shard", "devices"):
            if own["model"] is not None and given.get(option) is not None:
                raise InputError(
                    f"--model and --{option} contradict each other: the layers of a running model are measured where it"
                    " runs; capture the prompts and give the dump"
                )
        if own["model"] is not None:
            quiet_loading(own["model"])  # before anything imports tqdm
        command(**given, run=ModelChoice(**own))

    call.__signature__ = inspect.Signature(shown, return_annotation=None)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in shown}
    return call


def check_dtypes(dtype: str | None, model_dtype: str | None) -> None:
    """Refuse unknown types.

    Raises:
        InputError: the option is named.
    """
    for option, value in (("--dtype", dtype), ("--model-dtype", model_dtype)):
        if value is not None:
            check_word(option, value, opt.DTYPES)


def prompt_inputs(prompts: list[str], texts: list[str], token_ids: list[str]) -> list[PromptInput]:
    """What --prompt, --text and --token-ids give.

    Raises:
        InputError: nothing, standard input twice, or a file that cannot be read.
    """
    if not prompts and not texts and not token_ids:
        raise InputError("give at least one prompt with --prompt FILE, --text TEXT or --token-ids FILE")
    if [*prompts, *token_ids].count(STDIN) > 1:
        raise InputError("standard input can be read once only: give - to one option")
    from anchorscope.models.prompts import PromptInput, decode, parse_token_ids, prompt_from_file, token_ids_from_file

    inputs: list[PromptInput] = []
    for name in prompts:
        if name == STDIN:
            inputs.append(PromptInput("stdin", decode(read_stdin(MAX_PROMPT_BYTES), "standard input")))
        else:
            inputs.append(prompt_from_file(name))
    inputs += [PromptInput("text", decode(item.encode("utf-8", "surrogateescape"), "--text")) for item in texts]
    for name in token_ids:
        if name == STDIN:
            ids = parse_token_ids(read_stdin(MAX_PROMPT_BYTES), "standard input")
            inputs.append(PromptInput("stdin", token_ids=ids))
        else:
            inputs.append(token_ids_from_file(name))
    return inputs
