"""What a result depends on besides its request: versions, the precision of products."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from anchorscope._version import __version__


def versions() -> dict[str, str]:
    """Versions that a reader needs to reproduce a result."""
    found = {
        "anchorscope": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


@contextmanager
def full_precision() -> Iterator[None]:
    """Exact float32 products while inside: no TF32 or bfloat16 shortcuts, whatever the caller's setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
