"""Experts under fully sharded sparse data parallelism: owned by one rank of a group, computed by as many as they need.

After Hecate. A rank has as many places for experts as under expert parallelism, but any expert of its layers may lie in
any of them: `Owned` says who owns what, for all of a rank's layers, and `SparseExperts` computes a layer's. What is
decided is `parallel.fssdp`'s; how copies come and go, `parallel.replicas`'.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from kernels.permute import order_by_expert
from models.sparse_trips import OnTheHost, Trip, Ways, packed
from parallel.collectives import Lane, Spread, spreads
from parallel.fssdp import WINDOW, LoadHistory, Means, calibrate, materialise
from parallel.fssdp_sharding import reshard
from parallel.placement import Placement
from parallel.replicas import Replicas, is_backward


class Here(NamedTuple):
    """What a rank computes a layer's tokens with, where they come in parts."""

    placement: Placement
    stacks: list[tuple[Any, ...]]
    """Each of some experts: their numbers, and their gate_up and down as autograd sees them."""
    replicas: list[Replicas]
    """That are entered, and to be left."""

    @property
    def weights(self) -> list[Tensor]:
        return [weight for _, *both in self.stacks for weight in both if weight is not None]


class Away(NamedTuple):
    """Tokens on their way to experts."""

    trip: Trip
    ways: Ways
    replicas: list[Replicas]
    """To be entered when the tokens have come."""
    here: Here | None


