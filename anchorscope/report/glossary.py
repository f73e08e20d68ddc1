"""The words of the page, explained: shown where they stand, and at its end."""

from __future__ import annotations

GLOSSARY = {
    "recall": "The share of the attention mass that is kept, mean over the queries: 1 is dense attention.",
    "density": "The share of all visible (query, key) pairs that is computed. 1 is dense attention.",
    "sparsity": "1 minus the density: the share of pairs that is left out.",
    "anchor": "The first tokens and the nearest ones, always kept; the largest score there is a query's anchor.",
    "theta": "How far below its anchor a key's score may lie and still be kept, in nats. A larger theta keeps more.",
    "nats": "The unit of scores: a key 1 nat below another has 1/2.718 of its attention. 3 nats are a factor of 20.",
    "stripe": "A key that a group of queries keeps outside the anchor region: a vertical line in the attention map.",
    "group": "Neighboring queries that share one selection: block x step, a step of blocks with so many queries each.",
    "dense": "With every visible pair computed: attention as it is without AnchorScope.",
    "oracle": "The best choice of stripes there is, made with knowledge of all scores: a bound, not a method.",
    "output error": "How far the output of sparse attention lies from that of dense, relative to its size.",
    "output closeness": "The share of queries whose output differs from the dense one by less than so much.",
    "held out": "Prompts that no theta was fitted on: what is kept there is what to expect elsewhere.",
    "fitted": "Measured on the prompts that the thetas were chosen for: an optimistic number.",
    "p05": "The 5th percentile: what the worst 5% of the queries stay below.",
    "last rows": "The last block of queries, those that an answer is read from.",
    "perplexity": "How many tokens the model hesitates between, on average: less is better.",
    "divergence": "KL(dense || sparse): by how many nats the prediction of the next token changes, mean over tokens.",
    "top-1 agreement": "The share of tokens where sparse and dense find the same next token most likely.",
    "arm": "One way to run the model in an evaluation: dense, or a configuration of groups and thetas.",
    "speed-up": "The time of the fastest dense attention over that of the whole sparse pipeline, of attention alone.",
    "spread": "From the 20th to the 80th percentile of the repetitions, relative to the median.",
    "depth": "Where in the prompt the needle lies: 0 is the beginning, 1 the end.",
}
