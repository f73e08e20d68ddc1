"""What capture makes of each model family: `python tests/helpers/family_runs.py docs/families.md` writes the table.

What a family does depends on the transformers that is installed, so nothing here expects a family to be refused. It is
either captured right, or refused with a reason. Right means: the attention weights recomputed in float64 from the dump
alone equal those that the same model returns with its own eager attention, with no code of this project in between,
and the attention output recomputed likewise equals the model's own.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, TOLERANCE, collect, prompt, recompute, recomputed_weights, relative, tiny

from anchorscope.capture import capture_model
from anchorscope.dumps import Dump
from anchorscope.errors import InputError

CHUNK = 17
WEIGHTS_TOLERANCE = 1e-4  # two float32 runs of one model; scores reach 80 nats, where float32 rounds by 8e-6
# Plain transformers models: whatever the version, these are captured, in chunks too.
CORE = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
# A refusal says one of these.
NEVER_CALLED = "never called transformers' attention interface"
REASON = re.compile(
    NEVER_CALLED + r"|bidirectional|low-rank latent|more than once|holds a bias|position bias|learned attention sinks"
    r"|not causal with at most a sliding window|encoder-decoder"
)
NO_CHUNKS = re.compile(r"in chunks|keeps no KV cache")


class UnknownFamily(Exception):
    """The installed transformers cannot build or run the tiny model of a family."""


@dataclass(frozen=True)
class Row:
    """One family's line: `reason` is empty for families that were captured.

    Attributes:
        weights_error: largest difference of an attention weight from eager attention's; None where the model returns
            no weights.
        output_error: of the attention output, relative to the largest value.
        chunk_error: of Q, K and V captured in chunks, likewise; None where that is refused, for `chunk_reason`.
    """

    family: str
    model: str
    reason: str = ""
    attention: str = ""
    dumped: str = ""
    windows: str = ""
    softcap: float | None = None
    weights_error: float | None = None
    output_error: float = 0.0
    chunk_error: float | None = None
    chunk_reason: str = ""

    def stable(self) -> str:
        """The line of the table without its figures, which differ from machine to machine."""
        if self.reason:
            return f"| {self.family} | {self.model} | {self.reason} |"
        cap = "" if self.softcap is None else f"{self.softcap:g}"
        return f"| {self.family} | {self.model} | {self.attention} | {self.dumped} | {self.windows} | {cap} |"


def runnable(family: str, **changes: Any) -> Any:
    """A family's tiny model, which has run a forward of its own.

    Raises:
        UnknownFamily: this transformers has no such family, or fails with the tiny model by itself.
        Exception: the same of a core family, as it was raised.
    """
    try:
        model = tiny(family, **changes)
        forward(model)
    except Exception as error:
        if family in CORE:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnknownFamily(f"transformers {transformers.__version__} has no working {family}: {what}") from error
    return model


def forward(model: Any, **options: Any) -> Any:
    """One forward over the prompt, also of an encoder-decoder."""
    ids = torch.tensor([prompt().token_ids])
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options)


def eager_weights(family: str) -> list[torch.Tensor] | None:
    """Attention weights (H, N, N) of every softmax layer, by the model's own eager attention, where it returns any."""
    result = forward(runnable(family, attn_implementation="eager"), output_attentions=True)
    n = len(prompt().token_ids or ())
    found = [x[0] for x in getattr(result, "attentions", None) or () if x is not None and x.shape[-2:] == (n, n)]
    return found or None


def interface_calls(family: str) -> int:
    """How many attention calls one forward makes through transformers' interface, counted without this project."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = 0

    def count(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("counting", count)
    try:
        forward(tiny(family, attn_implementation="counting"))
    except Exception:
        if calls == 0:  # the model refuses every attention but those it names
            return 0
        raise
    finally:
        AttentionInterface._global_mapping.pop("counting")
    return calls


def run_family(family: str, folder: Path) -> Row:
    """Capture a family's tiny model whole and in chunks, and compare with the model itself.

    Raises:
        UnknownFamily: the model does not run without this project either.
        AssertionError: what was captured is not what attention consumed.
    """
    model = runnable(family)
    name = type(model).__name__
    p = prompt()
    try:
        dump = capture_model(model, [p], folder / "whole", notify=_ignore)
    except InputError as error:
        assert not (folder / "whole").exists()
        return Row(family, name, reason=_short(str(error), name))
    output_error, weights_error = compare_whole(family, model, dump)
    chunk_error: float | None = None
    chunk_reason = ""
    try:
        parts = capture_model(model, [p], folder / "parts", chunk=CHUNK, notify=_ignore)
    except InputError as error:
        chunk_reason = _short(str(error), name)
    else:
        chunk_error = compare_chunks(dump, parts)
    config = model.config.get_text_config(decoder=True)
    count = max(len(getattr(config, "layer_types", None) or ()), int(getattr(model.config, "num_hidden_layers", 0)))
    windows = [e.window for e in dump.entries]
    return Row(
        family,
        name,
        attention=model.config._attn_implementation,
        dumped="all" if len(windows) == count else f"{len(windows)} of {count}",
        windows="" if not any(windows) else f"{sum(w is not None for w in windows)} of {len(windows)}",
        softcap=dump.entries[0].softcap,
        output_error=output_error,
        weights_error=weights_error,
        chunk_error=chunk_error,
        chunk_reason=chunk_reason,
    )


def compare_whole(family: str, model: Any, dump: Dump) -> tuple[float, float | None]:
    """Errors of a dump's attention output and weights; the weights are those of the same model in eager attention."""
    calls = collect(model, prompt().token_ids or ())
    output_error = 0.0
    for entry in dump.entries:
        call, t = calls[entry.layer], dump.load(entry)
        assert torch.equal(t.q, call.q[0]), f"{family}: q of layer {entry.layer} is not what attention consumed"
        assert torch.equal(t.k, call.k[0]), f"{family}: k of layer {entry.layer} is not what attention consumed"
        output_error = max(output_error, relative(recompute(dump, entry), call.output[0].transpose(0, 1).double()))
    expected = eager_weights(family)
    if expected is None:
        return output_error, None
    assert len(expected) == len(dump.entries), f"{family}: the dump lacks layers that use softmax attention"
    differences = [
        float((recomputed_weights(dump, entry) - weights).abs().max())
        for entry, weights in zip(dump.entries, expected, strict=True)
    ]
    return output_error, max(differences)


