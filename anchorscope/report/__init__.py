"""Figures from saved head profiles.

The functions of `figures` take profiles and return a `matplotlib.figure.Figure`; `write` saves them. Nothing here
imports torch.
"""

from anchorscope.report.figures import layer_head_grid, recall_by_position, recall_density, stripe_heatmap
from anchorscope.report.write import draw_all, save_figure

__all__ = [
    "draw_all",
    "layer_head_grid",
    "recall_by_position",
    "recall_density",
    "save_figure",
    "stripe_heatmap",
]
