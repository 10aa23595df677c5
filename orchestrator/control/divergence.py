"""Whether a loss has left what training does: at once where it is no number, else after some steps far too high. Pure.

A spike is not an error: batches differ, routers jump, and losses come down again. What stays at twice the usual, beyond
all that the last steps' spread explains, is one: weights that a broken step ruined do not come back.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW = 64
_LEAST = 8
"""Steps before anything can be called usual."""
_STEPS = 5
"""In a row, beyond the bound."""
_SPREADS, _SHARE = 10.0, 1.0
"""The bound: so many median absolute deviations (as of a normal's) and this share above the median, the higher."""


class Divergence:
    """Of one run: fed with each step's figures, it tells the first step at which it had diverged."""

    def __init__(self) -> None:
        self._usual: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._beyond: list[int] = []

    def begin(self, start_step: int) -> None:
        """An attempt goes on from `start_step`: later ones never were."""
        self._usual = deque(((step, loss) for step, loss in self._usual if step <= start_step), maxlen=_WINDOW)
        self._beyond.clear()

    def add(self, step: int, loss: float, grad_norm: float) -> int | None:
        """The first step that shows it, once that is certain; None in a healthy run."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._beyond[0] if self._beyond else step
        if loss <= self._bound():
            self._beyond.clear()
            self._usual.append((step, loss))
            return None
        self._beyond.append(step)
        return self._beyond[0] if len(self._beyond) >= _STEPS else None

    def _bound(self) -> float:
        if len(self._usual) < _LEAST:
            return math.inf
        losses = [loss for _, loss in self._usual]
        middle = median(losses)
        spread = 1.4826 * median(abs(loss - middle) for loss in losses)
        return middle + max(_SPREADS * spread, _SHARE * abs(middle))
