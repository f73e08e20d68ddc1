"""The HTML page of a report. Nothing here imports torch."""

from anchorscope.moved import moved, moved_modules

__getattr__ = moved(
    __name__,
    {
        "draw_all": "anchorscope.plots.draw",
        "layer_head_grid": "anchorscope.plots.analysis",
        "recall_by_position": "anchorscope.plots.analysis",
        "recall_density": "anchorscope.plots.analysis",
        "save_figure": "anchorscope.plots.save",
        "stripe_heatmap": "anchorscope.plots.heatmap",
    },
)

moved_modules(__name__, {"tokens": ["anchorscope.tokens"]})
