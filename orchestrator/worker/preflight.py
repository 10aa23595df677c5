"""What a node can do at this moment, in well under a second on a CPU: asked before ranks are launched there."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

_SIDE = {"cpu": 768, "cuda": 8192}
"""Of the square matrices that are multiplied."""
_COPIED_BYTES = 1 << 26
_WRITTEN_BYTES = 1 << 24
_TIMES = 3


def measure(device: str, folder: Path) -> dict[str, Any]:
    """GFLOP/s and copied GB/s of the slowest device, free share of its memory, MB/s to `folder`, Unix time then."""
    places = [torch.device("cpu")] if device == "cpu" else [torch.device("cuda", at) for at in _devices()]
    found = [_compute(place) for place in places]
    return {
        "gflops": min(gflops for gflops, _, _ in found),
        "copied_gb_s": min(copied for _, copied, _ in found),
        "free_memory": min(free for _, _, free in found),
        "written_mb_s": _write(folder),
        "at": time.time(),
    }


def _devices() -> range:
    return range(torch.cuda.device_count())


def _compute(place: torch.device) -> tuple[float, float, float]:
    torch.set_num_threads(1)
    side = _SIDE[place.type]
    free, total = torch.cuda.mem_get_info(place) if place.type == "cuda" else (1, 1)
    one = torch.rand(side, side, device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    block = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=place)
    multiplied = _best(place, lambda: torch.mm(one, one))
    copied = _best(place, lambda: block.clone())
    return 2 * side**3 / multiplied / 1e9, 2 * _COPIED_BYTES / copied / 1e9, free / total


def _best(place: torch.device, work: Any) -> float:
    """Seconds of the quickest of a few, after one that warms up."""
    seconds = []
    for _ in range(_TIMES + 1):
        began = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _write(folder: Path) -> float:
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_WRITTEN_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return _WRITTEN_BYTES / (time.perf_counter() - began) / 1e6
