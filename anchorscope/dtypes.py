"""The names of torch's floating point types in dumps, reports and options: "fp32", "fp16" and "bf16"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anchorscope.errors import InputError
from anchorscope.parse import check_word

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32", "fp16" or "bf16" of a torch dtype.

    Raises:
        InputError: another dtype.
    """
    import torch

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise InputError(f"dumps hold fp32, fp16 or bf16, not {dtype}: convert the tensors first")
    return names[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of "fp32", "fp16" or "bf16".

    Raises:
        InputError: another name.
    """
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    check_word("dtype", name, types)
    return types[name]