def compare_chunks(dump: Dump, parts: Dump) -> float:
    """Largest relative difference of Q, K and V between two dumps of one prompt."""
    worst = 0.0
    for a, b in zip(dump.entries, parts.entries, strict=True):
        assert (a.layer, a.window, a.softcap, a.scale) == (b.layer, b.window, b.softcap, b.scale)
        one, two = dump.load(a), parts.load(b)
        for x, y in ((one.q, two.q), (one.k, two.k), (one.v, two.v)):
            assert x is not None
            assert y is not None
            worst = max(worst, relative(y, x))
    return worst


def check_refusal(family: str, message: str) -> None:
    """Assert that a refusal names a reason, and that the reason is true where this can be known independently."""
    assert family not in CORE, message
    assert REASON.search(message), message
    if NEVER_CALLED in message:
        assert interface_calls(family) == 0


def check(row: Row) -> None:
    """Assert that a family is captured right, or refused with a reason."""
    if row.reason:
        check_refusal(row.family, row.reason)
        return
    assert row.output_error < TOLERANCE
    assert row.weights_error is not None or row.family not in CORE
    assert (row.weights_error or 0.0) < WEIGHTS_TOLERANCE
    if row.chunk_error is None:
        assert row.family not in CORE, row.chunk_reason
        assert NO_CHUNKS.search(row.chunk_reason), row.chunk_reason
    else:
        assert row.chunk_error < TOLERANCE


def table(rows: list[Row]) -> str:
    """docs/families.md."""
    good = [r for r in rows if not r.reason]
    lines = [
        "# Model families",
        "",
        "Which transformers families `anchorscope capture` supports, and why it refuses the others. `make families`",
        f"wrote this from tiny random models with transformers {transformers.__version__}. Another version may support"
        " more or fewer families:",
        "the tests check each with the version that is installed, and it is captured right or refused with a reason.",
        "",
        "- **weights**: attention weights recomputed in float64 from the dump alone against those that the same model",
        "  returns with its own eager attention in float32, largest difference in any layer.",
        "- **output**: attention output recomputed likewise against the model's own, relative to the largest value.",
        "- **chunks**: Q, K and V captured with `--chunk` against those captured whole, likewise.",
        "- **layers**: hybrids mix attention with recurrent or convolution layers; only softmax layers are dumped.",
        "",
        "Families that are not listed are not refused: each call is compared with what a dump can represent while the",
        "model runs, so what is captured is right or the capture stops with a sentence.",
        "",
        f"## Supported: {len(good)}",
        "",
        "| family | class | attention | layers | windows | soft-cap | weights | output | chunks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in good:
        chunks = f"{r.chunk_error:.0e}" if r.chunk_error is not None else "refused (1)"
        weights = "" if r.weights_error is None else f"{r.weights_error:.0e}"
        lines.append(f"{r.stable()} {weights} | {r.output_error:.0e} | {chunks} |")
    lines += [
        "",
        "(1) transformers' own cache of these does not carry their state from chunk to chunk, or none: a short",
        "prompt run in pieces gives other queries than run whole. Capture them without `--chunk`.",
        "",
        f"## Refused: {len(rows) - len(good)}",
        "",
        "| family | class | reason |",
        "|---|---|---|",
    ]
    lines += [r.stable() for r in rows if r.reason]
    return "\n".join(lines) + "\n"


def parse_table(text: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The version that docs/families.md was made with, and its lines by family: supported, refused."""
    version = re.search(r"with transformers (\S+)\. ", text)
    assert version is not None
    good, bad = (dict(re.findall(r"^(?=\| (\w+) \| [A-Z]\w+ \|)(.+)$", x, re.M)) for x in text.split("## Refused"))
    return version[1], good, bad


def _short(message: str, model: str) -> str:
    """The reason in a refusal, without the advice that follows it."""
    message = re.sub(r"; Q, K and V alone do not reproduce it.*", "", message)
    message = re.sub(r" cannot be captured", "", message)
    return message.replace(f"{model} ", "", 1).replace(f"model {model} ", "", 1)


def _ignore(_: str) -> None:
    pass


def main(target: str) -> None:
    """Run every family, check it and write the table."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in sorted(FAMILIES):
            rows.append(run_family(family, Path(folder) / family))
            check(rows[-1])
            print(rows[-1], file=sys.stderr)
    Path(target).write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
