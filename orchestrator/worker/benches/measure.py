"""Peers side by side: the same work by several ways in turn, so that what a device does meanwhile befalls all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """One way of doing a work."""

    median: float
    """Seconds, of the device's own where it is a GPU."""
    low: float
    """The tenth of a hundred."""
    high: float
    """The ninetieth."""
    peak_bytes: int | None
    """Allocated beyond what was there before, at most; a CPU does not tell."""


def side_by_side(ways: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Timed]:
    """Each way once a round, for so many rounds after one that is not timed."""
    peaks = {name: _peak(call, device) for name, call in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            found[name].append(seconds(call, device))
    return {name: _timed(times, peaks[name]) for name, times in found.items()}


def seconds(call: Call, device: torch.device) -> float:
    """Of one call. On a GPU a short sleep goes before it, so that the host is ahead of the device, as in training."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(30_000_000)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _peak(call: Call, device: torch.device) -> int | None:
    call()
    if device.type == "cpu":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _timed(times: list[float], peak: int | None) -> Timed:
    if len(times) == 1:
        return Timed(times[0], times[0], times[0], peak)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timed(statistics.median(times), tenths[0], tenths[-1], peak)


def kept_bytes(call: Callable[[], torch.Tensor], given: tuple[torch.Tensor, ...]) -> int:
    """What a forward pass keeps for backward, beside what it is given."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for place, size in held.items() if place not in {t.untyped_storage().data_ptr() for t in given})


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large product, the ceiling of all that products make: 8,192 cubed in bf16, or less on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(seconds(lambda: left @ right, device) for _ in range(10))
