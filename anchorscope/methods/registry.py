"""Which methods there are: a dict, and the entry points `anchorscope.methods` for those of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points

from anchorscope.errors import InputError
from anchorscope.methods.anchor import Anchor
from anchorscope.methods.anchor_released import AnchorReleased
from anchorscope.methods.base import GRANULARITIES, Method, check_setting
from anchorscope.methods.block_topk import BlockTopK
from anchorscope.methods.dhsa import Dhsa
from anchorscope.methods.flashprefill import FlashPrefill
from anchorscope.methods.flexprefill import FlexPrefill
from anchorscope.methods.hip import HiP
from anchorscope.methods.hyper import Hyper
from anchorscope.methods.oracle_block import OracleBlock
from anchorscope.methods.oracle_row import OracleRow
from anchorscope.methods.oracle_stripe import OracleStripe
from anchorscope.methods.power import Power
from anchorscope.methods.skip_softmax import SkipSoftmax
from anchorscope.methods.spargeattn import SpargeAttn
from anchorscope.methods.streaming import Streaming
from anchorscope.methods.vertical_slash import VerticalSlash
from anchorscope.methods.xattention import XAttention
from anchorscope.parse import check_word

GROUP = "anchorscope.methods"

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Anchor,
        AnchorReleased,
        Streaming,
        VerticalSlash,
        FlexPrefill,
        XAttention,
        FlashPrefill,
        BlockTopK,
        SkipSoftmax,
        SpargeAttn,
        Power,
        HiP,
        Dhsa,
        Hyper,
        OracleRow,
        OracleStripe,
        OracleBlock,
    )
}

# Shown when the user names no others: the paper's groups, and groups that suit short prompts.
ALIASES: dict[str, tuple[tuple[str, Method], ...]] = {
    "anchor": (("anchor-128x16", Anchor()), ("anchor-64x4", Anchor(block=64, step=4))),
    "oracle-stripe": (
        ("oracle-stripe-128x16", OracleStripe()),
        ("oracle-stripe-64x4", OracleStripe(block=64, step=4)),
    ),
}


@dataclass(frozen=True)
class Contender:
    """A method as it appears in tables: a label, its settings, and the values of its swept parameter.

    `default`: the values are the method's own, so a comparison takes those that suit its prompts (`at_length`).
    """

    label: str
    method: Method
    sweep: tuple[float, ...]
    default: bool = False

    def at_length(self, tokens: int) -> Contender:
        """The same contender, its default sweep as long as so many tokens need it; values that were named stay."""
        return replace(self, sweep=_values_of(self.method, self.method.sweep_for(tokens))) if self.default else self

    def end(self, tokens: int) -> str:
        """What the last value keeps: "dense" all pairs, "most" the most that the rule can keep, "given" what it may."""
        if not self.default:
            return "given"
        return "dense" if self.method.dense_at(tokens) is not None else "most" if self.method.never_dense else "given"


def known_methods() -> dict[str, type[Method]]:
    """Every method by name: ours, and those that installed packages declare.

    Raises:
        InputError: a declared method cannot be loaded, is no `Method`, is incomplete, or takes a name that exists.
    """
    found = dict(METHODS)
    for point in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        try:
            cls = point.load()
        except Exception as error:  # importing a stranger's package can fail in any way
            raise InputError(
                f"the installed method {point.name} cannot be loaded ({error}): fix or uninstall its package"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise InputError(
                f"the installed method {point.name} ({point.value}) is no Method: fix or uninstall its package"
            )
        if found.get(cls.name, cls) is not cls:
            raise InputError(f"two methods are called {cls.name}: rename or uninstall {point.value}")
        if cls.granularity not in GRANULARITIES or cls.parameter not in {f.name for f in fields(cls)}:
            raise InputError(
                f"the installed method {cls.name} ({point.value}) must name one of its fields as `parameter`"
                f" and a `granularity` of {', '.join(GRANULARITIES)}"
            )
        found[cls.name] = cls
    return found


def find_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        InputError: there is none; the message lists the names.
    """
    known = known_methods()
    check_word("method", name, known)
    return known[name]


