"""The option --ray: a command's units measured on a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from anchorscope.errors import InputError

F = TypeVar("F", bound=Callable[..., None])


def takes_ray(command: F) -> F:
    """A command whose `ray` is the executor on the cluster that --ray names, or None; `device` is the cluster's."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        if given["ray"] is None:
            command(**given)
            return
        for option in ("devices", "shard"):
            if given[option] is not None:
                raise InputError(f"--ray and --{option} contradict each other: give one of them")
        from anchorscope.runs.cluster import RayTasks

        with RayTasks(given["ray"], given["device"]) as tasks, tasks.planning():
            command(**{**given, "ray": tasks, "device": tasks.kind})

    return call  # type: ignore[return-value]


def executor(ray: Any) -> Any:
    """The executor that `takes_ray` gave a command as `ray`."""
    return ray
