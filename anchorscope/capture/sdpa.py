"""`capture_sdpa` captures from any PyTorch code by watching `torch.nn.functional.scaled_dot_product_attention`.

    with capture_sdpa("dump", prompt="p") as calls:
        model(ids)                 # one forward over the whole prompt

Calls count as layers in the order in which they are made. Each is checked like a transformers layer: its mask must be
causal with at most a sliding window, and a few rows of its output are recomputed. The function is replaced in
`torch.nn.functional` while the context is open and restored in `finally`; code that imported the function by name
before keeps the original and is not seen, which an empty capture says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from anchorscope.capture.recorder import Recorder
from anchorscope.dumps.writer import DumpWriter, prompt_record, texts_record
from anchorscope.errors import InputError
from anchorscope.models.calls import AttentionCall
from anchorscope.models.check import check_call
from anchorscope.shown import counted
from anchorscope.tokens import tokenizer_texts


class _Sdpa(nn.Module):
    """Stands for the attention module, which a plain function call does not have."""


@contextlib.contextmanager
def capture_sdpa(
    out: str | os.PathLike[str],
    *,
    prompt: str = "prompt",
    layers: Sequence[int] | None = None,
    token_ids: Sequence[int] | None = None,
    text: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Iterator[list[int]]:
    """Write a dump of the `scaled_dot_product_attention` calls that one forward makes inside the context.

    Args:
        out, overwrite: the dump's folder, and whether a dump that is there is replaced.
        prompt: the prompt's name in the dump.
        layers: which calls to keep, counted from 0; all by default.
        token_ids, text: the prompt's token ids and text, if they are to be recorded.
        tokenizer: a transformers tokenizer, so that results show words for `token_ids`.

    Yields:
        The numbers of the calls captured so far; the dump is complete when the context has been left.

    Raises:
        InputError: no call was made, one has a batch or is not determined by Q, K and V, calls differ in length (a
            second forward, or one with a cache), or the folder cannot be used.
        RunFailure: the disk is full or failed.
    """
    functional: Any = nn.functional
    original = functional.scaled_dot_product_attention
    with contextlib.ExitStack() as stack:

        def begin(tokens: int) -> DumpWriter:
            header = _header(tokenizer, prompt_record(prompt, tokens, text=text, token_ids=token_ids))
            return stack.enter_context(DumpWriter(out, header, overwrite=overwrite))

        calls = _Calls(begin, prompt, layers)

        def watched(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **options: Any,
        ) -> Tensor:
            result = original(query, key, value, attn_mask, dropout_p, is_causal, **options)
            scale = query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
            output = result.transpose(1, 2) if result.ndim == 4 else result
            said = {"is_causal": is_causal, "dropout": dropout_p}
            mask = _four(attn_mask)
            calls.add(AttentionCall(_Sdpa(), calls.count, "sdpa", query, key, value, mask, float(scale), said, output))
            return result

        functional.scaled_dot_product_attention = watched
        try:
            yield calls.done
        finally:
            functional.scaled_dot_product_attention = original
        calls.finish()


def _header(tokenizer: Any, record: dict[str, Any]) -> dict[str, Any]:
    """The manifest without its entries."""
    ids = record.get("token_ids", ())
    texts = None if tokenizer is None else tokenizer_texts(tokenizer, ids)
    return {"model": None, "prompts": [record], **texts_record(texts, ids)}


class _Calls:
    """The calls of one forward. They are counted, and the wanted ones are written.

    Args:
        begin: makes the dump for a prompt of so many tokens.
        prompt: the prompt's name.
        layers: which calls to keep; None means all.
    """

    def __init__(self, begin: Callable[[int], DumpWriter], prompt: str, layers: Sequence[int] | None) -> None:
        self.count = 0
        self.done: list[int] = []
        self._begin = begin
        self._prompt = prompt
        self._layers = layers
        self._dump: DumpWriter | None = None
        self._tokens = 0

    def add(self, call: AttentionCall) -> None:
        """Count a call, and write it if it is wanted.

        Raises:
            InputError: as `capture_sdpa`.
        """
        layer, self.count = self.count, self.count + 1
        if self._layers is not None and layer not in self._layers:
            return
        check_call(call)
        n, keys = call.q.shape[2], call.k.shape[2]
        if self._dump is None:
            self._dump, self._tokens = self._begin(n), n
        if n != self._tokens or keys != n:
            raise InputError(
                f"call {layer} has {counted(n, 'query', 'queries')} and {counted(keys, 'key')} where the prompt"
                f" has {counted(self._tokens, 'token')}:"
                " capture one forward over the whole prompt, without a cache"
            )
        recorder = Recorder(self._dump, self._prompt, n, [layer])
        try:
            recorder(call)
        finally:
            recorder.abort()
        self.done.append(layer)

    def finish(self) -> None:
        """Complete the dump.

        Raises:
            InputError: a wanted call, or any call at all, was not made.
        """
        if self._layers is not None and (missing := sorted(set(self._layers) - set(self.done))):
            raise InputError(f"call {missing[0]} was not made: the code made {counted(self.count, 'call')}")
        if self._dump is None:
            raise InputError(
                "torch.nn.functional.scaled_dot_product_attention was never called inside the context"
                " (code that imported the function by name is not seen)"
            )
        self._dump.finish()


def _four(mask: Tensor | None) -> Tensor | None:
    """Return a mask with its missing leading dimensions, as it broadcasts."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None]
    return mask


__all__ = ["capture_sdpa"]
