"""The old place of the parsers of theta and index lists; they are in `anchorscope.parse`."""

from anchorscope.moved import moved

_NAMES = ("MAX_THETAS", "describe_indices", "parse_indices", "parse_thetas")

__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "anchorscope.parse"))
