"""A micro-batch's way to the ranks that hold its experts, and back, where experts may have several holders."""

from __future__ import annotations

from collections.abc import Sequence
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

    def depart(self, hidden: Tensor, weights: Tensor) -> Ways:
        """Tokens [tokens, hidden] and routers' weights [tokens, experts] set out."""
        ways = Way(self.sent, self.received, self.group), Way(self.sent, self.received, self.group)
        ways[0].depart(permute(hidden, self.order))
        ways[1].depart(permute_weights(weights, self.order))
        return ways

    def computed(self, rows: Tensor, weights: Tensor, stacks: Sequence[tuple[Any, ...]]) -> Tensor:
        """What the experts make of rows, which stay where they are. Of each stack: its experts, gate_up and down."""
        held = self.placement.held_by(self.rank)
        here = [expert for experts, *_ in stacks for expert in experts]
        at = torch.tensor([here.index(expert) for expert in held], dtype=torch.int64, device=rows.device)
        counts = torch.tensor(self.counts, dtype=torch.int64, device=rows.device).view(len(self.counts), len(held))
        stack_of = at.repeat(len(self.counts)).repeat_interleave(counts.flatten(), output_size=len(rows))
        by_expert = stack_of.argsort(stable=True)
        order = Order(
            row_of=by_expert.argsort().int()[:, None],
            token_of=by_expert.int(),
            cell_of=by_expert,
            counts=counts.sum(0),
        )
        rows, weights = permute(rows, order), permute_weights(weights[:, None], order)
        total = {expert: sum(each[number] for each in self.counts) for number, expert in enumerate(held)}
        made, begin = [], 0
        for experts, gate_up, down in stacks:
            if not experts:
                continue
            sizes = [total[expert] for expert in experts]
            run = slice(begin, begin + sum(sizes))
            ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32).to(rows.device)
            made.append(expert_mlp(rows[run], weights[run], ends, gate_up, down))
            begin = run.stop
        if not made:  # but of weights too: their way back is walked by all ranks or by none
            made.append(rows * weights[:, None])
        return combine(made[0] if len(made) == 1 else torch.cat(made), order)

    def back(self, made: Tensor) -> Tensor:
        """The sum of each token's copies, [tokens, hidden]."""
        return combine(exchange_rows(made, self.received, self.sent, self.group), self.order)


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
        torch.tensor(told, dtype=torch.int64, device=device),
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
    begin, length = torch.tensor([begins, lengths], device=device)
    shift = (begin - (length.cumsum(0) - length)).repeat_interleave(length, output_size=number)
    rows = torch.arange(number, device=device) + shift
    to = torch.empty_like(rows, dtype=torch.int32)
    to[rows] = torch.arange(number, device=device, dtype=torch.int32)
    return Order(to[order.row_of.long()], order.token_of[rows], order.cell_of[rows], order.counts)
