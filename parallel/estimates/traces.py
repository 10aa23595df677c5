"""Uneven routing made up: loads of experts that are Zipf-distributed and wander from step to step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def wandering(
    draw: np.random.Generator, experts: int, skew: float, *, heaviest_first: bool = False
) -> Iterator[np.ndarray]:
    """Shares of a layer's tokens, float64 [experts], step by step without an end; an expert's is as (1 + its turn)
    to the power of -`skew` in the mean.

    Each wanders by 5% a step, with a twentieth of the way back. The turns of experts are drawn, or ascending where the
    `heaviest_first` is: then those of expert parallelism's first rank have most.
    """
    mean = -skew * np.log(np.arange(1, experts + 1))
    if not heaviest_first:
        draw.shuffle(mean)
    off = np.zeros(experts)
    while True:
        off = 0.95 * off + draw.normal(0, 0.05, experts)
        shares = np.exp(mean + off)
        yield shares / shares.sum()


ALMOST = 1 - 1e-6
"""Of all tokens, what an expert has at most: sums of rounded numbers then never take it twice for one token."""


def inclusion(shares: np.ndarray, top_k: int) -> np.ndarray:
    """How likely a token that chooses `top_k` different experts is to choose each, [experts], for such shares.

    They sum to top_k. An expert that would need more than all tokens has about all, the others share what is left.
    """
    likely = np.zeros(len(shares))
    full = np.zeros(len(shares), bool)
    while True:
        left = top_k - ALMOST * full.sum()
        likely[~full] = left * shares[~full] / shares[~full].sum()
        over = likely > ALMOST
        if not over.any():
            return likely
        full |= over
        likely[full] = ALMOST
