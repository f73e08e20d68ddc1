"""Colors that mean the same in every figure and on the page: Okabe and Ito's, told apart with any color vision."""

from __future__ import annotations

BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
PINK, PURPLE, OLIVE = "#CC79A7", "#8C6BB1", "#8A8A00"

# Lines of the page in their order: what anchors keep, the stripe oracle, then anything else. No yellow, which is faint
# on white, and no black, which is not seen on dark.
PAGE = (BLUE, ORANGE, GREEN, PINK, RED, SKY, PURPLE, OLIVE)
