"""AnchorScope: what do your attention heads keep?

Per-head recall against sparsity of anchor attention, measured on your model and your prompts. What the command line
does, these functions do:

- `capture_model`: run a model and write its Q/K/V dump. `ModelSource`: a model and prompts in place of a dump.
- `load_model`: model and tokenizer of a preset, a GGUF file, a folder or a Hugging Face id, checked.
- `open_dump`, `verify`, `write_dump`: read, check and write dumps.
- `analyze`, `redraw`, `load_report`, `iter_profiles`: measure a dump, and read the results again.
- `diagnose`, `load_diagnosis`: what kind of head each one is.
- `merge`: shards of such runs, measured by the jobs of an array, put together.
- `compare_methods`: score other selection rules on the same heads.
- `run_bench`: time sparse against dense attention.
- `calibrate`: choose groups and thetas of every head, checked on held-out prompts; `AnchorConfig` is what comes out.
- `sparse_attention`, `register_attention`: prefill a model with it; `attention_clock` times the model's own.
- `evaluate`, `load_evaluation`: a model dense and sparse side by side, on prompts and on tasks.

Importing this package loads nothing heavy; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anchorscope._version import __version__

if TYPE_CHECKING:
    from anchorscope.analysis.run import (
        Analysis,
        AnalyzeRequest,
        Progress,
        analyze,
        iter_profiles,
        load_report,
        plan_analysis,
        redraw,
    )
    from anchorscope.anchors import AnchorConfig
    from anchorscope.bench import run_bench
    from anchorscope.calibration import CalibrateRequest, Calibration, calibrate, plan_calibration
    from anchorscope.capture import ModelSource, capture_model
    from anchorscope.compare import CompareRequest, load_comparison
    from anchorscope.compare import compare as compare_methods
    from anchorscope.dumps import Dump, Entry, LayerTensors, open_dump, verify, write_dump
    from anchorscope.errors import (
        AnchorScopeError,
        DumpError,
        InputError,
        MissingBackendError,
        RunFailure,
    )
    from anchorscope.evaluation import EvaluateRequest, Evaluation, evaluate, load_evaluation, plan_evaluation
    from anchorscope.heads import HeadsRequest, diagnose, load_diagnosis
    from anchorscope.merging import Merged, merge
    from anchorscope.methods import Method, line_up
    from anchorscope.models import LoadedModel, PromptInput, intercept, load_model
    from anchorscope.params import AnchorParams
    from anchorscope.profiles import HeadProfile
    from anchorscope.runs.life import RunOptions
    from anchorscope.runs.shards import Shard
    from anchorscope.runtime import LayerUse, SparseRun, attention_clock, register_attention, sparse_attention

_HOMES = {
    "anchorscope.analysis.run": (
        "Analysis",
        "AnalyzeRequest",
        "Progress",
        "analyze",
        "iter_profiles",
        "load_report",
        "plan_analysis",
        "redraw",
    ),
    "anchorscope.anchors": ("AnchorConfig",),
    "anchorscope.bench": ("run_bench",),
    "anchorscope.calibration": ("CalibrateRequest", "Calibration", "calibrate", "plan_calibration"),
    "anchorscope.capture": ("ModelSource", "PromptInput", "capture_model", "intercept"),
    "anchorscope.compare": ("CompareRequest", "load_comparison"),
    "anchorscope.dumps": ("Dump", "Entry", "LayerTensors", "open_dump", "verify", "write_dump"),
    "anchorscope.errors": ("AnchorScopeError", "DumpError", "InputError", "MissingBackendError", "RunFailure"),
    "anchorscope.evaluation": ("EvaluateRequest", "Evaluation", "evaluate", "load_evaluation", "plan_evaluation"),
    "anchorscope.heads": ("HeadsRequest", "diagnose", "load_diagnosis"),
    "anchorscope.merging": ("Merged", "merge"),
    "anchorscope.methods": ("Method", "line_up"),
    "anchorscope.models": ("LoadedModel", "load_model"),
    "anchorscope.params": ("AnchorParams",),
    "anchorscope.profiles": ("HeadProfile",),
    "anchorscope.runs.life": ("RunOptions",),
    "anchorscope.runs.shards": ("Shard",),
    "anchorscope.runtime": ("LayerUse", "SparseRun", "attention_clock", "register_attention", "sparse_attention"),
}
_HOME_OF = {name: (home, name) for home, names in _HOMES.items() for name in names}
_HOME_OF["compare_methods"] = ("anchorscope.compare", "compare")

__all__ = [
    "Analysis",
    "AnalyzeRequest",
    "AnchorConfig",
    "AnchorParams",
    "AnchorScopeError",
    "CalibrateRequest",
    "Calibration",
    "CompareRequest",
    "Dump",
    "DumpError",
    "Entry",
    "EvaluateRequest",
    "Evaluation",
    "HeadProfile",
    "HeadsRequest",
    "InputError",
    "LayerTensors",
    "LayerUse",
    "LoadedModel",
    "Merged",
    "Method",
    "MissingBackendError",
    "ModelSource",
    "Progress",
    "PromptInput",
    "RunFailure",
    "RunOptions",
    "Shard",
    "SparseRun",
    "__version__",
    "analyze",
    "attention_clock",
    "calibrate",
    "capture_model",
    "compare_methods",
    "diagnose",
    "evaluate",
    "intercept",
    "iter_profiles",
    "line_up",
    "load_comparison",
    "load_diagnosis",
    "load_evaluation",
    "load_model",
    "load_report",
    "merge",
    "open_dump",
    "plan_analysis",
    "plan_calibration",
    "plan_evaluation",
    "redraw",
    "register_attention",
    "run_bench",
    "sparse_attention",
    "verify",
    "write_dump",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anchorscope' has no attribute {name!r}")
    home, attribute = _HOME_OF[name]
    value = getattr(importlib.import_module(home), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
