"""The old place of `anchorscope.tokens`, for one release."""

from anchorscope.moved import moved

__getattr__ = moved(__name__, {"load_pieces": "anchorscope.tokens", "token_texts": "anchorscope.tokens"})
