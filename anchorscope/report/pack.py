"""Numbers as the page holds them: deflated binary in base64, floats of 16 significant bits, infinities as text."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np


def pack_bytes(data: bytes) -> str:
    """Raw deflate (what browsers call "deflate-raw"), base64."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(squeeze.compress(data) + squeeze.flush()).decode()


def pack_floats(values: np.ndarray) -> str:
    """Little-endian float32, all first bytes before all second bytes: that order deflates best."""
    return pack_bytes(values.astype(np.float32).view(np.uint8).reshape(-1, 4).T.tobytes())


def shorten(values: np.ndarray) -> np.ndarray:
    """Floats rounded to 16 significant bits (relative error below 1e-5), which deflate to half."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)


def json_number(value: float) -> float | str:
    """A number as JSON holds it: "inf" and "-inf" are texts."""
    return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
