"""An assignment says which heads run how, and checks that the model can do so before it runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.errors import InputError, first_line
from anchorscope.models import AttentionCall, intercept, model_facts, prefill
from anchorscope.models.calls import AttentionInputs
from anchorscope.models.check import Unrepresentable, check_call, check_output, visible_window
from anchorscope.models.language import Language
from anchorscope.params import AnchorParams
from anchorscope.shown import counted, partly_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Configuration = AnchorConfig | str | os.PathLike[str] | float
PROBE = (1, 2)  # token ids of the trial run


class Assignment:
    """The anchors of every layer, by a configuration or by one theta.

    Args:
        config: an AnchorConfig, the path of an anchors.json, or a theta in nats for every head of every layer without
            a sliding window, in groups of 128 x 16 queries.

    Raises:
        InputError: theta is NaN, the file cannot be read, or the type is another.
    """

    def __init__(self, config: Configuration) -> None:
        self.config: AnchorConfig | None = None
        self.theta = 0.0
        if isinstance(config, AnchorConfig):
            self.config = config
        elif isinstance(config, (str, os.PathLike)):
            self.config = AnchorConfig.load(os.fspath(config))
        elif isinstance(config, (int, float)) and not isinstance(config, bool):
            self.theta = float(config)
            if math.isnan(self.theta):
                raise InputError("theta is NaN: use a number of nats, inf or -inf")
        else:
            raise InputError(
                f"anchors must be an AnchorConfig, the path of an anchors.json or a theta, not {type(config).__name__}"
            )

    def layer(self, call: AttentionInputs) -> LayerAnchors | None:
        """Return how the call's layer runs, or None for dense.

        Raises:
            InputError: the configuration has another number of heads there.
        """
        if call.layer is None:
            return None
        heads = call.q.shape[1]
        if self.config is None:
            return None if call.window else LayerAnchors(call.layer, AnchorParams(), (self.theta,) * heads)
        found = self.config[call.layer]
        if found is not None and len(found.thetas) != heads:
            raise InputError(
                f"these anchors have {counted(len(found.thetas), 'head')} in layer {call.layer}, but"
                f" {call.name} has {heads}"
            )
        return found

    def check_facts(self, facts: Mapping[str, Any], force: bool) -> None:
        """Refuse a configuration of another model.

        Raises:
            InputError: see `AnchorConfig.check_model`.
        """
        if self.config is not None:
            self.config.check_model(facts, force=force)

    def check(self, model: PreTrainedModel, force: bool) -> str | None:
        """Try the model on two tokens, and refuse layers that could not run or would not mean the same.

        Returns:
            What to warn of: that the configuration leaves layers out, which run dense; None where it names all.

        Raises:
            InputError: the configuration is for another model; a layer that it names (without one: any layer) makes
                no softmax attention call, or one that Q, K and V do not determine.
        """
        self.check_facts(model_facts(model), force)
        trial = _Trial(Language(model))
        try:
            with intercept(model, trial):
                prefill(model, PROBE)
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{type(model).__name__} cannot be tried on two tokens of text, so it cannot run sparse: it says"
                f" {first_line(error)!r}"
            ) from error
        if not trial.seen:
            raise InputError(
                f"{type(model).__name__} never called transformers' attention interface, so it cannot run sparse:"
                " its attention is not softmax attention, or its code does not use the interface"
            )
        named = sorted(trial.seen) if self.config is None else [x.layer for x in self.config.layers]
        for layer in named:
            if layer not in trial.seen:
                raise InputError(
                    f"these anchors name layer {layer} of {type(model).__name__}, which uses no softmax attention;"
                    f" layers {sorted(trial.seen)} do"
                )
            call, reason = trial.seen[layer]
            if reason is not None:
                raise cannot(call, reason)
            self.layer(call)
        heads = {i: call.q.shape[1] for i, (call, _) in trial.seen.items() if not call.window}
        covered = None if self.config is None else self.config.coverage(heads)
        if covered is None or not covered["unnamed"]:
            return None  # heads without a theta were left dense on purpose
        return f"these anchors run {partly_sparse(covered)}"


class _Trial:
    """This sink keeps each layer's call and the reason, if any, why Q, K and V do not determine it."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self.seen: dict[int, tuple[AttentionCall, str | None]] = {}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer is None or self._language.foreign(call):
            return
        reason = None
        if call.layer in self.seen:
            reason = "it runs more than once in a forward"
        else:
            try:
                check_call(call)
                check_output(call, 0, visible_window(call, 0))
            except Unrepresentable as error:
                reason = error.reason
        self.seen[call.layer] = call, reason


def cannot(call: AttentionInputs, reason: str) -> InputError:
    """Return the error for attention that the kernels would compute wrongly."""
    return InputError(f"{call.name} cannot run sparse: {reason} (leave it out of the anchors, or take another model)")
