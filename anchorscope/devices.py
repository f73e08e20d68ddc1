"""Devices and back ends by name, for every command: chosen once, named, never changed silently."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

import torch

from anchorscope.elsewhere import elsewhere
from anchorscope.errors import InputError, MissingBackendError
from anchorscope.parse import check_word
from anchorscope.shown import counted

BACKENDS = ("auto", "torch", "triton")


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1` to a device that exists.

    Raises:
        InputError: not a device name.
        MissingBackendError: CUDA was asked for and is absent, or has no such GPU.
    """
    if elsewhere() is not None and re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        return torch.device(name)
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise InputError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:1")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingBackendError(f"--device {name}: this torch sees no CUDA GPU; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise MissingBackendError(f"--device {name}: there {_found(torch.cuda.device_count())}")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def _found(count: int) -> str:
    """How many GPUs there are, in words."""
    return f"{'is' if count == 1 else 'are'} {counted(count, 'CUDA GPU')}, numbered from 0"


def resolve_devices(device: str, devices: Sequence[str] | str | None) -> tuple[torch.device, ...]:
    """Where a run computes: the one device of `--device`, or the GPUs of `--devices`, the first of them first.

    Args:
        device: see `resolve_device`.
        devices: None, "all", or CUDA GPUs as a list or as text between commas.

    Raises:
        InputError: a device besides "auto" and a list of devices together; an empty or malformed list, a device twice,
            GPUs of several kinds, whose results differ by rounding.
        MissingBackendError: CUDA is absent, or has no such GPU.
    """
    if devices is None:
        return (resolve_device(device),)
    if device != "auto":
        raise InputError("--device and --devices contradict each other: give one of them")
    text = devices if isinstance(devices, str) else ",".join(devices)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"cuda:[0-9]{1,4}", name) and text != "all":
            raise InputError(f"--devices {text!r} is malformed: {name!r} is no CUDA GPU; write all, or cuda:0,cuda:1")
    if not torch.cuda.is_available():
        raise MissingBackendError(f"--devices {text}: this torch sees no CUDA GPU; use --device cpu")
    count = torch.cuda.device_count()
    indices = range(count) if text == "all" else [int(name.removeprefix("cuda:")) for name in names]
    if absent := [i for i in indices if i >= count]:
        raise MissingBackendError(f"--devices {text}: there is no cuda:{absent[0]}; there {_found(count)}")
    if len(set(indices)) < len(indices):
        raise InputError(f"--devices {text!r} names a device twice")
    kinds = {torch.cuda.get_device_name(i): i for i in reversed(indices)}
    if len(kinds) > 1:
        named = " and ".join(f"cuda:{i} ({kind})" for kind, i in sorted(kinds.items(), key=lambda x: x[1]))
        raise InputError(f"--devices {text}: {named} round differently; name GPUs of one kind, so that results agree")
    return tuple(torch.device("cuda", i) for i in indices)


def resolve_backend_name(name: str, device: torch.device) -> str:
    """The back end a name means: `auto` takes the Triton kernels on a CUDA GPU where Triton is installed, else torch.

    Raises:
        InputError: unknown name.
        MissingBackendError: Triton was asked for and is not installed, or asked for on a CPU without its interpreter.
    """
    check_word("--backend", name, BACKENDS)
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return "torch"
    if name == "triton" and elsewhere() is not None:
        return name
    try:
        installed = importlib.util.find_spec("triton") is not None
    except ValueError:  # a module that forbids being found
        installed = False
    if not installed:
        if name == "auto":
            return "torch"
        raise MissingBackendError("--backend triton: Triton is not installed; use --backend torch")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingBackendError(
            "--backend triton needs a CUDA GPU; use --backend torch (or set TRITON_INTERPRET=1 to run the kernels,"
            " very slowly, in Triton's interpreter)"
        )
    return "triton"


# What allocators say that torch raises as plain RuntimeErrors: the CPU's (Linux and Windows), C++'s, cuBLAS's.
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device: Python's, torch's and the allocators' ways of saying so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


# How torch, its libraries and Triton begin when a GPU or its driver failed; a program cannot use that GPU any more.
_FAILURE_WORDS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "Triton Error [CUDA]")


def is_device_failure(error: BaseException) -> bool:
    """Whether a GPU failed (lost, reset, an illegal access), rather than what was asked of it."""
    kind = getattr(torch, "AcceleratorError", None)
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FAILURE_WORDS)
