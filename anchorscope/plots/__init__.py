"""Every figure: arrays and saved profiles in, a `matplotlib.figure.Figure` out; `save` makes files of them.

Nothing here imports torch, and nothing touches matplotlib's global settings.
"""
