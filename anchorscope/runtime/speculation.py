"""How many queries of a call are candidates of speculative decoding, which is decoding and never runs sparse.

After the prefill, candidates come in pieces behind a cache. The first ones, though, come in one forward with the
prompt: nothing in the call tells where the prompt ends, only `generate` knows. So its frame is asked.
"""

from __future__ import annotations

import sys

from anchorscope.models.calls import AttentionInputs


def candidates(call: AttentionInputs) -> int:
    """The last so many queries of a call are candidates that transformers' assisted generation wants verified.

    All of them after the first forward; 0 outside of assisted generation, and in the assistant's own forwards.
    """
    n = call.q.shape[2]
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        name = frame.f_code.co_name
        if name == "get_candidates":
            return 0
        if name == "_assisted_decoding":
            known = frame.f_locals
            if not known.get("is_first_iteration", False):
                return n
            count = known.get("candidate_length", 0)
            return count if isinstance(count, int) and 0 <= count <= n else 0
    return 0
