"""Capture from any PyTorch code: watch `torch.nn.functional.scaled_dot_product_attention`, no transformers needed.

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

from anchorscope.dtypes import dtype_name
from anchorscope.dumps.writer import DumpWriter, prompt_record
from anchorscope.errors import InputError
from anchorscope.models.check import check_call, check_output, visible_window
from anchorscope.models.hook import AttentionCall


class _Sdpa(nn.Module):
    """Stands for the module that a plain function call has none of."""


@contextlib.contextmanager
def capture_sdpa(
    out: str | os.PathLike[str],
    *,
    prompt: str = "prompt",
    layers: Sequence[int] | None = None,
    token_ids: Sequence[int] | None = None,
    text: str | None = None,
    overwrite: bool = False,
) -> Iterator[list[int]]:
    """Write a dump of the `scaled_dot_product_attention` calls that one forward makes inside the context.

    Args:
        out: the dump's folder.
        prompt: the prompt's name in the dump.
        layers: which calls to keep, counted from 0; all by default.
        token_ids: the prompt's token ids, if they are to be recorded.
        text: its text, likewise.
        overwrite: replace a dump that is there.

    Yields:
        The numbers of the calls captured so far. The dump is complete when the context has been left.

    Raises:
        InputError: no call was made, one that Q, K and V cannot represent, a batch, calls of different lengths (a
            second forward, or one with a cache), or a folder that cannot be used.
        RunFailure: the disk is full or failed.
    """
    functional: Any = nn.functional
    original: Callable[..., Tensor] = functional.scaled_dot_product_attention
    stack = contextlib.ExitStack()
    done: list[int] = []
    count = 0
    writer: DumpWriter | None = None
    length = 0

    def watched(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        nonlocal count, writer, length
        result = original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        layer, count = count, count + 1
        if layers is not None and layer not in layers:
            return result
        call = AttentionCall(
            module=_Sdpa(),
            layer=layer,
            implementation="sdpa",
            q=query,
            k=key,
            v=value,
            mask=_four(attn_mask),
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            options={"is_causal": is_causal, "dropout": dropout_p},
            output=result.transpose(1, 2) if result.ndim == 4 else result,
        )
        check_call(call)
        heads, n, head_dim = query.shape[1:]
        if writer is None:
            header = {"model": None, "prompts": [prompt_record(prompt, n, text=text, token_ids=token_ids)]}
            writer = stack.enter_context(DumpWriter(out, header, overwrite=overwrite))
            length = n
        if n != length or key.shape[2] != n:
            raise InputError(
                f"call {layer} has {n} queries and {key.shape[2]} keys where the prompt has {length} tokens:"
                " capture one forward over the whole prompt, without a cache"
            )
        window = visible_window(call, 0)
        check_output(call, 0, window, None)
        file = writer.layer(
            prompt,
            layer,
            query_heads=list(range(heads)),
            kv_heads=list(range(key.shape[1])),
            tokens=n,
            head_dim=head_dim,
            dtype=dtype_name(query.dtype),
            scale=call.scale,
            window=window,
        )
        try:
            for name, x in (("q", query), ("k", key), ("v", value)):
                file.put(name, 0, x[0])
            file.close()
        except BaseException:
            file.abort()
            raise
        done.append(layer)
        return result

    with stack:
        functional.scaled_dot_product_attention = watched
        try:
            yield done
        finally:
            functional.scaled_dot_product_attention = original
        if layers is not None and (missing := sorted(set(layers) - set(done))):
            raise InputError(f"call {missing[0]} was not made: the code made {count} calls")
        if writer is None:
            raise InputError(
                "torch.nn.functional.scaled_dot_product_attention was never called inside the context"
                " (code that imported the function by name is not seen)"
            )
        writer.finish()


def _four(mask: Tensor | None) -> Tensor | None:
    """A mask with batch and head dimensions in front, as it broadcasts."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None]
    return mask


__all__ = ["capture_sdpa"]
