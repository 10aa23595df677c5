"""Who owns which experts under FSSDP, of all layers of a rank: see `models.sparse_experts`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from models.sparse_experts import Place, SparseExperts
from models.sparse_trips import OnTheHost, sent
from parallel.fssdp import LoadHistory, materialise
from parallel.fssdp_journeys import Numbers
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

    def remembered(self) -> OnTheHost:
        """Loads [layers][iterations][experts]."""
        return OnTheHost(torch.stack(self._histories))

    def decision(self, remembered: Numbers) -> Callable[[], list[Placement]]:
        """What finds which experts of each layer to copy. Alike on all ranks."""
        asked = [
            (each.sharded, loads, each.means.limits)
            for each, loads in zip(self.layers.values(), remembered, strict=True)
        ]
        return lambda: [materialise(sharded, history(loads).forecasts(), limits) for sharded, loads, limits in asked]

    def copy(self, placements: Sequence[Placement]) -> None:
        """In the iteration that begins."""
        for layer, placement in zip(self.layers.values(), placements, strict=True):
            layer.placement = placement

    def remember(self, replicas: dist.ProcessGroup) -> OnTheHost:
        """The loads of the iteration that ends; gives all that is remembered now.

        Collective over `replicas`, who own the same, and decide alike.
        """
        taken = torch.stack([layer.taken_loads() for layer in self.layers.values()])
        loads = sent(taken, self._histories[0].device)
        dist.all_reduce(loads, group=replicas)
        now = torch.cat((torch.stack(self._histories)[:, 1:], loads[:, None]), 1)
        torch._foreach_copy_(self._histories, list(now.unbind()))
        return OnTheHost(now)

    @property
    def _histories(self) -> list[torch.Tensor]:
        return [layer.history for layer in self.layers.values()]

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
            [history(loads).predicted() for loads in self.remembered().answer()],
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


def history(iterations: Numbers) -> LoadHistory:
    """Of loads [iterations][experts], those before the first iteration below 0."""
    loads = LoadHistory(iterations.shape[1])
    for iteration in iterations.tolist():
        if iteration[0] >= 0:
            loads.add(iteration)
    return loads
