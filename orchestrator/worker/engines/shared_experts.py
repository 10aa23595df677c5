"""Experts under FSSDP as an engine has them: they change their owner with all that is kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from jobs.spec import JobSpec
from models.sparse_experts import Place
from models.sparse_owners import Owned, Owners
from models.sparse_trips import OnTheHost
from models.weights import Shard, whole
from orchestrator.worker.engines.protocol import KEPT, Kept
from parallel.collectives import Lane
from parallel.fssdp import Means
from parallel.fssdp_means import means_of
from parallel.layout import Layout
from parallel.placement import Placement
from parallel.process_groups import new_group

RESHARDING_STEPS = 100
"""After which experts may change their owners (Hecate, section 4)."""


class State(Protocol):
    """What an optimizer keeps of a parameter. Collective over the ranks that share a parameter's state."""

    def read(self, parameter: Parameter, kept: Kept) -> Tensor:
        """A copy, of the parameter's shape, in fp32."""

    def write(self, parameter: Parameter, kept: Kept, value: Tensor) -> None:
        """Of a weight, the model's copy too."""


class SharedExperts:
    """A rank's, of both engines: what is decided before and after a step, and how a checkpoint sees them."""

    def __init__(
        self,
        owned: Sequence[Owned | None],
        group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None,
        state: State,
    ) -> None:
        """owned: of each virtual stage. `replicas` hold the same experts' copies for other tokens."""
        self.owned = [each for each in owned if each is not None]
        self._group, self._replicas, self._state = group, replicas, state
        self._thread = ThreadPoolExecutor(1, "copies") if self.owned else None
        self._remembered: list[OnTheHost] = []
        self._deciding: Future[list[list[Placement]]] | None = None

    def begin_step(self) -> None:
        """Copies are what the last step led to."""
        if self._deciding is None:
            decided = [owned.decision(owned.remembered().answer())() for owned in self.owned]
        else:
            decided, self._deciding = self._deciding.result(), None
        for owned, placements in zip(self.owned, decided, strict=True):
            owned.copy(placements)

    def remember(self) -> None:
        """The step's loads, which are known before its update. Collective."""
        self._remembered = [owned.remember(self._replicas) for owned in self.owned]

    def end_step(self, step: int) -> None:
        """The update is started: what to copy next is found while devices make it. Collective."""
        if step % RESHARDING_STEPS == 0:
            for owned in self.owned:
                owned.choose()
            self.go_to_owners()
            self._deciding = None
        elif self._thread is not None:
            # Not before: two threads of Python take turns, and devices would wait for what starts the update.
            remembered = [each.answer() for each in self._remembered]
            asked = [owned.decision(loads) for owned, loads in zip(self.owned, remembered, strict=True)]
            self._deciding = self._thread.submit(lambda: [decide() for decide in asked])

    @contextmanager
    def as_expert_parallel(self) -> Iterator[None]:
        """Experts lie where expert parallelism would have them: for what names tensors by their places. Collective."""
        for owned in self.owned:
            move_experts(owned, owned.even_owners(), self._group, self._state)
        yield
        self.go_to_owners()

    def forget_owners(self) -> None:
        """Experts lie evenly from here on, and what is in their places is to be overwritten."""
        self._deciding = None
        for owned in self.owned:
            owned.own(owned.even_owners())

    def go_to_owners(self) -> None:
        """Those that were chosen. Collective."""
        for owned in self.owned:
            move_experts(owned, owned.chosen_owners(), self._group, self._state)

    def kept(self) -> Iterator[Shard]:
        """What a checkpoint has beside weights; not of every run."""
        for owned in self.owned:
            for number, layer in owned.layers.items():
                for name in ("chosen", "history"):
                    yield whole(f"layers.{number}.moe.experts.{name}", getattr(layer, name))

    def restored(self) -> None:
        """All tensors were overwritten by what they were after another step."""
        self._deciding = None
        for owned in self.owned:
            owned.settle()


def sharing(
    job: JobSpec, layout: Layout, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Lane, Means] | None:
    """Where the job asks for it, and a group of ranks is there to share experts. Collective over all ranks."""
    if not job.model.is_moe or job.layout.expert_parallelism != "fssdp" or group is None or layout.ep == 1:
        return None
    return Lane(group, new_group(layout, "ep"), device), means_of(job)


def move_experts(owned: Owned, owners: Owners, group: dist.ProcessGroup, state: State) -> None:
    """Have these own experts from here on. Collective over `group` and over those who share parameters' state.

    What moves is in host memory meanwhile, since nobody has a place to spare.
    """
    rank, before = dist.get_rank(group), owned.owners()
    if before == owners:
        return
    lay = owned.experts
    owned.own(owners)
    # By place: on a rank whose experts come or go, others move up.
    moved = [place for place, was, now in zip(owned.places, lay, owned.experts, strict=True) if was != now]
    was_in, is_in = (dict(zip(owned.places, experts, strict=True)) for experts in (lay, owned.experts))
    taken: dict[tuple[int, int], list[Tensor]] = {was_in[place]: [] for place in moved}
    for parameter, kept, places in _kept_in(moved):
        whole = state.read(parameter, kept)
        for place in places:
            taken[was_in[place]].append(whole[place[1]].cpu())
    home = owned.places[0][0]
    brought = _carried(before, owners, taken, rank, group, (home.gate_up.data[0], home.down.data[0]))
    for parameter, kept, places in _kept_in(moved):
        whole = state.read(parameter, kept)
        for place in places:
            whole[place[1]] = brought[is_in[place]].pop(0)
        state.write(parameter, kept, whole)


def _kept_in(places: Sequence[Place]) -> Iterator[tuple[Parameter, Kept, list[Place]]]:
    """Every parameter that has some of these places, with what is kept of it and them."""
    for home in dict.fromkeys(home for home, _ in places):
        for parameter, kept in itertools.product((home.gate_up, home.down), KEPT):
            yield parameter, kept, [place for place in places if place[0] is home]


def _carried(
    before: Owners,
    after: Owners,
    taken: dict[tuple[int, int], list[Tensor]],
    rank: int,
    group: dist.ProcessGroup,
    like: Sequence[Tensor],
) -> dict[tuple[int, int], list[Tensor]]:
    """What is kept of experts that come to a place of this rank, `taken` from one of any; one after another."""
    brought = {}
    device = like[0].device
    for number, owners in before.items():
        for expert, (sender, receiver) in enumerate(zip(owners, after[number], strict=True)):
            key = (number, expert)
            if rank == sender == receiver and key in taken:
                brought[key] = taken.pop(key)
            elif rank == sender != receiver:
                for value in taken.pop(key):
                    dist.send(value.to(device), group=group, group_dst=receiver)
            elif rank == receiver != sender:
                shapes = [tensor.shape for tensor in like for _ in KEPT]
                brought[key] = [torch.empty(shape, device=device) for shape in shapes]
                for value in brought[key]:
                    dist.recv(value, group=group, group_src=sender)
                brought[key] = [value.cpu() for value in brought[key]]
    return brought
