"""What shared experts (FSSDP) make of uneven routing: how far copies even ranks out, within memory and the link.

An assumed load is named by its busiest rank (`loads.LOADS`); how experts' loads come to it is an assumption: their
logarithms are spread like a normal distribution, as far as gives that busiest rank, and the heaviest lie together.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp
from statistics import NormalDist

from parallel.estimates.hardware import Hardware
from parallel.estimates.loads import LOADS, Recorded, Shared
from parallel.estimates.network import Network
from parallel.estimates.workload import Workload
from parallel.fssdp import Limits, Wire, busiest, materialise
from parallel.fssdp_dispatch import peak
from parallel.placement import Placement

MEMORY_SHARE = 0.04
"""Of a device's memory: what copies of two layers may take together, one that computes and one that is on its way."""


def busiest_rank(workload: Workload) -> float:
    """Tokens of the busiest expert-parallel rank over the mean, where each computes its own experts."""
    if workload.layout.ep == 1:
        return 1.0
    if isinstance(workload.load, Recorded):
        return workload.load.busiest(workload.layout.ep)
    return LOADS[workload.load]


def wire_of(workload: Workload, device: Hardware) -> Wire:
    """What an expert crosses from its owner to a copy's holder."""
    network, layout, model = Network(device, workload.devices_per_node), workload.layout, workload.model
    link = device.fast_link if layout.ep * layout.etp <= network.domain else device.network_link
    return Wire(link, workload.element * 3 * model.hidden * model.expert_ffn / layout.etp)


def limits_of(workload: Workload, device: Hardware, window_seconds: float) -> Limits:
    """window_seconds: forward of a layer's attention on one rank, behind which its experts' copies come."""
    wire, experts = wire_of(workload, device), workload.model.experts
    slots = min(experts, int(MEMORY_SHARE * device.memory_bytes / (2 * wire.expert_bytes)))
    return Limits(slots, wire.movable(window_seconds, experts))


def copies_bytes(workload: Workload, device: Hardware) -> float:
    """That copies take of a rank's memory at most; nothing where experts are not shared."""
    if workload.expert_parallelism != "fssdp" or workload.layout.ep == 1:
        return 0.0
    return 2 * limits_of(workload, device, float("inf")).slots * wire_of(workload, device).expert_bytes


def shared(workload: Workload, limits: Limits) -> Shared:
    """Where expert-parallel ranks share their experts."""
    if isinstance(workload.load, Recorded):
        return workload.load.shared(workload.layout.ep, limits)
    return assumed(workload.model.experts, workload.layout.ep, LOADS[workload.load], limits)


@lru_cache(maxsize=1 << 12)
def assumed(experts: int, ranks: int, load: float, limits: Limits) -> Shared:
    """Of experts over ranks whose busiest has `load` times the mean without copies."""
    loads = _loads(experts, ranks, load)
    even = Placement.even(experts, ranks)
    placed = materialise(even, [loads], limits)
    mean = sum(loads) / ranks
    return Shared(peak(placed, loads) / mean, placed.copies, busiest(even, placed))


def _loads(experts: int, ranks: int, load: float) -> list[float]:
    """The heaviest first."""
    places = [NormalDist().inv_cdf(1 - (number + 0.5) / experts) for number in range(experts)]
    low, high = 0.0, 20.0
    for _ in range(40):
        spread = (low + high) / 2
        loads = [exp(spread * (place - places[0])) for place in places]
        if sum(loads[: experts // ranks]) * ranks < load * sum(loads):
            low = spread
        else:
            high = spread
    return loads
