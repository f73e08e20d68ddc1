"""`intercept` shows every attention call of a transformers model, and `divert` replaces it.

Transformers lets a model name its attention function (`AttentionInterface`) and the function that builds its masks
(`AttentionMaskInterface`). While a context is open, the model's configs name private functions of each kind. The mask
function delegates to exactly the function the model would have called, with the same arguments; the attention function
hands the call to `attend` together with the model's own function, ready to be called. `intercept` calls it and looks at
the result, so the model's logits stay equal bit for bit. Registering the mask function is not optional: without it
transformers builds no mask at all, and sliding windows and chunked prefill are silently wrong. Delegates see the
model's own implementation name, since some of them look it up in the config again.

A call's module decides which contexts see it: those of the models that hold the module, in the order in which they were
opened. So contexts may be left in any order, and the last one to leave gives the configs their own names back. A
private name copies and pickles as the model's own: a copy made inside a context is an ordinary model.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anchorscope.errors import InputError, MissingBackendError
from anchorscope.models.calls import Attend, AttentionCall, AttentionInputs, Own

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_beneath: dict[str, str] = {}  # names registered here -> the implementation that each stands in front of
_lock = threading.RLock()  # guards the two below
_open: list[_Context] = []  # the open contexts, in the order in which they were opened
_named: dict[int, tuple[PretrainedConfig, int]] = {}  # id of a config with a private name -> it, and its contexts


@contextlib.contextmanager
def intercept(model: PreTrainedModel, sink: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Call `sink` after every attention call that `model` makes inside the context.

    The tensors belong to the model: use them inside `sink`, keep copies only. An exception raised by `sink` ends the
    forward. Works on any loaded transformers model whose attention goes through `AttentionInterface`; others never
    call the sink. Contexts may be nested and used for several models at once.

    Raises:
        MissingBackendError, InputError: as `divert`.
    """

    def attend(call: AttentionInputs, own: Own) -> Any:
        result = own(call.q, call.k, call.v)
        sink(AttentionCall(**vars(call), output=result[0]))
        return result

    with divert(model, attend):
        yield


