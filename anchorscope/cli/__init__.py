"""The command line: one file per command, and the only package that prints."""

from __future__ import annotations

from anchorscope.cli.app import main

__all__ = ["main"]
