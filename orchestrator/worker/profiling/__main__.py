"""Measures this machine for `python -m orchestrator.worker.profiling SECONDS`: JSON lines of facts and of samples.

Each part runs on ranks of its own, so that one that fails or hangs leaves the others as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from orchestrator.worker.host_memory import available_bytes
from orchestrator.worker.profiling import kernels, links, machine
from orchestrator.worker.profiling.timing import tell
from orchestrator.worker.ranks import Ranks
from parallel.evidence.machine import COLLECTIVES

CPU_RANKS = 4
"""That a machine without GPUs is measured with, as the shipped cluster of one has."""
DEVICE_SHARE, HOST_SHARE = 0.55, 0.1
"""Of the time; the collectives share the rest."""
IMPORT_SECONDS = 120.0
"""That torch may take to be imported, once for all ranks."""
START_SECONDS = 45.0
"""That ranks may take beyond what they measure: processes, CUDA, NCCL."""


def main() -> None:
    seconds = float(sys.argv[1])
    kind = "cuda" if torch.cuda.device_count() else "cpu"
    ranks = Ranks(kind, preload=("orchestrator.worker.profiling.kernels", "orchestrator.worker.profiling.links"))
    world = torch.cuda.device_count() if kind == "cuda" else CPU_RANKS
    facts: dict[str, Any] = ranks.run(1, machine.facts, kind, seconds=IMPORT_SECONDS)[0]
    host = {"host_memory_bytes": available_bytes() // world} if kind == "cuda" else {}
    tell(machine={**facts, **host, "kind": kind, "devices": world})
    free = facts["free_bytes"] // (1 if kind == "cuda" else world)
    part = Parts(ranks, time.monotonic() + seconds + 2 * START_SECONDS)
    part.run("device", 1, kernels.measure, kind, free, seconds * DEVICE_SHARE)
    part.run("host", world, links.host, kind, free, seconds * HOST_SHARE)
    each = seconds * (1 - DEVICE_SHARE - HOST_SHARE) / len(COLLECTIVES)
    for name in COLLECTIVES if world > 1 else ():
        part.run(name, world, links.collective, kind, name, free, each)


class Parts:
    """Runs one part after another until `deadline`; what fails is told."""

    def __init__(self, ranks: Ranks, deadline: float) -> None:
        self._ranks, self._deadline = ranks, deadline

    def run(self, name: str, world: int, function: Callable[..., None], *args: Any) -> None:
        """`args` end with the seconds that the part measures."""
        left = min(self._deadline - time.monotonic(), args[-1] + START_SECONDS)
        try:
            if left <= 0:
                raise TimeoutError("no time was left")
            self._ranks.run(world, function, *args, seconds=left)
        except (RuntimeError, TimeoutError) as error:
            tell(failed=name, why=str(error).strip().splitlines()[-1])


if __name__ == "__main__":
    main()
