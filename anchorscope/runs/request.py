"""Public functions that take the fields of a request by name, so that no list of arguments is written twice.

    @takes(AnalyzeRequest)
    def analyze(dump, out, *, plan=None, **options): ...

`analyze(dump, out, thetas=[8.0], figures=False)` then makes `AnalyzeRequest(dump, thetas=[8.0])` and
`RunOptions(figures=False)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from anchorscope.errors import InputError
from anchorscope.runs.life import Plan, RunOptions
from anchorscope.runs.sources import place_of

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound=Plan[Any])


def takes(request: type, options: type | None = RunOptions) -> Callable[[F], F]:
    """Give a function the keyword arguments of dataclasses: `help` shows them, and an unknown one is a TypeError.

    Args:
        request: the dataclass of what is measured; its first field is positional.
        options: the dataclass of how that is carried out.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function, eval_str=False).parameters
        shown = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
        for kind in filter(None, (request, options)):
            shown += [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(kind).parameters.values()]
        parameters: dict[str, inspect.Parameter] = {}
        for p in shown:
            parameters.setdefault(p.name, p)  # the function's own word counts
        known = inspect.Signature(
            sorted(parameters.values(), key=lambda p: p.kind),
            return_annotation=inspect.signature(function).return_annotation,
        )

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            try:
                known.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(*args, **given)

        call.__signature__ = known  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def split(given: dict[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    """Keyword arguments as options of the run, and what is left for the request."""
    how = {f.name: given[f.name] for f in fields(RunOptions) if f.name in given}
    return RunOptions(**how), {name: value for name, value in given.items() if name not in how}


def planned(request: Any, plan: P | None, source: object, given: dict[str, Any], late: Sequence[str] = ()) -> P:
    """The plan to carry out: the one made beforehand, or one of the arguments.

    Args:
        request: the class of the request; it has a method `plan`.
        plan: made beforehand, or None.
        source: the request's first field as the caller gives it.
        given: the other fields that the caller gives.
        late: fields that may be given beside a plan, since they only say what is made of the measurements.

    Raises:
        InputError: an argument is decided by the plan already, or the plan was made of another source.
    """
    if plan is None:
        return request(source, **given).plan()
    first, *others = fields(request)
    made_of = getattr(plan.request, first.name)
    if place_of(made_of) != place_of(source):
        raise InputError(
            f"the plan was made of {_named(made_of)}, not of {_named(source)}: make one of this, or leave out plan"
        )
    defaults = {f.name: f.default for f in others}
    for name, value in given.items():
        if name not in late and value is not defaults[name] and value != defaults[name]:
            raise InputError(f"{name} is decided by the plan: give it when the plan is made, or leave out plan")
    changed = {name: given[name] for name in late if name in given and given[name] != getattr(plan.request, name)}
    return replace(plan.request, **changed).plan() if changed else plan


def check_target(recall: float) -> None:
    """Refuse a target recall that nothing could reach or miss.

    Raises:
        InputError: it does not lie in (0, 1].
    """
    if not 0 < recall <= 1:
        raise InputError(f"--target-recall {recall!r} is out of range: a target recall lies above 0 and at most at 1")


def _named(source: object) -> str:
    paths = place_of(source)
    if isinstance(paths, tuple):
        return ", ".join(map(str, paths))
    if isinstance(source, str):
        return source
    return str(paths) if isinstance(paths, Path) else type(source).__name__  # a model's own words fill a screen
