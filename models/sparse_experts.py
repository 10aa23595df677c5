"""Experts under fully sharded sparse data parallelism: owned by one rank of a group, computed by as many as they need.

After Hecate. A rank has as many places for experts as under expert parallelism, but any expert of its layers may lie in
any of them: `models.sparse_owners` says who owns what, for all of a rank's layers; `SparseExperts` computes a layer's.
What is decided is `parallel.fssdp`'s; how copies come and go, `parallel.replicas`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from kernels.permute import order_by_expert
from models.sparse_trips import OnTheHost, Trip, Ways, packed
from parallel.collectives import Lane, Spread, spreads
from parallel.fssdp import WINDOW, Means, calibrate
from parallel.fssdp_journeys import Numbers
from parallel.placement import Placement
from parallel.replicas import Replicas, is_backward


class Stack(NamedTuple):
    """Some experts of a layer, and their weights as autograd sees them."""

    experts: Sequence[int] = ()
    gate_up: Tensor | None = None
    """[experts, 2 * width, hidden], gate first; None of no expert."""
    down: Tensor | None = None
    """[experts, hidden, width]."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return () if self.gate_up is None or self.down is None else (self.gate_up, self.down)


class Here(NamedTuple):
    """What a rank computes a layer's tokens with, where they come in parts."""

    placement: Placement
    stacks: list[Stack]
    replicas: list[Replicas]
    """That are entered, and to be left."""

    @property
    def weights(self) -> list[Tensor]:
        return [weight for stack in self.stacks for weight in stack.weights]


class Away(NamedTuple):
    """Tokens on their way to experts."""

    trip: Trip
    ways: Ways
    stacks: list[Stack]
    """Of the experts that are here already."""
    replicas: list[Replicas]
    """To be entered when the tokens have come."""