@contextlib.contextmanager
def divert(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let `attend` answer every attention call that `model` makes inside the context.

    Of several contexts on one model the last one opened is asked first, and its `own` leads to the one before. They may
    be left in any order.

    Raises:
        MissingBackendError: transformers is not installed.
        InputError: the model does not name an attention implementation at all; another thread has a context open on
            it; its implementation was changed inside the context.
    """
    context = _Context(model, attend)
    context.enter()
    try:
        yield
    except BaseException:
        context.leave()
        raise
    changed = context.leave()
    if changed is not None:
        raise InputError(
            f"the attention implementation of {type(model).__name__} was changed to {changed!r} inside a context that"
            " watches or replaces its attention, so later calls were not seen: change it outside"
        )


class _Name(str):
    """A private implementation name. Its copies and pickles are `own`, the name of the implementation behind it."""

    __slots__ = ("own",)
    own: str

    def __deepcopy__(self, memo: Any) -> str:
        return self.own

    def __reduce__(self) -> Any:
        return str, (self.own,)


class _Context:
    """One open `divert`. It knows which modules it covers and who answers their calls."""

    def __init__(self, model: PreTrainedModel, attend: Attend) -> None:
        self.model, self.attend = model, attend
        self.thread = threading.get_ident()
        self.configs: list[PretrainedConfig] = []
        self._modules: set[int] = set()
        self._others: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def enter(self) -> None:
        """Open the context.

        Raises:
            MissingBackendError, InputError: see `divert`; nothing has changed then.
        """
        self._modules = {id(module) for module in self.model.modules()}
        names: dict[str, _Name] = {}
        with _lock:
            for other in _open:
                if other.thread != self.thread and other._modules & self._modules:
                    raise InputError(
                        f"another thread has a context open on this {type(self.model).__name__}: a model's attention"
                        " can be watched or replaced by one thread at a time (leave that context first, or take a copy"
                        " of the model)"
                    )
            self.configs = list(_configs(self.model))
            for config in self.configs:
                name = config._attn_implementation
                if not isinstance(name, _Name):
                    names[name] = _private(name)
            if not self.configs:
                raise InputError(
                    f"{type(self.model).__name__} names no attention implementation: its attention cannot be seen"
                )
            for config in self.configs:
                name = config._attn_implementation
                config._attn_implementation_internal = names.get(name, name)
                _named[id(config)] = config, _named.get(id(config), (config, 0))[1] + 1
            _open.append(self)

    def leave(self) -> str | None:
        """Close the context. Return the implementation that a config names instead of the private one, if any does."""
        changed = None
        with _lock:
            _open.remove(self)
            for config in self.configs:
                _, count = _named.pop(id(config))
                name = config._attn_implementation
                if not isinstance(name, _Name):
                    changed = name
                elif count == 1:
                    config._attn_implementation_internal = name.own
                if count > 1:
                    _named[id(config)] = config, count - 1
        return changed

    def covers(self, module: nn.Module) -> bool:
        """Return whether the module is a part of the model, even if it was put in after the context was opened."""
        if id(module) in self._modules:
            return True
        if module in self._others:
            return False
        self._modules.update(id(x) for x in self.model.modules())
        if id(module) not in self._modules:
            self._others.add(module)
        return id(module) in self._modules


def _private(implementation: str) -> _Name:
    """Return the private name of an implementation, registered."""
    # "flash" stays in it where it was: transformers chooses unpadded inputs by that substring
    name = _Name(f"anchorscope_in_front_of_{implementation}")
    name.own = implementation

    def dispatch(call: AttentionInputs, own: Own) -> Any:
        module = call.module
        with _lock:
            attends = [context.attend for context in _open if context.covers(module)]
            if not attends and _open and getattr(module, "_is_replica", False):
                raise InputError(f"{call.name} is a replica (DataParallel), which is not seen: run the model itself")
        return _through(attends, call, own)

    if name not in _beneath:
        register(name, dispatch, implementation)
    return name


def _through(attends: list[Attend], call: AttentionInputs, own: Own) -> Any:
    """Ask the last of `attends`; its own attention leads to the one before."""
    if not attends:
        return own(call.q, call.k, call.v)

    def beneath(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if len(attends) == 1:
            return own(q, k, v)
        return _through(attends[:-1], replace(call, q=q, k=k, v=v), own)

    return attends[-1](call, beneath)


def register(name: str, attend: Attend, implementation: str) -> None:
    """Make `name` an attention implementation: `attend` answers its calls, with `implementation` as its own.

    Raises:
        MissingBackendError: transformers is not installed.
        InputError: transformers knows no such implementation.
    """
    interface, masks = _interfaces()
    if implementation != "eager" and implementation not in interface._global_mapping:
        raise InputError(f"transformers knows no attention implementation {implementation!r}; use eager or sdpa")

    @torch.compiler.disable
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        def own(q: Tensor, k: Tensor, v: Tensor) -> Any:
            function = _delegate(module, implementation)
            return function(_AsBefore.of(module, implementation), q, k, v, attention_mask, *args, **options)

        scale = options.get("scaling")
        call = AttentionInputs(
            module=module,
            layer=getattr(module, "layer_idx", None),
            implementation=_foundation(implementation),
            q=query,
            k=key,
            v=value,
            mask=attention_mask,
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            options=options,
        )
        return attend(call, own)

    def mask(*args: Any, **options: Any) -> Any:
        if options.get("config") is not None:
            options["config"] = _named_config(options["config"], implementation)
        build: Any = masks._global_mapping[implementation]
        return build(*args, **options)

    interface.register(name, attention)
    # an implementation without a mask function gets no mask from transformers either
    if implementation in masks._global_mapping:
        masks.register(name, mask)
    _beneath[name] = implementation


class _AsBefore:
    """A module whose config names another implementation; the config itself, which other threads read, is unchanged."""

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module = module
        self.config = _named_config(module.config, implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @classmethod
    def of(cls, module: nn.Module, implementation: str) -> Any:
        """Return the module itself where no delegate looks the name up, or where the delegate was registered here."""
        plain = implementation in ("eager", "sdpa", *_beneath) or getattr(module, "config", None) is None
        return module if plain else cls(module, implementation)


def _named_config(config: Any, implementation: str) -> Any:
    """Return a shallow copy of a config that names `implementation`."""
    config = copy.copy(config)
    config._attn_implementation_internal = implementation
    return config


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise MissingBackendError(
            f"watching a model's attention needs transformers 5 or newer ({error}): pip install 'anchorscope[hf]'"
        ) from None
    return AttentionInterface, AttentionMaskInterface


def _foundation(name: str) -> str:
    """Return the implementation beneath all nested contexts."""
    while name in _beneath:
        name = _beneath[name]
    return name


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """Yield every config that a part of the model consults, each once."""
    from transformers import PretrainedConfig

    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            if getattr(config, "_attn_implementation", None) is not None:
                yield config


def _delegate(module: nn.Module, implementation: str) -> Any:
    """Return the attention function that the module's own code would look up.

    Each modelling file looks `implementation` up in its `ALL_ATTENTION_FUNCTIONS`, with its own
    `eager_attention_forward` as the default; both are globals of the file that defines the module's class or the base
    class its forward comes from.

    Raises:
        InputError: the file defines no eager attention and the implementation is eager.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for base in type(module).__mro__:
        scope = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        eager = scope.get("eager_attention_forward")
        functions = scope.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        if "forward" in vars(base) and (eager is not None or implementation in functions):
            return functions.get(implementation, eager)
    raise InputError(
        f"{type(module).__name__} defines no {implementation} attention that can be delegated to:"
        " load the model with attn_implementation='sdpa'"
    )
