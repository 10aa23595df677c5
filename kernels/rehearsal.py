"""Rehearsals: a short sequence is computed as the long one will be, cut in as many runs of tokens, shorter ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_times = [1.0]


@contextmanager
def rehearsing(times: float) -> Iterator[None]:
    """What is computed meanwhile, on any thread, stands for what has `times` its tokens."""
    _times.append(times)
    try:
        yield
    finally:
        _times.pop()


def stands_for(tokens: int) -> int:
    """As many as computing so many tokens stands for; outside a rehearsal themselves."""
    return round(tokens * _times[-1])
