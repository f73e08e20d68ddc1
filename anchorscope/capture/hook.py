"""See or replace every attention call of a transformers model: `divert`, and `intercept` on top of it.

Transformers lets a model name its attention function (`AttentionInterface`) and the function that builds its masks
(`AttentionMaskInterface`). While the context is open, the model's configs name private functions of each kind. The
mask function delegates to exactly the function the model would have called, with the same arguments; the attention
function hands the call to `attend` together with the model's own function, ready to be called. `intercept` calls it
and looks at the result, so the model's logits stay equal bit for bit. Registering the mask function is not optional:
without it transformers builds no mask at all, and sliding windows and chunked prefill are silently wrong. Delegates
run under the model's own implementation name, since some of them look it up in the config again.

Nothing happens at import; names and registrations are restored in `finally`.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchorscope.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

_ids = itertools.count()
_beneath: dict[str, str] = {}  # names registered here -> the implementation that each stands in front of


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer hands to its attention function.

    Attributes:
        module: the attention module.
        layer: its `layer_idx`, or None.
        implementation: the attention the model chose ("sdpa", "eager", "flash_attention_2", ...).
        q: (B, H, n, d) after rotary embedding and norms.
        k: (B, Hkv, m, d): all keys so far; the last n belong to these queries. A cache of a window layer may crop
            older ones.
        v: (B, Hkv, m, dv).
        mask: what the mask function built: None, a boolean or additive tensor (B or 1, 1 or H, n, m), or another
            object.
        scale: softmax scale.
        options: the remaining keyword arguments (`sliding_window`, `softcap`, `s_aux`, ...).
    """

    module: nn.Module
    layer: int | None
    implementation: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    scale: float
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The attention module's class and layer, for messages."""
        return f"{type(self.module).__name__} of layer {'?' if self.layer is None else self.layer}"


@dataclass(frozen=True)
class AttentionCall(AttentionInputs):
    """One attention call, as the model made it.

    Attributes:
        output: (B, n, H, dv), the model's own result.
    """

    output: Tensor


# The model's own attention, as (q, k, v) -> (output (B, n, H, dv), weights or None): mask, scale and options are bound.
Own = Callable[["Tensor", "Tensor", "Tensor"], Any]
# What a call becomes; returns what `Own` returns.
Attend = Callable[[AttentionInputs, Own], Any]


@contextlib.contextmanager
def intercept(model: PreTrainedModel, sink: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Call `sink` after every attention call that `model` makes inside the context.

    The tensors belong to the model: use them inside `sink`, keep copies only. An exception raised by `sink` ends the
    forward. Works on any loaded transformers model whose attention goes through `AttentionInterface`; others never
    call the sink. Contexts may be nested and used for several models at once.

    Raises:
        MissingBackendError: transformers is not installed.
        InputError: the model does not name an attention implementation at all.
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

    Of nested contexts the innermost is asked first, and its `own` leads to the next.

    Raises:
        MissingBackendError: transformers is not installed.
        InputError: the model does not name an attention implementation at all.
    """
    with contextlib.ExitStack() as stack:
        private: dict[str, str] = {}
        for config in list(_configs(model)):
            name = config._attn_implementation
            if name not in private:
                # "flash" stays in the private name where it was: transformers chooses unpadded inputs by that substring
                private[name] = f"anchorscope_{'flash_' if 'flash' in name else ''}{next(_ids)}"
                stack.callback(_unregister, private[name])
                register(private[name], attend, name)
            stack.callback(setattr, config, "_attn_implementation_internal", name)
            config._attn_implementation_internal = private[name]
        if not private:
            raise InputError(f"{type(model).__name__} names no attention implementation: its attention cannot be seen")
        yield


def register(name: str, attend: Attend, implementation: str) -> None:
    """Make `name` an attention implementation: `attend` answers its calls, with `implementation` as its own.

    Raises:
        MissingBackendError: transformers is not installed.
        InputError: transformers knows no such implementation.
    """
    import torch

    interface, masks = _interfaces()
    if implementation != "eager" and implementation not in interface._global_mapping:
        raise InputError(f"transformers knows no attention implementation {implementation!r}; use eager or sdpa")

    @contextlib.contextmanager
    def as_before(config: PretrainedConfig | None) -> Iterator[None]:
        hidden = getattr(config, "_attn_implementation_internal", None)
        if config is not None:
            config._attn_implementation_internal = implementation
        try:
            yield
        finally:
            if config is not None:
                config._attn_implementation_internal = hidden

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
            with as_before(getattr(module, "config", None)):
                return _delegate(module, implementation)(module, q, k, v, attention_mask, *args, **options)

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
        with as_before(options.get("config")):
            build: Any = masks._global_mapping[implementation]
            return build(*args, **options)

    interface.register(name, attention)
    # an implementation without a mask function gets none, before and now
    if implementation in masks._global_mapping:
        masks.register(name, mask)
    _beneath[name] = implementation


def _unregister(name: str) -> None:
    for interface in _interfaces():
        interface._global_mapping.pop(name, None)
    _beneath.pop(name, None)


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
    """The implementation at the bottom of nested contexts."""
    while name in _beneath:
        name = _beneath[name]
    return name


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """Every config that a part of the model consults, each once."""
    from transformers import PretrainedConfig

    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            if getattr(config, "_attn_implementation", None) is not None:
                yield config


def _delegate(module: nn.Module, implementation: str) -> Any:
    """The attention function that the module's own code would look up.

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
