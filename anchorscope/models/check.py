"""These checks decide whether Q, K and V alone represent an attention call.

A dump claims: output = softmax(softcap(scale * q.k) over visible keys) v, with key j visible to query i iff j <= i and
i - j < window. Everything a model does beyond that would be captured wrongly without anyone noticing, so each call is
compared with the claim: its options, its mask element by element, and a few rows of its output recomputed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anchorscope.errors import InputError
from anchorscope.models.calls import AttentionCall, AttentionInputs
from anchorscope.shown import counted

MASK_ROWS = 64  # rows of a mask that are compared at a time, which bounds the extra memory
CHECKED_ROWS = 8  # query positions whose output is recomputed
EPSILON = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
REASONS = {
    "s_aux": "learned attention sinks enter its softmax",
    "sinks": "learned attention sinks enter its softmax",
    "position_bias": "a position bias is added to its scores",
    "alibi": "a position bias is added to its scores",
    "head_mask": "a mask per head is applied",
    "cu_seq_lens_q": "several sequences are packed into one row",
}


class Unrepresentable(InputError):
    """Q, K and V alone do not determine this attention. `reason` says why, without naming what it was wanted for."""

    def __init__(self, call: AttentionInputs, reason: str) -> None:
        super().__init__(
            f"{call.name} cannot be captured: {reason}; Q, K and V alone do not reproduce it"
            " (choose other layers with --layers, or another model)"
        )
        self.reason = reason


def refuse(call: AttentionInputs, reason: str) -> Unrepresentable:
    """Return the error for attention that a dump cannot represent."""
    return Unrepresentable(call, reason)


def check_call(call: AttentionCall) -> None:
    """Refuse calls that one dump entry cannot represent.

    Raises:
        InputError: the layer is named, with the reason.
    """
    check_inputs(call)
    if call.q.shape[0] != 1:
        raise InputError(f"{call.name} got a batch of {call.q.shape[0]} prompts: capture one prompt at a time")


def check_inputs(call: AttentionInputs) -> None:
    """Refuse calls whose shapes or options already say that Q, K and V are not all there is.

    Raises:
        InputError: the layer is named, with the reason.
    """
    q, k, v = call.q, call.k, call.v
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise refuse(call, "its tensors are not (batch, heads, tokens, head_dim)")
    latent = getattr(getattr(call.module, "config", None), "kv_lora_rank", None)
    if latent or v.shape[-1] != q.shape[-1]:
        raise refuse(
            call,
            "multi-head latent attention reads K and V from a shared low-rank latent"
            if latent
            else f"its values have {counted(v.shape[-1], 'dimension')} where its keys have {q.shape[-1]}",
        )
    if k.shape != v.shape or q.shape[1] % k.shape[1] or k.shape[2] < q.shape[2]:
        raise refuse(call, f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not causal GQA")
    for key, reason in REASONS.items():
        if call.options.get(key) is not None:
            raise refuse(call, reason)
    if torch.is_autocast_enabled(q.device.type):
        raise refuse(call, "autocast rounds its products to another dtype (load the model in that dtype instead)")
    if call.options.get("dropout"):
        raise InputError(f"{call.name} applies dropout: call model.eval() first")


def visible_window(call: AttentionCall, start: int) -> int | None:
    """Return the sliding window that the call's mask implements, or None for full causal attention.

    A window that no query has reached yet is taken from the call's options.

    Args:
        call: the call.
        start: absolute position of its first query.

    Raises:
        InputError: the mask is not causal with at most a sliding window.
    """
    n, keys = call.q.shape[2], call.k.shape[2]
    total, hint = start + n, call.window
    if call.mask_tensor is not None:
        return _mask_window(call, call.mask_tensor, total, hint)
    if call.bidirectional:
        raise refuse(call, "it is bidirectional (no causal mask)")
    if "flash" in call.implementation or "flex" in call.implementation:
        return hint  # these take the window as an option; `check_output` shows whether they obey it
    if n > 1 and keys != n:
        raise refuse(call, f"{counted(keys, 'key')} for {counted(n, 'query', 'queries')} come without a mask")
    if hint is not None and hint < total and n > 1:
        hint = None  # this implementation ignores the option
    return hint


def _mask_window(call: AttentionCall, mask: Tensor, total: int, hint: int | None) -> int | None:
    n, keys = mask.shape[-2:]
    first_key = total - keys
    if n != call.q.shape[2] or keys != call.k.shape[2] or mask.shape[0] != 1:
        raise refuse(call, f"its mask {tuple(mask.shape)} does not fit {counted(call.q.shape[2], 'query', 'queries')}")
    last = visible(call, mask[0, 0, -1:])
    seen = int(last.sum())
    window = seen if seen < total else hint if hint is not None and hint >= total else None
    j = torch.arange(first_key, total, device=mask.device, dtype=torch.int32)
    for head in range(mask.shape[1]):
        for begin in range(0, n, MASK_ROWS):
            part = visible(call, mask[0, head, begin : begin + MASK_ROWS])
            i = torch.arange(begin, begin + part.shape[0], device=mask.device, dtype=torch.int32) + total - n
            if not torch.equal(part, causal_mask(i, j, window)):
                kind = "not causal with at most a sliding window (chunked, prefix or bidirectional attention)"
                raise refuse(call, f"its mask is {kind}")
    return window


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which keys each query sees, by position: those up to its own, and of these only the last `window`.

    Args:
        queries: (n,) integer positions.
        keys: (m,) integer positions.
        window: the sliding window, or None for full causal attention.

    Returns:
        (n, m) boolean.
    """
    seen = keys <= queries[:, None]
    return seen if window is None else seen & (queries[:, None] - keys < window)


