"""A micro-batch's way to the ranks that hold its experts, and back, where experts may have several holders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.experts import expert_mlp
from kernels.permute import Order, cells, combine, divide_rows, join_rows, permute, permute_weights
from parallel.collectives import Way, exchange_rows
from parallel.fssdp_dispatch import Topology
from parallel.fssdp_journeys import Numbers, journeys
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
    coming: Numbers
    """[ranks][experts held here, ascending], of the rows that come from there."""

    @classmethod
    def of(
        cls,
        placement: Placement,
        topology: Topology,
        tokens: Numbers,
        order: Order,
        rank: int,
        group: dist.ProcessGroup,
    ) -> Trip:
        """tokens [ranks][experts]; `order` is by expert alone."""
        going, coming = journeys(placement, topology, tokens, rank)
        order = order if placement.is_in_order else _by_receiver(order, going)
        return cls(placement, rank, group, order, going.sum(0).tolist(), coming.sum(1).tolist(), coming)

    def depart(self, rows: Tensor, weights: Tensor) -> Ways:
        """What is `packed` by `order` sets out."""
        ways = Way(self.sent, self.received, self.group), Way(self.sent, self.received, self.group)
        for way, each in zip(ways, (rows, weights), strict=True):
            way.depart(each)
        return ways

    def computed(self, rows: Tensor, weights: Tensor, stacks: Sequence[tuple[Any, ...]]) -> Tensor:
        """What the experts make of rows, which stay where they are. Of each stack: its experts, gate_up and down."""
        stacks = [stack for stack in stacks if stack[0]]
        if not stacks:  # but of weights too: their way back is walked by all ranks or by none
            return rows * weights[:, None]
        row_of, ends, sizes = self._by_expert([experts for experts, *_ in stacks], rows.device)
        if row_of is None:
            ((_, gate_up, down),) = stacks
            return expert_mlp(rows, weights, ends[0], gate_up, down)
        parts = zip(divide_rows(rows, row_of, sizes), cells(weights, row_of).split(sizes), ends, stacks, strict=True)
        return join_rows([expert_mlp(*part, *both) for *part, (_, *both) in parts], row_of)

    def _by_expert(
        self, stacks: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[Tensor | None, list[Tensor], list[int]]:
        """Of rows that have come: by expert in this order, then by source. The host knows it; nothing is sorted.

        None where so they lie; of each stack where its experts' rows end, counted from its first; and how many it has.
        """
        number = self.coming.shape[1]
        place = np.searchsorted(self.placement.held_by(self.rank), [expert for stack in stacks for expert in stack])
        counts, sizes, ends, first = self.coming.sum(0)[place], [], [], 0
        # Multiples of 16 bytes apart: for pointers that are others, Triton compiles all kernels another time.
        padded = -max(map(len, stacks)) // 4 * -4
        for stack in stacks:
            through = counts[first : first + len(stack)].cumsum()
            ends += [*through.tolist(), *[0] * (padded - len(stack))]
            sizes.append(int(through[-1]))
            first += len(stack)
        # A run, of one source's rows for one expert, is known by its number among those that have come.
        order = (place[:, None] + np.arange(len(self.coming)) * number).ravel()
        lengths = self.coming.ravel()
        order = order[lengths[order] > 0]
        moves = len(stacks) > 1 or not (order[1:] > order[:-1]).all()
        told = (ends, *_shift(lengths, order)) if moves else (ends,)
        there, *moved = on_device(told, device)
        row_of = _shifted(*moved, sum(sizes)) if moves else None
        return row_of, [part[: len(stack)] for part, stack in zip(there.split(padded), stacks, strict=True)], sizes

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

    def answer(self) -> Numbers:
        """int64, for which products of counts are not too large."""
        if self._there is not None:
            self._there.synchronize()
        return self._known.numpy().astype(np.int64)


def on_device(numbers: Sequence[Numbers | Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """int32, in one copy."""
    told = sent(torch.from_numpy(np.concatenate(numbers).astype(np.int32)), device)
    return told.split(list(map(len, numbers)))


def sent(told: Tensor, device: torch.device) -> Tensor:
    """What the host has, on the device; it does not wait until a GPU has come to it."""
    return told if device.type == "cpu" else told.pin_memory().to(device, non_blocking=True)


def _by_receiver(order: Order, going: Numbers) -> Order:
    """`order`, which is by expert, by receiver first: `going` [experts][ranks] says how many of an expert go where."""
    lengths = going.ravel()
    runs = lengths.nonzero()[0]
    lengths, device, number = lengths[runs], order.token_of.device, len(order.token_of)
    moved = (runs % going.shape[1]).argsort(kind="stable")
    if (moved[1:] > moved[:-1]).all():
        return order
    shift, ends = _shift(lengths, moved)
    back = np.empty_like(shift)
    back[moved] = -shift
    # Both ways as one: what goes back follows what comes.
    told = (np.concatenate((shift, back - number)), np.concatenate((ends, number + lengths.cumsum())))
    row, to = _shifted(*on_device(told, device), 2 * number).split(number)
    row_of = to.index_select(0, order.row_of.flatten()).view_as(order.row_of)
    token_of, cell_of = order.token_of.index_select(0, row), order.cell_of.index_select(0, row)
    return Order(row_of, token_of, cell_of, order.counts)


def _shift(lengths: Numbers, order: Numbers) -> tuple[Numbers, Numbers]:
    """Of runs of rows that are put in this order: how far before it was each of them began, and where it ends."""
    came, moved = lengths.cumsum() - lengths, lengths[order]
    ends = moved.cumsum()
    return came[order] - (ends - moved), ends


def _shifted(shift: Tensor, ends: Tensor, total: int) -> Tensor:
    """int32 [total], each number and the shift of its run: the runs' shifts, and where they end."""
    row = torch.arange(total, dtype=torch.int32, device=ends.device)
    return row + shift.index_select(0, torch.searchsorted(ends, row, right=True, out_int32=True))