class SparseExperts(nn.Module):
    """A layer's experts, and this rank's places for experts of any layer.

    `gate_up` [places, ..., hidden], of each place gate before up, and `down` [places, hidden, width].
    """

    owners: Tensor
    chosen: Tensor
    history: Tensor

    def __init__(
        self,
        model: ModelArchitecture,
        gate_up: nn.Parameter,
        down: nn.Parameter,
        lane: Lane,
        group: dist.ProcessGroup,
        means: Means,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
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
        self.held: dict[int, Place] = {}
        """By expert that this rank owns, ascending places, in whichever layer."""
        self.sharded = self.placement = self.even = even
        self._loads: Numbers = np.zeros(self.experts, np.int64)
        self._copied: Replicas | None = None
        self._own: Stack | None = None
        """There from when copies were sent for until tokens depart."""
        self._here: Here | None = None
        self.turns = False
        """Whether a micro-batch's backward pass begins here, as soon as its forward pass has ended."""
        self.last: Replicas | None = None
        self.last_below: Callable[[], Replicas | None] = _none
        """`last` of the layer that a micro-batch visits before this one on this rank."""

    def reset(self) -> None:
        """As expert parallelism has owners, and nothing remembered."""
        even = torch.tensor([held[0] for held in self.even.holders])
        self.owners.copy_(even)
        self.chosen.copy_(even)
        self.history.fill_(-1)

    def taken_loads(self) -> Tensor:
        """Tokens of each expert since this was last asked, int64 [experts]."""
        loads, self._loads = self._loads, np.zeros_like(self._loads)
        return torch.from_numpy(loads)

    def send_for_copies(self, hidden: Tensor) -> Tensor:
        """Before the layer's attention; `depart` does it otherwise. Gives `hidden` itself."""
        is_first_pass = torch.is_grad_enabled() and not is_backward()
        below = self.last_below() if is_first_pass else None
        spread = {} if self.placement.is_sharded else spreads(self.sharded, self.placement)
        self._copied = self._copies(spread, below, self.turns and is_first_pass)
        self.last = self._copied if is_first_pass else None
        hidden, self._own = self._begun(self._copied, hidden, self._own_stack())
        return hidden

    def enter(self, weights: Tensor, counts: Tensor) -> tuple[Tensor, Here]:
        """Before tokens depart in parts: have the copies that all of them want, and whose gradients go back together.

        Routers' weights, and this rank's tokens of each expert [experts]. Gives the weights that are to depart.
        Forward: an all-gather of as many counts as there are experts.
        """
        if self._own is None:
            weights = self.send_for_copies(weights)
        loads = self._gathered(counts).answer().sum(0)
        weights, own, placement, replicas = self._completed(weights, loads)
        stacks = [own]
        for each in replicas:
            weights, *copies = each.enter(weights)
            stacks.append(Stack(each.experts, *copies))
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
        if here is None and self._own is None:
            hidden = self.send_for_copies(hidden)
        order = order_by_expert(chosen, self.top_k)
        asked = self._gathered(order.counts)
        placement = self.placement if here is None else here.placement
        # What needs no answer is under way while the host waits for one.
        set_out = packed(hidden, weights, order) if placement.is_in_order else None
        tokens, replicas = asked.answer(), []
        if here is None:
            hidden, own, further, replicas = self._completed(hidden, tokens.sum(0))
            stacks = [own]
            if further is not placement:
                placement, set_out = further, None
        else:
            stacks = here.stacks
        trip = Trip.of(placement, self.means.topology, tokens, order, self.rank, self._group)
        return Away(trip, trip.depart(*(set_out or packed(hidden, weights, trip.order))), stacks, replicas)

    def forward(self, away: Away) -> Tensor:
        """The weighted sum of what each token's experts make of it, [tokens, hidden]."""
        trip, ways, stacks, replicas = away
        rows, of_rows = (way.arrive() for way in ways)
        rows = self.arrivals(rows)
        for each in replicas:
            rows, *copies = each.enter(rows)
            stacks = [*stacks, Stack(each.experts, *copies)]
        made = trip.computed(rows, of_rows, stacks)
        for each in replicas:
            made = each.leave(made)
        return trip.back(made)

    def _gathered(self, counts: Tensor) -> OnTheHost:
        """Tokens [ranks][experts], of each rank's counts [experts]."""
        all_counts = counts.new_empty(self._ranks * self.experts)
        dist.all_gather_into_tensor(all_counts, counts, group=self._group)
        return OnTheHost(all_counts.view(self._ranks, self.experts))

    def _completed(self, begun: Tensor, loads: Numbers) -> tuple[Tensor, Stack, Placement, list[Replicas]]:
        """The copies that were sent for and, now that loads are known, more; `begun` itself; loads are remembered."""
        if self.training and not is_backward():  # once, if forward is computed again in it
            self._loads += loads
        replicas, self._copied = [] if self._copied is None else [self._copied], None
        own, self._own = self._own, None
        assert own is not None
        further = self._calibrated(loads.tolist())
        if further is None:
            return begun, own, self.placement, replicas
        extra = self._copies(spreads(self.sharded, further, self.placement))
        assert extra is not None
        begun, own = self._begun(extra, begun, own)
        return begun, own, further, [*replicas, extra]

    def _copies(
        self, spread: Mapping[int, Spread], below: Replicas | None = None, stay: bool = False
    ) -> Replicas | None:
        if not spread:
            return None
        owned = {expert: self._weights(*self.held[expert]) for expert in spread if expert in self.held}
        first = self._weights(self, 0)
        return Replicas(self._lane, spread, owned, [each.shape for each in first], first[0], below, stay)

    def _begun(self, copied: Replicas | None, hidden: Tensor, own: Stack) -> tuple[Tensor, Stack]:
        if copied is None:
            return hidden, own
        at = {expert: place for place, expert in enumerate(own.experts)}
        hidden, *weights = copied.begin(hidden, own.weights, at)
        return hidden, Stack(own.experts, *weights)

    @staticmethod
    def _weights(home: SparseExperts, at: int) -> tuple[Tensor, Tensor]:
        """Of the expert in a place, without autograd: [2 * width, hidden] and [hidden, width]."""
        return home.gate_up.data[at].flatten(0, -2), home.down.data[at]

    def _calibrated(self, loads: Sequence[int]) -> Placement | None:
        means = self.means
        if means.wire is None:
            return None
        slots = means.limits.slots
        return calibrate(self.sharded, self.placement, loads, slots, means.token_seconds, means.wire)

    def _own_stack(self) -> Stack:
        """This rank's experts in the order of their places; all of the layer's own are its parameters."""
        if not self.held:
            return Stack()
        places = list(self.held.values())
        if places == [(self, at) for at in range(len(self.gate_up))]:
            gate_up, down = self.gate_up, self.down
        else:
            homes = list(dict.fromkeys(home for home, _ in places))
            runs = [[at for home, at in places if home is each] for each in homes]
            gate_up = _Gathered.apply(runs, *(home.gate_up for home in homes))
            down = _Gathered.apply(runs, *(home.down for home in homes))
        return Stack(tuple(self.held), gate_up.flatten(1, -2), down)


def _none() -> None:
    return None


Place = tuple[SparseExperts, int]
"""One of a layer's places, by its number there."""


class _Gathered(torch.autograd.Function):
    """Some places' tensors as one, each parameter's in turn; no copy where they adjoin in one."""

    @staticmethod
    def forward(ctx: Any, runs: Sequence[Sequence[int]], *parameters: Tensor) -> Tensor:
        ctx.runs, ctx.shapes = runs, [parameter.shape for parameter in parameters]
        taken = [parameter.data[run[0] : run[-1] + 1] for run, parameter in zip(runs, parameters, strict=True)]
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = gradient.split([len(run) for run in ctx.runs])
        found = [gradient.new_zeros(shape) for shape in ctx.shapes]
        for whole, part, run in zip(found, parts, ctx.runs, strict=True):
            whole[run[0] : run[-1] + 1] = part
        return None, *found
