"""Who owns which experts under FSSDP, of all layers of a rank: see `models.sparse_experts`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from models.sparse_experts import Place, SparseExperts
from parallel.fssdp import materialise
from parallel.fssdp_sharding import reshard
from parallel.placement import Placement

Owners = Mapping[int, Sequence[int]]
"""By layer, the rank of the group that owns each expert."""


class Owned:
    """The layers of a rank that share its places, in the order in which a micro-batch visits them."""

    def __init__(self, layers: Mapping[int, SparseExperts]) -> None:
        """layers: by number, from 0, in the model."""
        self.layers = dict(sorted(layers.items()))
        for below, layer in itertools.pairwise(self.layers.values()):
            layer.last_below = partial(getattr, below, "last")
        for layer in self.layers.values():
            layer.reset()
        self.places: list[Place] = [(layer, at) for layer in self.layers.values() for at in range(len(layer.gate_up))]
        self.experts: list[tuple[int, int]] = []
        """Layer and expert that lie in each of `places`."""
        self.settle()

    def turn(self) -> None:
        """Micro-batches come back from the last of the layers at once."""
        list(self.layers.values())[-1].turns = True

    def decision(self) -> Callable[[], list[Placement]]:
        """What finds, of what is remembered now, which experts of each layer to copy. Alike on all ranks."""
        asked = [(each.sharded, each.remembered(), each.means.limits) for each in self.layers.values()]
        return lambda: [materialise(sharded, loads.forecasts(), limits) for sharded, loads, limits in asked]

    def copy(self, placements: Sequence[Placement]) -> None:
        """In the iteration that begins."""
        for layer, placement in zip(self.layers.values(), placements, strict=True):
            layer.placement = placement

    def remember(self, replicas: dist.ProcessGroup) -> None:
        """The loads of the iteration that ends. Collective over `replicas`, who own the same, and decide alike."""
        device = next(iter(self.layers.values())).history.device
        loads = torch.stack([layer.taken_loads() for layer in self.layers.values()]).to(device)
        dist.all_reduce(loads, group=replicas)
        for layer, mine in zip(self.layers.values(), loads, strict=True):
            layer.history.copy_(torch.cat((layer.history[1:], mine[None])))

    def own(self, owners: Owners) -> None:
        """These are the owners, and have what they own. Experts of a rank lie by layer and number."""
        for number, layer in self.layers.items():
            layer.owners.copy_(torch.tensor(owners[number]))
        self.settle()

    def owners(self) -> Owners:
        return {number: layer.owners.tolist() for number, layer in self.layers.items()}

    def even_owners(self) -> Owners:
        """As expert parallelism has them."""
        return {number: [held[0] for held in layer.even.holders] for number, layer in self.layers.items()}

    def chosen_owners(self) -> Owners:
        """Even ones where the chosen were of another layout, which had other ranks or other layers in a stage."""
        chosen = {number: layer.chosen.tolist() for number, layer in self.layers.items()}
        places = Counter(owner for owners in chosen.values() for owner in owners)
        ranks = next(iter(self.layers.values())).even.ranks
        fits = all(places[rank] == len(self.places) for rank in range(ranks))
        return chosen if fits else self.even_owners()

    def choose(self) -> None:
        """Owners for what is remembered. Alike on all ranks; nothing moves yet."""
        for number, owners in self._better_owners().items():
            self.layers[number].chosen.copy_(torch.tensor(owners))

    def _better_owners(self) -> Owners:
        layers = list(self.layers.values())
        means = layers[0].means
        shardings = reshard(
            [layer.sharded for layer in layers],
            [layer.remembered().predicted() for layer in layers],
            means.topology,
            means.limits,
        )
        return {
            number: [owner for (owner,) in sharded.holders]
            for number, sharded in zip(self.layers, shardings, strict=True)
        }

    def settle(self) -> None:
        """Owners are as the layers' buffers say, which were overwritten."""
        for number, owners in self.owners().items():
            layer = self.layers[number]
            layer.sharded = layer.placement = Placement.sharded(owners, layer.even.ranks)
        rank = next(iter(self.layers.values())).rank
        self.experts = [
            (number, expert) for number, layer in self.layers.items() for expert in layer.sharded.held_by(rank)
        ]
        assert len(self.experts) == len(self.places), "all ranks own equally many experts"
        for layer in self.layers.values():
            layer.held = {}
        for (number, expert), place in zip(self.experts, self.places, strict=True):
            self.layers[number].held[expert] = place
