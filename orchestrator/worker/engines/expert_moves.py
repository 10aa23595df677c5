"""Experts that change their owner under FSSDP, with all that is kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from models.sparse_experts import Owned, Owners
from orchestrator.worker.engines.protocol import KEPT, Kept


class State(Protocol):
    """What an optimizer keeps of a parameter. Collective over the ranks that share a parameter's state."""

    def read(self, parameter: Parameter, kept: Kept) -> Tensor:
        """A copy, of the parameter's shape, in fp32."""

    def write(self, parameter: Parameter, kept: Kept, value: Tensor) -> None:
        """Of a weight, the model's copy too."""


@contextmanager
def as_expert_parallel(owned: Sequence[Owned], group: dist.ProcessGroup, state: State) -> Iterator[None]:
    """Experts lie where expert parallelism would have them: for what names parameters by their places. Collective."""
    for each in owned:
        move_experts(each, each.even_owners(), group, state)
    yield
    for each in owned:
        move_experts(each, each.chosen_owners(), group, state)


def move_experts(owned: Owned, owners: Owners, group: dist.ProcessGroup, state: State) -> None:
    """Have these own experts from here on. Collective over `group` and over those who share parameters' state.

    What moves is in host memory meanwhile, since nobody has a place to spare.
    """
    rank, before = dist.get_rank(group), owned.owners()
    if before == owners:
        return
    lay = list(owned.parameters())
    owned.own(owners)
    # By place: on a rank whose experts come or go, others move up.
    is_new = [(was[:2] != now[:2]) for was, now in zip(lay, owned.parameters(), strict=True)]
    taken = {
        (number, expert): [state.read(tensor, kept).cpu() for tensor in pair for kept in KEPT]
        for (number, expert, *pair), moves in zip(lay, is_new, strict=True)
        if moves
    }
    brought = _carried(before, owners, taken, rank, group, lay[0][2:])
    for (number, expert, *pair), moves in zip(owned.parameters(), is_new, strict=True):
        if moves:
            values = iter(brought.pop((number, expert)))
            for tensor in pair:
                for kept in KEPT:
                    state.write(tensor, kept, next(values))


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
