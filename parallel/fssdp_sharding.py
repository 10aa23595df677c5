"""Who owns which expert of which layer: the heterogeneous sharding of FSSDP, decided again every 100 iterations.

All ranks own equally many experts over all layers, but not of each: a rank may own none of a layer. Layers go by their
largest load, in a layer the heaviest expert first, to the least loaded node and there to the least loaded rank. Of
equals it is who has fewest places left: whoever takes a heavy expert takes few others of its layer, which evens out the
places that are left for later layers.

Hecate places the t heaviest experts last, wherever a place is left, as they are copied everywhere. Ours are copied no
more than is needed (parallel/fssdp.py), so it matters where they live: 58 layers of 256 experts, sharded over 64 ranks
from nothing, are served equally well by 35 copies a layer so, by 42 with the two heaviest of each layer last, by 51
with all last that weigh more than a rank's mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.fssdp import TOLERANCE, Limits, materialise
from parallel.fssdp_dispatch import Topology, peak
from parallel.placement import Placement

SAVING = 0.05
"""Of the layers' summed peak loads: what another sharding must save, for experts with their optimizer state to move."""


@dataclass(frozen=True)
class Move:
    layer: int
    expert: int
    sender: int
    receiver: int


def reshard(
    current: Sequence[Placement], loads: Sequence[Sequence[float]], topology: Topology, limits: Limits
) -> tuple[Placement, ...]:
    """By layer, a sharding for loads [layers][experts], or `current` where another would save less than SAVING.

    Compared is what layers' most loaded ranks compute, summed, once copies are made. An expert stays where it is as
    long as that leaves its rank no more than the tolerance above the mean.
    """
    found = _sharded(current, loads, topology)
    before, after = (
        sum(
            peak(materialise(layer, [layer_loads], limits), layer_loads)
            for layer, layer_loads in zip(shardings, loads, strict=True)
        )
        for shardings in (current, found)
    )
    return found if after <= before * (1 - SAVING) else tuple(current)


def moves(before: Sequence[Placement], after: Sequence[Placement]) -> Iterator[Move]:
    """Experts whose owner changes, by layer and expert: each with its weights and its optimizer state."""
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        for expert, ((sender, *_), (receiver, *_)) in enumerate(zip(old.holders, new.holders, strict=True)):
            if sender != receiver:
                yield Move(layer, expert, sender, receiver)


def _sharded(
    current: Sequence[Placement], loads: Sequence[Sequence[float]], topology: Topology
) -> tuple[Placement, ...]:
    free = _Free(sum(map(len, loads)), topology)
    owners = [[-1] * len(layer) for layer in loads]
    for layer in sorted(range(len(loads)), key=lambda layer: (-max(loads[layer], default=0.0), layer)):
        by_rank, by_node = [0.0] * topology.ranks, [0.0] * topology.nodes
        level = (1 + TOLERANCE) * sum(loads[layer]) / topology.ranks
        for expert in sorted(range(len(loads[layer])), key=lambda expert: (-loads[layer][expert], expert)):
            load = loads[layer][expert]
            owner = current[layer].holders[expert][0]
            if not free.by_rank[owner] or by_rank[owner] + load > max(level, load):
                owner = free.least(by_rank, by_node)
            owners[layer][expert] = owner
            free.take(owner)
            node = topology.node(owner)
            by_rank[owner] += load
            by_node[node] += load / len(topology.ranks_of(node))
    return tuple(Placement.sharded(layer, topology.ranks) for layer in owners)


class _Free:
    """Places for experts that are left, of all layers together: equally many a rank, to within one."""

    def __init__(self, experts: int, topology: Topology) -> None:
        each, more = divmod(experts, topology.ranks)
        self._topology = topology
        self.by_rank = [each + (rank < more) for rank in range(topology.ranks)]
        self._by_node = [sum(self.by_rank[rank] for rank in topology.ranks_of(node)) for node in range(topology.nodes)]

    def take(self, rank: int) -> None:
        self.by_rank[rank] -= 1
        self._by_node[self._topology.node(rank)] -= 1

    def least(self, by_rank: Sequence[float], by_node: Sequence[float]) -> int:
        """The least loaded rank with places of the least loaded node with places; by_node [nodes] is a rank's mean."""
        node = min(
            (node for node, places in enumerate(self._by_node) if places),
            key=lambda node: (by_node[node], self._by_node[node], node),
        )
        return min(
            (rank for rank in self._topology.ranks_of(node) if self.by_rank[rank]),
            key=lambda rank: (by_rank[rank], self.by_rank[rank], rank),
        )
