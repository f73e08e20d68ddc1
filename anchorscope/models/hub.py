"""The Hugging Face hub: whether it can be reached, asked once and briefly, and what its errors mean."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anchorscope.errors import first_line

REACH_SECONDS = 5.0  # the hub's own client would try six times, for half a minute


def hub_options(source: str, revision: str | None, notify: Callable[[str], None]) -> dict[str, Any]:
    """Return the keyword arguments of transformers' loaders for a model of the hub.

    Where the hub cannot be reached, only the local cache is searched, so that a cached model loads at once and another
    is refused at once.

    Args:
        source: the model's id.
        revision: its branch, tag or commit.
        notify: told if the cache is all there is.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if not is_offline() and not reachable():
        notify(f"the Hugging Face hub cannot be reached: looking for {source} in the local cache only")
        options["local_files_only"] = True
    return options


def is_offline() -> bool:
    """Return whether the user forbids to ask the hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def reachable() -> bool:
    """Return whether the hub answers within a few seconds. It is asked with the hub's own client, proxies and all."""
    from huggingface_hub import constants, get_session

    answers: list[int] = []

    def ask() -> None:
        try:
            found = get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS, follow_redirects=False)
            answers.append(found.status_code)
        except Exception:  # whatever it is, there was no answer
            return

    asking = threading.Thread(target=ask, daemon=True)  # the look-up of a host's name obeys no timeout
    asking.start()
    asking.join(REACH_SECONDS + 1)
    return bool(answers) and answers[0] < 500


@contextmanager
def closed(yes: bool) -> Iterator[None]:
    """Forbid transformers to ask the hub for a while, if `yes`: not all of its look-ups obey `local_files_only`."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or yes
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_sentence(source: str, error: BaseException, unreached: bool = False) -> str:
    """Say why a model of the hub cannot be loaded, judged by the errors behind transformers' own.

    Args:
        source: the model's id.
        error: what was raised.
        unreached: the hub was not asked since it cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(c, GatedRepoError) for c in causes) or "gated" in str(error):
        return f"model {source} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(c, RepositoryNotFoundError) for c in causes) or "is not a valid model identifier" in str(error):
        return f"model {source} is neither a folder here nor on the Hugging Face hub (or it is private): check its name"
    if any(isinstance(c, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) for c in causes) or any(
        words in str(error) for words in ("couldn't connect", "cached files", "offline")
    ):
        forbidden = is_offline() and not unreached
        why = "may not be asked (HF_HUB_OFFLINE is set)" if forbidden else "cannot be reached"
        return (
            f"model {source} is not in the local cache ({constants.HF_HUB_CACHE}) and the Hugging Face hub"
            f" ({constants.ENDPOINT}) {why}: check the name and the network, or give a folder or a .gguf file that is"
            " here, like --model ./my-model"
        )
    if "safetensors" in str(error) and ("does not appear to have" in str(error) or "no file named" in str(error)):
        return (
            f"model {source} offers no safetensors weights, and pickle (pytorch_model.bin), which can run any code, is"
            " never read: use a revision with safetensors, or convert it where you trust it (save_pretrained)"
        )
    return f"model {source} cannot be loaded: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
