"""See every attention call of a transformers model: `intercept`, a context manager that changes nothing else.

Transformers lets a model name its attention function (`AttentionInterface`) and the function that builds its masks
(`AttentionMaskInterface`). While the context is open, the model's configs name one private function of each kind. Both
delegate to exactly the functions the model would have called, with the same arguments, so its logits stay equal bit
for bit; then the attention function hands what it saw to the caller. Registering the mask function is not optional:
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


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer, as the model made it.

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
        output: (B, n, H, dv), the model's own result.
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
    output: Tensor

    @property
    def name(self) -> str:
        """The attention module's class and layer, for messages."""
        return f"{type(self.module).__name__} of layer {'?' if self.layer is None else self.layer}"


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
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise MissingBackendError(
            f"capturing needs transformers 5 or newer ({error}): pip install 'anchorscope[hf]'"
        ) from None

    originals = {id(config): (config, config._attn_implementation) for config in _configs(model)}
    if not originals:
        raise InputError(f"{type(model).__name__} names no attention implementation: it cannot be captured")
    first = next(iter(originals.values()))[1]
    # "flash" stays in the private name where it was: transformers chooses unpadded inputs by that substring
    flash = {"flash" in name for _, name in originals.values()}
    suffix = next(_ids)
    private = {kind: f"anchorscope_capture_{'flash_' if kind else ''}{suffix}" for kind in flash}

    def own(config: PretrainedConfig | None) -> str:
        return originals[id(config)][1] if id(config) in originals else first

    @contextlib.contextmanager
    def as_before(config: PretrainedConfig | None) -> Iterator[str]:
        name = own(config)
        hidden = getattr(config, "_attn_implementation_internal", None)
        if config is not None:
            config._attn_implementation_internal = name
        try:
            yield name
        finally:
            if config is not None:
                config._attn_implementation_internal = hidden

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        config = getattr(module, "config", None)
        with as_before(config) as name:
            result = _delegate(module, name)(module, query, key, value, attention_mask, *args, **options)
        scale = options.get("scaling")
        sink(
            AttentionCall(
                module=module,
                layer=getattr(module, "layer_idx", None),
                implementation=name,
                q=query,
                k=key,
                v=value,
                mask=attention_mask,
                scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
                options=options,
                output=result[0],
            )
        )
        return result

    def mask(*args: Any, **options: Any) -> Any:
        config = options.get("config")
        with as_before(config) as name:
            build: Any = AttentionMaskInterface._global_mapping.get(name)
            return None if build is None else build(*args, **options)

    for name in private.values():
        AttentionInterface.register(name, attention)
    # an implementation without a mask function gets none, before and now
    for name in {name for _, name in originals.values()} & AttentionMaskInterface._global_mapping.keys():
        AttentionMaskInterface.register(private["flash" in name], mask)
    try:
        for config, name in originals.values():
            config._attn_implementation_internal = private["flash" in name]
        yield
    finally:
        for config, name in originals.values():
            config._attn_implementation_internal = name
        for name in private.values():
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


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
