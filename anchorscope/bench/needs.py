"""How much memory a case takes: the tensors that live at the same time, from shapes and dtypes."""

from __future__ import annotations

import math

import torch

from anchorscope.bench.cases import Case
from anchorscope.bench.measure import Setup

_SCORES = 1 << 26  # elements of a run of rows that exact attention computes at a time on a GPU
_CPU_BUFFERS = 16_000_000  # of matrix products, and freed memory that the C library keeps; as measured
_GPU_BUFFERS = 1 << 27  # scores of the torch stages on a GPU, as measured


def case_bytes(case: Case, setup: Setup, dtype: torch.dtype) -> int:
    """Bytes that a case takes at its peak, besides the libraries.

    On a CPU this was compared with the growth of the resident set, on a GPU with the allocator's peak. There the Triton
    stages have a state in the dtype of the queries, and a second one that repetitions add to.
    """
    on_gpu, triton = setup.device.type == "cuda", setup.backend.name == "triton"
    size, n = dtype.itemsize, case.n
    output = case.heads * n * case.head_dim  # elements of Q and of every output
    inputs = (output + 2 * case.kv_heads * n * case.head_dim) * size
    exact = 4 * output + 4 * case.heads * n
    state = (size if triton else 4) * output * (1 + 1 / setup.params.block) + 4 * case.heads * n
    most = 4 * case.heads * setup.params.at(n, case.window).most_stripes  # of all candidates as a list
    lists = [most if theta == math.inf else most // 10 for theta in setup.thetas]
    scores = 2 * 4 * min(_SCORES, case.heads // case.kv_heads * n**2) if on_gpu else _CPU_BUFFERS
    converted = 0 if dtype == torch.float32 else 4 * output

    names = setup.names(case)
    repeated = 2 * output * size if "efficient" in names and on_gpu and case.heads != case.kv_heads else 0
    held = inputs + exact + repeated + (0 if triton else _GPU_BUFFERS if on_gpu else _CPU_BUFFERS)
    timed = held + (2 if triton else 1) * state + sum(lists)
    return int(
        max(
            case.making,
            inputs + exact + converted + scores,  # exact attention itself
            held + output * size + (10 * case.heads * n**2 if "math" in names else 0),  # its scores, 2.5 times float32
            held + state + 2 * most + output * size,  # the check at theta = +inf
            timed + output * size + (most if triton else state + 2 * max(lists)),  # a whole pipeline
            timed + 2 * output * size + converted,  # its output against that of the stages
        )
    )
