"""What a result depends on besides its request: versions, hardware, the precision of products; said in one way."""

from __future__ import annotations

import importlib.metadata
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anchorscope._version import __version__
from anchorscope.elsewhere import elsewhere
from anchorscope.shown import threads_text


def versions() -> dict[str, str | None]:
    """Versions of everything that computes, or computed what is merged; None where it is not installed."""
    if (measured := elsewhere()) is not None:
        return dict(measured.versions)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "anchorscope": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def installed(name: str) -> str | None:
    """The version of a package, or None where it is not installed (or runs from a source tree)."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware_name(device: torch.device) -> str:
    """The device as people call it: the GPU's name, or "CPU, 2 threads"; where parts are merged, the one of theirs."""
    if (measured := elsewhere()) is not None:
        return measured.hardware
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {threads_text(torch.get_num_threads())}"


_precision_lock = threading.Lock()
_precision_before: list[str] = []  # the caller's setting, once for everybody inside


@contextmanager
def full_precision() -> Iterator[None]:
    """Exact float32 products while inside: no TF32 or bfloat16 shortcuts, whatever the caller's setting.

    The setting is of the process. The first to enter changes it and the last to leave restores it, whatever their
    threads and order, so that nobody inside ever computes at another precision.
    """
    with _precision_lock:
        if _precision_before:
            _precision_before.append(_precision_before[0])
        else:
            _precision_before.append(torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _precision_lock:
            before = _precision_before.pop()
            if not _precision_before:
                torch.set_float32_matmul_precision(before)