class SparseExperts(nn.Module):
    """A layer's experts, and this rank's places for experts of any layer.

    `gate_up` and `down` have a parameter a place: [2, width, hidden], gate first, and [hidden, width].
    """

    owners: Tensor
    chosen: Tensor
    history: Tensor

    def __init__(
        self,
        model: ModelArchitecture,
        gate_up: Sequence[nn.Parameter],
        down: Sequence[nn.Parameter],
        lane: Lane,
        group: dist.ProcessGroup,
        means: Means,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = nn.ParameterList(gate_up), nn.ParameterList(down)
        self.arrivals = nn.Identity()
        """Sees the rows that this rank computes."""
        self.experts, self.top_k = model.experts, model.top_k
        self._lane, self._group, self.means = lane, group, means
        self._ranks = dist.get_world_size(group)
        self.rank = lane.rank
        even = Placement.even(self.experts, self._ranks)
        self.register_buffer("owners", torch.empty(self.experts, dtype=torch.int64), persistent=False)
        # State of a run, as weights are: what is copied depends on it, and so the last bit of a sum. For a checkpoint
        # experts lie evenly; these are the owners that they go back to.
        self.register_buffer("chosen", torch.empty(self.experts, dtype=torch.int64))
        self.register_buffer("history", torch.empty(WINDOW, self.experts, dtype=torch.int64))
        self.held: dict[int, Sequence[Tensor]] = {}
        """By expert that this rank owns, its parameters, wherever they lie."""
        self.sharded = self.placement = self.even = even
        self._loads = torch.zeros(self.experts, dtype=torch.int64)
        self._copied: Replicas | None = None
        self._is_sent_for = False
        self._here: Here | None = None
        self.last: Replicas | None = None
        self.last_below: Callable[[], Replicas | None] = _none
        """`last` of the layer that a micro-batch visits before this one on this rank."""

    def reset(self) -> None:
        """As expert parallelism has owners, and nothing remembered."""
        even = torch.tensor([held[0] for held in self.even.holders])
        self.owners.copy_(even)
        self.chosen.copy_(even)
        self.history.fill_(-1)

    def remembered(self) -> LoadHistory:
        loads = LoadHistory(self.experts)
        for iteration in self.history.tolist():
            if iteration[0] >= 0:
                loads.add(iteration)
        return loads

    def taken_loads(self) -> Tensor:
        """Tokens of each expert since this was last asked, int64 [experts]."""
        loads, self._loads = self._loads, torch.zeros_like(self._loads)
        return loads

    def send_for_copies(self, hidden: Tensor) -> Tensor:
        """Before the layer's attention; `depart` does it otherwise. Gives `hidden` itself."""
        is_first_pass = torch.is_grad_enabled() and not is_backward()
        below = self.last_below() if is_first_pass else None
        self._copied = self._copies({} if self.placement.is_sharded else spreads(self.sharded, self.placement), below)
        self._is_sent_for = True
        self.last = self._copied if is_first_pass else None
        return hidden if self._copied is None else self._copied.begin(hidden)

    def enter(self, weights: Tensor, counts: Tensor) -> tuple[Tensor, Here]:
        """Before tokens depart in parts: have the copies that all of them want, and whose gradients go back together.

        Routers' weights, and this rank's tokens of each expert [experts]. Gives the weights that are to depart.
        Forward: an all-gather of as many counts as there are experts.
        """
        if not self._is_sent_for:
            weights = self.send_for_copies(weights)
        loads = self._gathered(counts).answer().sum(0).tolist()
        weights, placement, replicas = self._completed(weights, loads)
        stacks = [self._own_stacks()]
        for each in replicas:
            weights, *copies = each.enter(weights)
            stacks.append((each.experts, *copies))
        return weights, Here(placement, stacks, replicas)

    @contextmanager
    def computing_with(self, here: Here) -> Iterator[None]:
        """Tokens that depart meanwhile are a part of those that `enter` saw."""
        self._here = here
        yield
        self._here = None

    def leave(self, out: Tensor, here: Here) -> Tensor:
        """Gives `out` itself, the last of what was computed with them."""
        for each in here.replicas:
            out = each.leave(out)
        return out

    def depart(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Away:
        """Hidden states [tokens, hidden], who is chosen (bool) and routers' weights, both [tokens, experts], set out.

        Forward and backward: each an all-to-all of the tokens' copies there and one back, but for those that stay; and,
        forward, an all-gather of as many counts as there are experts.
        """
        here = self._here
        if here is None and not self._is_sent_for:
            hidden = self.send_for_copies(hidden)
        order = order_by_expert(chosen, self.top_k)
        asked = self._gathered(order.counts)
        placement = self.placement if here is None else here.placement
        # What needs no answer is under way while the host waits for one.
        set_out = packed(hidden, weights, order) if placement.is_in_order else None
        tokens, replicas = asked.answer(), []
        if here is None:
            loads = tokens.sum(0).tolist()
            hidden, further, replicas = self._completed(hidden, loads)
            if further is not placement:
                placement, set_out = further, None
        trip = Trip.of(placement, self.means.topology, tokens, order, self.rank, self._group)
        return Away(trip, trip.depart(*(set_out or packed(hidden, weights, trip.order))), replicas, here)

    def forward(self, away: Away) -> Tensor:
        """The weighted sum of what each token's experts make of it, [tokens, hidden]."""
        trip, ways, replicas, here = away
        rows, of_rows = (way.arrive() for way in ways)
        rows = self.arrivals(rows)
        stacks = [self._own_stacks()] if here is None else here.stacks
        for each in replicas:
            rows, *copies = each.enter(rows)
            stacks.append((each.experts, *copies))
        made = trip.computed(rows, of_rows, stacks)
        for each in replicas:
            made = each.leave(made)
        return trip.back(made)

    def _gathered(self, counts: Tensor) -> OnTheHost:
        """Tokens [ranks][experts], of each rank's counts [experts]."""
        all_counts = counts.new_empty(self._ranks * self.experts)
        dist.all_gather_into_tensor(all_counts, counts, group=self._group)
        return OnTheHost(all_counts.view(self._ranks, self.experts))

    def _completed(self, begun: Tensor, loads: Sequence[int]) -> tuple[Tensor, Placement, list[Replicas]]:
        """The copies that were sent for and, now that loads are known, more; `begun` itself; loads are remembered."""
        if self.training and not is_backward():  # once, if forward is computed again in it
            self._loads += torch.tensor(loads)
        self._is_sent_for = False
        replicas, self._copied = [] if self._copied is None else [self._copied], None
        further = self._calibrated(loads)
        if further is None:
            return begun, self.placement, replicas
        extra = self._copies(spreads(self.sharded, further, self.placement))
        assert extra is not None
        return extra.begin(begun), further, [*replicas, extra]

    def _copies(self, spread: Mapping[int, Spread], below: Replicas | None = None) -> Replicas | None:
        if not spread:
            return None
        owned = {expert: self.held[expert] for expert in spread if expert in self.held}
        shapes = (self.gate_up[0].flatten(0, 1).shape, self.down[0].shape)
        return Replicas(self._lane, spread, owned, shapes, self.gate_up[0], below)

    def _calibrated(self, loads: Sequence[int]) -> Placement | None:
        means = self.means
        if means.wire is None:
            return None
        slots = means.limits.slots
        return calibrate(self.sharded, self.placement, loads, slots, means.token_seconds, means.wire)

    def _own_stacks(self) -> tuple[Any, ...]:
        """Experts in the order of their addresses, and their weights, which are not copied where they adjoin."""
        own = sorted(self.held, key=lambda expert: self.held[expert][0].data_ptr())
        gate_up = _Stack.apply(*(self.held[expert][0] for expert in own)) if own else None
        down = _Stack.apply(*(self.held[expert][1] for expert in own)) if own else None
        return own, None if gate_up is None else gate_up.flatten(1, 2), down


def _none() -> None:
    return None


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
        self.places = [(layer, at) for layer in self.layers.values() for at in range(len(layer.gate_up))]
        self.experts: list[tuple[int, int]] = []
        """Layer and expert that lie in each of `places`."""
        self.settle()

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
        for (number, expert), (home, at) in zip(self.experts, self.places, strict=True):
            self.layers[number].held[expert] = (home.gate_up[at], home.down[at])

    def parameters(self) -> Iterator[tuple[int, int, nn.Parameter, nn.Parameter]]:
        """Layer, expert, and its gate_up and down."""
        for (number, expert), (home, at) in zip(self.experts, self.places, strict=True):
            yield number, expert, home.gate_up[at], home.down[at]


class _Stack(torch.autograd.Function):
    """Tensors of one shape as one; no copy where they follow one another in memory."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        first, size = tensors[0], tensors[0].numel()
        step = size * first.element_size()
        adjoin = all(
            tensor.is_contiguous()
            and tensor.data_ptr() == first.data_ptr() + number * step
            and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            for number, tensor in enumerate(tensors)
        )
        if not adjoin:
            return torch.stack(tensors)
        return first.data.as_strided((len(tensors), *first.shape), (size, *first.stride()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.unbind()
