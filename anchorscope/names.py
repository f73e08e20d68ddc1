"""Names that several places must say alike: columns of heads.csv, tasks, dense back ends, folders of a page."""

from __future__ import annotations

# What heads.csv and the page tell of a head at one theta, in this order.
THETA_COLUMNS = (
    "theta",
    "recall",
    "recall_p05",
    "recall_min",
    "recall_last",
    "density",
    "sparsity",
    "stripe_density",
    "output_error",
    "output_close_01",
    "output_close_005",
)

TASKS = ("needle", "multi-needle", "variable-tracking", "common-words")
PERPLEXITY = "perplexity"  # of the project's own text, beside the tasks

DENSE = ("flash", "cudnn", "efficient", "flex", "math")

ADD_TO_ANALYSES = ("compare", "heads")  # their folders need the analysis of the same dump on the page
PAGE_COMMANDS = ("analyze", *ADD_TO_ANALYSES, "calibrate", "evaluate", "bench")


def listed(names: tuple[str, ...], last: str = "or") -> str:
    """Names in a sentence: "a, b or c"."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else "".join(names)