def visible(call: AttentionInputs, mask: Tensor) -> Tensor:
    """Return a mask in boolean form. An additive one may hold only 0 (visible) and its dtype's lowest value or -inf."""
    if mask.dtype == torch.bool:
        return mask
    shown = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not bool((shown | hidden).all()):
        raise refuse(call, "its additive mask holds a bias")
    return shown


def check_output(call: AttentionCall, start: int, window: int | None) -> None:
    """Recompute a few rows of the call's output in float32 and compare them with what the model computed.

    The tolerance allows for the rounding of scores and weights in the model's dtype: a few units in the last place of
    the largest |score| and of the largest |value|.

    Raises:
        InputError: they differ, so the model does something that the dump would not show.
    """
    q, k, v, output = call.q[0], call.k[0], call.v[0], call.output
    heads, n, _ = q.shape
    kv, keys, _ = k.shape
    if tuple(output.shape) != (1, n, heads, v.shape[-1]):
        raise refuse(call, f"its output {tuple(output.shape)} is not (1, {n}, {heads}, {v.shape[-1]})")
    picks = {
        0,
        n - 1,
        n // 2,
        *(min(n - 1, (2 * c + 1) * n // CHECKED_ROWS) for c in range(CHECKED_ROWS // 2)),
    }
    rows = torch.tensor(sorted(picks), device=q.device)
    seen = causal_mask(rows + start, torch.arange(start + n - keys, start + n, device=q.device), window)
    group = heads // kv
    epsilon = EPSILON.get(q.dtype, 2.0**-7)
    if q.device.type != "cpu":
        epsilon = max(epsilon, 2.0**-10)  # float32 products may use TF32 there
    for row in range(kv):
        mine = q[row * group : (row + 1) * group, rows].float()  # [group, rows, d]
        s = mine @ k[row].float().T * call.scale
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        s = s.masked_fill(~seen, -torch.inf)
        values = v[row].float()
        expected = torch.softmax(s, -1) @ values
        actual = output[0, rows, row * group : (row + 1) * group].transpose(0, 1).float()
        largest = float(s.masked_fill(~seen, 0).abs().max())
        tolerance = 4 * epsilon * (4 + largest) * float(values.abs().max())
        error = float((expected - actual).abs().max())
        if not error <= tolerance and bool(torch.isfinite(actual).all()):
            head = row * group
            if error != error:
                raise refuse(
                    call,
                    f"queries, keys or values of heads {head} to {head + group - 1} hold NaN or infinity:"
                    " its weights are damaged, or it overflows its dtype",
                )
            raise refuse(
                call,
                f"its output differs from softmax(scale * Q K) V by {error:.3g}"
                f" (heads {head} to {head + group - 1};"
                f" rounding explains {tolerance:.1g})",
            )
