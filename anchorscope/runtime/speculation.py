"""`candidates` finds how many queries of a call are candidates of speculative decoding, which never runs sparse.

After the prefill, candidates come in short calls that follow a cache. The first ones, though, come in one forward with
the prompt: nothing in the call tells where the prompt ends, only `generate` knows. So its stack frame is read.
"""

from __future__ import annotations

import sys

from anchorscope.models.calls import AttentionInputs


def candidates(call: AttentionInputs) -> int:
    """Return how many of a call's last queries are candidates that transformers' assisted generation wants verified.

    After the first forward these are all queries; outside of assisted generation, and in the assistant's own forwards,
    there are none.
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
