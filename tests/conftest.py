"""Without a GPU the Triton kernels run in Triton's CPU interpreter, which must be chosen before they are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run faster on one thread than on several, above all while other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """One thread, and a clock that stands still, so that whole folders can be compared."""
    from resumable import still_clock

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with still_clock():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every resumable command can be given; see tests/helpers/resumable.py."""
    from resumable import Inputs

    return Inputs.make(tmp_path_factory.mktemp("inputs"), 96)
