"""These helpers watch the modules of a model in trial runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@contextmanager
def module_hooks(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Install the hooks that `hooks` makes, and take them off again however the context ends."""
    installed = list(hooks)
    try:
        yield
    finally:
        for hook in installed:
            hook.remove()


def filled(token_ids: Sequence[int], count: int) -> list[int]:
    """Return the first `count` ids of a prompt for a trial run; a shorter prompt is repeated."""
    return [token_ids[i % len(token_ids)] for i in range(count)]
