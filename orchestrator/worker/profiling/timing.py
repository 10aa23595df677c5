"""How long a call takes, on the host's clock or the device's, repeated for as long as it is given."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Busy = Callable[[int], None]
"""Keeps a device busy for as long as the host takes to start so many calls."""

BATCHES = 5
"""Of calls on a GPU that are timed as one; their median counts."""
MOST_CALLS = 50
"""Of a batch: fewer than a device queues before the host has to wait."""
_LEAST = 3


def tell(**facts: Any) -> None:
    """A JSON line for the process that started this one."""
    print(json.dumps(facts), flush=True)


def sample(what: str, seconds: float, precision: str = "bf16", **sizes: int) -> None:
    """Tell what a call took; see parallel.evidence.machine.Sample."""
    tell(sample={"what": what, "seconds": seconds, "precision": precision, "sizes": sizes})


def timed(device: torch.device, calls: Sequence[Call], seconds: float, busy: Busy) -> float:
    """Median seconds of a call. `calls` do the same work on different memory, and are made in turn for `seconds`.

    Each is made once before, untimed. On a GPU the time is the device's own, without what the host takes to start.
    """
    for call in calls:
        call()
    return _on_gpu(calls, seconds, busy) if device.type == "cuda" else _on_host(calls, seconds)


def _on_host(calls: Sequence[Call], seconds: float) -> float:
    found: list[float] = []
    while len(found) < _LEAST or sum(found) < seconds:
        start = time.perf_counter()
        calls[len(found) % len(calls)]()
        found.append(time.perf_counter() - start)
        if found[-1] > seconds:  # one call is all that there is time for
            break
    return statistics.median(found)


def _on_gpu(calls: Sequence[Call], seconds: float, busy: Busy) -> float:
    estimate = gpu_batch(calls, len(calls), busy) / len(calls)
    number = max(1, min(MOST_CALLS, int(seconds / BATCHES / max(estimate, 1e-7))))
    return statistics.median(gpu_batch(calls, number, busy) / number for _ in range(BATCHES))


def gpu_batch(calls: Sequence[Call], number: int, busy: Busy) -> float:
    """Seconds between the first call's start and the last one's end, all queued behind a busy device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    busy(number)
    begin.record()
    for index in range(number):
        calls[index % len(calls)]()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def idle(number: int) -> None:
    """Keep a device busy without work, 0.1 ms or so for each call."""
    torch.cuda._sleep(200_000 * number)
