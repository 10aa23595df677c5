"""A micro-batch's way to the ranks that hold its experts, and back, where experts may have several holders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.experts import expert_mlp
from kernels.permute import Order, combine, permute, permute_weights
from parallel.collectives import Way, exchange_rows
from parallel.fssdp_dispatch import Topology, destinations
from parallel.placement import Placement

Ways = tuple[Way, Way]
"""Of rows, and of their routers' weights: there they lie by the rank that they come from, then by expert."""


@dataclass(frozen=True)
class Trip:
    """Of one rank."""

    placement: Placement
    rank: int
    group: dist.ProcessGroup
    order: Order
    """Of this rank's rows: by the rank that they go to, then by expert."""
    sent: list[int]
    received: list[int]
    counts: list[list[int]]
    """[ranks][experts held here, ascending], of the rows that come from there."""

    @classmethod
    def of(
        cls,
        placement: Placement,
        topology: Topology,
        tokens: Sequence[Sequence[int]],
        order: Order,
        rank: int,
        group: dist.ProcessGroup,
    ) -> Trip:
        """tokens [ranks][experts]; `order` is by expert alone. Collective where an expert has several holders."""
        held = placement.held_by(rank)
        if placement.is_sharded:
            owners = [owner for (owner,) in placement.holders]
            to = [[(owner, number)] for owner, number in zip(owners, tokens[rank], strict=True)]
            counts = [[each[expert] for expert in held] for each in tokens]
        else:
            to = destinations(placement, topology, tokens, rank)
            counts = _exchanged_counts(placement, to, group, order.counts.device)
        runs, begin = [], 0
        for expert, parts in enumerate(to):
            for receiver, number in parts:
                runs.append((receiver, expert, begin, number))
                begin += number
        runs.sort()
        sent = [0] * placement.ranks
        for receiver, _, _, number in runs:
            sent[receiver] += number
        return cls(placement, rank, group, _reordered(order, runs), sent, list(map(sum, counts)), counts)

    def depart(self, rows: Tensor, weights: Tensor) -> Ways:
        """What is `packed` by `order` sets out."""
        ways = Way(self.sent, self.received, self.group), Way(self.sent, self.received, self.group)
        for way, each in zip(ways, (rows, weights), strict=True):
            way.depart(each)
        return ways

    def computed(self, rows: Tensor, weights: Tensor, stacks: Sequence[tuple[Any, ...]]) -> Tensor:
        """What the experts make of rows, which stay where they are. Of each stack: its experts, gate_up and down."""
        stacks = [stack for stack in stacks if stack[0]]
        held = self.placement.held_by(self.rank)
        total = dict(zip(held, map(sum, zip(*self.counts, strict=True)), strict=True))
        order = self._by_expert([expert for experts, *_ in stacks for expert in experts], total, rows.device)
        rows, weights = permute(rows, order), permute_weights(weights[:, None], order)
        runs, weights_of = (rows,), (weights,)
        if len(stacks) > 1:
            sizes = [sum(total[expert] for expert in experts) for experts, *_ in stacks]
            runs, weights_of = rows.split(sizes), weights.split(sizes)
        made, first = [], 0
        for (experts, gate_up, down), run, of_run in zip(stacks, runs, weights_of, strict=False):
            ends = order.counts[first : first + len(experts)].cumsum(0, dtype=torch.int32)
            made.append(expert_mlp(run, of_run, ends, gate_up, down))
            first += len(experts)
        if not made:  # but of weights too: their way back is walked by all ranks or by none
            made.append(rows * weights[:, None])
        return combine(made[0] if len(made) == 1 else torch.cat(made), order)

    def _by_expert(self, experts: Sequence[int], total: Mapping[int, int], device: torch.device) -> Order:
        """Of rows that have come: by expert in this order, then by source. The host knows it; nothing is sorted."""
        held = self.placement.held_by(self.rank)
        place = {expert: number for number, expert in enumerate(held)}
        # A run, of one source's rows for one expert, is known by its number among those that have come.
        lengths = [number for each in self.counts for number in each]
        runs = [source * len(held) + place[expert] for expert in experts for source in range(len(self.counts))]
        came = list(itertools.accumulate(lengths, initial=0))
        goes = dict(zip(runs, itertools.accumulate((lengths[run] for run in runs), initial=0), strict=False))
        shifts = [came[run] - goes[run] for run in runs] + [goes[run] - came[run] for run in range(len(runs))]
        told = (*shifts, *(lengths[run] for run in runs), *lengths, *(total[expert] for expert in experts))
        shift, length, counts = on_device(told, device).split((len(shifts), len(shifts), len(experts)))
        number = came[-1]
        both = torch.arange(number, device=device).repeat(2) + shift.repeat_interleave(length, output_size=2 * number)
        token, row = both[:number], both[number:]
        return Order(row_of=row.int()[:, None], token_of=token.int(), cell_of=token, counts=counts)

    def back(self, made: Tensor) -> Tensor:
        """The sum of each token's copies, [tokens, hidden]."""
        return combine(exchange_rows(made, self.received, self.sent, self.group), self.order)


def packed(hidden: Tensor, weights: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Of tokens [tokens, hidden] and routers' weights [tokens, experts] a row a copy, in this order."""
    return permute(hidden, order), permute_weights(weights, order)


class OnTheHost:
    """Numbers that a device is asked for; what is started meanwhile keeps it busy."""

    def __init__(self, asked: Tensor) -> None:
        self._known = asked
        self._there: torch.cuda.Event | None = None
        if asked.is_cuda:
            self._known = torch.empty(asked.shape, dtype=asked.dtype, pin_memory=True)
            self._known.copy_(asked, non_blocking=True)
            self._there = torch.cuda.current_stream().record_event()

    def answer(self) -> Any:
        """As a list."""
        if self._there is not None:
            self._there.synchronize()
        return self._known.tolist()


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [numbers]; the host does not wait until a GPU has come to them."""
    if device.type == "cpu" or not numbers:
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _exchanged_counts(
    placement: Placement, to: Sequence[Sequence[tuple[int, int]]], group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    """[ranks][experts held here, ascending]: each rank tells every holder how many rows it sends of each expert."""
    held = [placement.held_by(rank) for rank in range(placement.ranks)]
    going = [dict(parts) for parts in to]
    told = [going[expert].get(rank, 0) for rank, experts in enumerate(held) for expert in experts]
    mine = len(held[dist.get_rank(group)])
    heard = torch.empty(placement.ranks * mine, dtype=torch.int64, device=device)
    dist.all_to_all_single(
        heard,
        on_device(told, device),
        [mine] * placement.ranks,
        list(map(len, held)),
        group=group,
    )
    return [part.tolist() for part in heard.cpu().view(placement.ranks, mine)]


def _reordered(order: Order, runs: Sequence[tuple[int, int, int, int]]) -> Order:
    """`order`, its rows in these runs: the last two of each say where one begins and how long it is."""
    begins, lengths = [run[2] for run in runs], [run[3] for run in runs]
    if begins == sorted(begins):
        return order
    device, number = order.token_of.device, len(order.token_of)
    begin, length = on_device((*begins, *lengths), device).view(2, -1)
    shift = (begin - (length.cumsum(0) - length)).repeat_interleave(length, output_size=number)
    rows = torch.arange(number, device=device) + shift
    to = torch.empty_like(rows, dtype=torch.int32)
    to[rows] = torch.arange(number, device=device, dtype=torch.int32)
    return Order(to[order.row_of.long()], order.token_of[rows], order.cell_of[rows], order.counts)