def line_up(
    methods: str | Sequence[str] = "all", settings: Sequence[str] = (), labels: Sequence[str] = ()
) -> tuple[Contender, ...]:
    """The contenders a user asked for.

    Args:
        methods: "all", names separated by commas, or a sequence of names. `anchor` and `oracle-stripe` each stand for
            groups of 128 x 16 and of 64 x 4.
        settings: texts like "anchor.block=64,anchor.step=4". The swept parameter may be given as one value, as values
            separated by "/", or as a range low:high:step.
        labels: one for each of `settings`, or none. With labels, each adds a contender; without, the settings change
            the method where it stands (and add it where `methods` does not name it).

    Raises:
        InputError: an unknown method, parameter or value; labels that do not match; two contenders of one label.
    """
    known = known_methods()
    names = list(known) if methods == "all" else _names(methods)
    for name in names:
        check_word("method", name, known)
    if labels and len(labels) != len(settings):
        raise InputError(f"{len(settings)} --set and {len(labels)} --as: give each --set its own --as, or none at all")

    changed: dict[str, Contender] = {}
    added: list[Contender] = []
    for index, text in enumerate(settings):
        values = _parse(text, known)
        if labels:
            if len(values) > 1:
                raise InputError(f"--set {text!r} names several methods; a --as label is for one")
            (name, chosen), *_ = values.items()
            added.append(_contender(labels[index], known[name], chosen))
            continue
        for name, chosen in values.items():
            if name in changed:
                raise InputError(
                    f"--set changes {name} twice; put its settings into one --set, or label each with --as"
                )
            changed[name] = _contender(name, known[name], chosen)

    lineup: list[Contender] = []
    for name in [*names, *(x for x in changed if x not in names)]:
        if name in changed:
            lineup.append(changed[name])
        elif name in ALIASES:
            lineup.extend(_by_default(label, method) for label, method in ALIASES[name])
        else:
            lineup.append(_by_default(name, known[name]()))
    labeled = {x.label for x in added}
    # A label of the user's replaces a default one of the same name.
    lineup = [x for x in lineup if x.label not in labeled] + added
    if len(labeled) < len(added):
        raise InputError("--as gives the same label twice; every contender needs its own")
    return tuple(lineup)


def _names(methods: str | Sequence[str]) -> list[str]:
    items = [x.strip() for x in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not items or not all(items):
        raise InputError(f"--methods {methods!r} has an empty element; write names separated by commas, or all")
    return list(dict.fromkeys(items))


def _by_default(label: str, method: Method) -> Contender:
    return Contender(label, method, _values_of(method, method.sweep), default=True)


def _values_of(method: Method, values: Sequence[float]) -> tuple[float, ...]:
    """Values of the swept parameter as the method holds them, each once."""
    return tuple(dict.fromkeys(method.at(v).settings[method.parameter] for v in values))


def _contender(label: str, cls: type[Method], chosen: dict[str, list[float]]) -> Contender:
    if not label.strip() or not label.isprintable() or "," in label or len(label) > 40:
        raise InputError(f"--as {label!r}: a label has 1 to 40 printable characters and no comma")
    swept = chosen.get(cls.parameter)
    for name, values in chosen.items():
        if name != cls.parameter and len(values) > 1:
            raise InputError(f"--set {cls.name}.{name}: only the swept parameter {cls.parameter} takes several values")
    method = cls(**{name: values[0] for name, values in chosen.items()})
    return _by_default(label, method) if swept is None else Contender(label, method, _values_of(method, swept))


def _parse(text: str, known: dict[str, type[Method]]) -> dict[str, dict[str, list[float]]]:
    """`method.field=value,...` as {method: {field: values}}."""
    out: dict[str, dict[str, list[float]]] = {}
    for part in text.split(","):
        target, equals, value = part.strip().partition("=")
        name, dot, attribute = target.strip().rpartition(".")
        if not (equals and dot and name and attribute and value.strip()):
            raise InputError(f"--set {text!r} is malformed; write method.parameter=value, like anchor.block=64")
        check_word(f"--set {part.strip()}: method", name, known)
        items = {f.name: f for f in fields(known[name])}
        check_word(f"--set {part.strip()}: {name}'s parameter", attribute, items)
        if attribute in out.setdefault(name, {}):
            raise InputError(f"--set {text!r} gives {name}.{attribute} twice")
        label = f"--set {name}.{attribute}"
        out[name][attribute] = [check_setting(label, v, items[attribute]) for v in _values(value, label)]
    return out


def _values(text: str, label: str) -> list[float]:
    from anchorscope.parse import parse_thetas

    values: list[float] = []
    for item in text.split("/"):
        if ":" in item:
            values.extend(parse_thetas(item, label))
            continue
        try:
            values.append(float(item))
        except ValueError:
            raise InputError(f"{label}: {item.strip()!r} is not a number") from None
    return values
