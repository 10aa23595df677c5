"""What a rank does in collectives, as its agent and its controller see it: which one it is in, and how long it waits.

Process groups and their work are wrapped where torch hands them to Python, below Megatron and DeepSpeed, which keep
references of their own to torch.distributed's functions. On gloo a rank waits in `Work.wait`. On NCCL that returns at
once, the device waits instead, and only the count and the name of what was begun tell anything.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from orchestrator.pulse import Pulse
from parallel.layout import Layout

_METHODS = (
    *("allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base"),
    *("allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("broadcast", "reduce", "gather", "scatter", "alltoall", "alltoall_base", "send", "recv", "recv_anysource"),
    "barrier",
)
_AXES = ("tp", "cp", "dp", "dp cp", "pp", "tp cp", "tp dp", "tp cp dp", "etp", "ep", "edp", "etp ep", "etp ep edp")
"""Of groups, in the order in which they are named: of equal groups the first."""


class CollectivesSeen:
    """Of one rank, from `install` on; there is one a process."""

    def __init__(self, pulse: Pulse, layout: Layout, rank: int) -> None:
        self._pulse = pulse
        self._waited: dict[str, float] = defaultdict(float)
        self._pending: dict[int, str] = {}
        self._names: dict[str, str] = {}
        self._axes: dict[tuple[int, ...], str] = {}
        for axes in _AXES:
            group = next(group for group in layout.groups(*axes.split()) if rank in group)
            self._axes.setdefault(group, axes)

    def install(self) -> None:
        for name in _METHODS:
            method = getattr(dist.ProcessGroup, name, None)
            if method is not None:
                setattr(dist.ProcessGroup, name, self._begun(name.strip("_"), method))
        dist.Work.wait = self._ended(dist.Work.wait)

    def take(self) -> dict[str, float]:
        """Seconds waited since the last call, by the axes of the group."""
        taken, self._waited = dict(self._waited), defaultdict(float)
        self._pending.clear()  # what nobody waits for
        return taken

    def _begun(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *given: Any, **named: Any) -> Any:
            axes = self._names.get(group.group_name) or self._name(group)
            self._pulse.collective(f"{name} {axes}")
            began = time.perf_counter()
            work = method(group, *given, **named)
            self._waited[axes] += time.perf_counter() - began  # where it lets its caller wait for the others at once
            self._pending[id(work)] = axes
            return work

        return call

    def _ended(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(work: Any, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return wait(work, *given, **named)
            finally:
                self._waited[self._pending.pop(id(work), "other")] += time.perf_counter() - began
                self._pulse.collective_ended()

        return waiting

    def _name(self, group: Any) -> str:
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        self._names[group.group_name] = self._axes.get(ranks, "other")
        return self._names[group.group_name]
