"""Memory that a kernel forgets to write shows as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill fresh memory with NaN (or a large integer), so that anything read before it is written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():  # several processes share the GPU's memory
        torch.cuda.empty_cache()
