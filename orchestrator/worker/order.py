"""Which sample comes when: pure functions of a sample's number in the run, so that a run is resumed by one number.

They lean on no library's random numbers: a run resumed under another version of numpy reads the same text.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 1 << 16
"""Weights that no fewer samples can hold exactly are rounded to a sample in this many, and up to at least one."""


def permuted(sample: int, count: int, order: str) -> int:
    """The item (0..count-1) that a sample reads: each once an epoch, in an order drawn from (order, epoch).

    A keyed permutation in constant memory: a four-round Feistel network (Luby and Rackoff 1988) over the next even
    power of two, walked until it falls inside (Black and Rogaway 2002).
    """
    epoch, at = divmod(sample, count)
    key = hashlib.blake2b(f"{order}/{epoch}".encode(), digest_size=32).digest()
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = at >> bits, at & mask
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (turn, right), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        at = left << bits | right
        if at < count:
            return at


class Blend:
    """Turns of sources by their weights: among the first n samples, source s has its share of n, to within one.

    The turns repeat after a period. Within it the n-th sample of a source has the window of turns that the bound leaves
    it, and the earliest deadline goes first, which always fits (proportionate progress: Baruah et al. 1996; that such
    turns exist: Tijdeman 1980).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _whole_numbers(weights)
        """Samples of each source in a period."""
        self._turns = _turns(self.shares)
        self._before = np.empty_like(self._turns)
        for source, share in enumerate(self.shares):
            self._before[self._turns == source] = np.arange(share)

    def at(self, sample: int) -> tuple[int, int]:
        """The source whose turn a sample is, and how many samples that source has given before it."""
        period, turn = divmod(sample, len(self._turns))
        source = int(self._turns[turn])
        return source, period * self.shares[source] + int(self._before[turn])


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as they are written in decimals, or near it."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [number // math.gcd(*whole) for number in whole]
    if sum(whole) > LONGEST_PERIOD:
        whole = [max(1, round(weight / sum(exact) * LONGEST_PERIOD)) for weight in exact]
    return whole


def _turns(shares: list[int]) -> np.ndarray:
    """int32 [sum of shares]: the source of each turn of a period."""
    period, given = sum(shares), [0] * len(shares)
    early = [(0, source) for source in range(len(shares))]  # (first turn it may have, source)
    due: list[tuple[int, int]] = []  # (last turn it may have, source)
    turns = np.empty(period, np.int32)
    for turn in range(period):
        while early and early[0][0] <= turn:
            source = heapq.heappop(early)[1]
            heapq.heappush(due, (-(-(given[source] + 1) * period // shares[source]) - 1, source))
        source = turns[turn] = heapq.heappop(due)[1]
        given[source] += 1
        if given[source] < shares[source]:
            heapq.heappush(early, (given[source] * period // shares[source], source))
    return turns
